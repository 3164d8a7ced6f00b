"""What the paper claims, and what was found here: CLAIMS.md.

    python -m experiments.claims table
    python -m experiments.claims check
    python -m experiments.claims update results/cpu/studies/hops.json
    python -m experiments.claims run language.yoco_u_below_yoco

`table` writes CLAIMS.md, the line of the README that has the headline, and the figures, from the
results of experiments.compare in results/. `check` exits with 1 and shows the difference if they
are not what `table` would write, or if the README quotes a figure (bits/byte, GiB and so on) that
no file in results/ has, those of studies aside. `update` writes the claims of a file again, as its
study has them now, from the runs of the file. `run` repeats one claim: it trains its entries in
runs/claims/, and shows what results/ has and what came. After a kill, the same command goes on.
"""

import difflib
import importlib
import importlib.metadata
import json
import pkgutil
import platform
import re
import shlex
import signal
import subprocess
from pathlib import Path

import configs.studies
from benchmarks import paper_claims
from benchmarks.report import Grid, page
from experiments import child, cli
from pallas_kernels import children
from yocou_jax.config import Config
from yocou_jax.errors import UserError
from yocou_jax.evaluation import claims, figure, findings
from yocou_jax.files import to_json, write_atomically
from yocou_jax.study import Study

README, RESULTS = Path("README.md"), Path("results")
HEADLINE = re.compile("(?<=<!-- headline -->).*?(?=<!-- end of the headline -->)", re.DOTALL)


def studies() -> dict[str, Study]:
    """Those in configs/studies/, by the names of their files."""
    names = [module.name for module in pkgutil.iter_modules(configs.studies.__path__)]
    return {name: importlib.import_module(f"configs.studies.{name}").STUDY for name in names}


def settings(name: str) -> Config:
    """What `get_config()` of a study gives."""
    return Config.from_dict(importlib.import_module(f"configs.studies.{name}").get_config())


def documents(found: dict[str, Study], results: list[claims.Result]) -> dict[Path, str]:
    """The files as they should be."""
    grids = [Grid(*table) for table in claims.tables(found, results)]
    said = []
    for name, note in claims.HEADLINES.items():
        claim, _ = claims.find(name, found, results)
        said += claims.sentences(name, found, results, note) or [
            f"`{claim.better}` {claim.relation} `{claim.worse}`: not run yet."
        ]
    readme, count = HEADLINE.subn(lambda _: " ".join(said), README.read_text(encoding="utf-8"))
    if count != 1:
        raise UserError("README.md must have `<!-- headline -->` and its end once.")
    grids.append(Grid(paper_claims.TITLE, paper_claims.COLUMNS, paper_claims.rows()))
    return {Path("CLAIMS.md"): page("Claims", claims.INTRODUCTION, grids, ()), README: readme}


def check(wanted: dict[Path, str]) -> int:
    code = 0
    for path, text in wanted.items():
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        if old != text:
            names = (str(path), "what results/ gives")
            print("\n".join(difflib.unified_diff(*(t.splitlines() for t in (old, text)), *names)))
            print(f"{path} is not what results/ gives: run `python -m experiments.claims table`.")
            code = 1
    readme = HEADLINE.sub("", README.read_text(encoding="utf-8"))
    for words in claims.unknown_figures(readme, RESULTS):
        print(f"README.md says {words!r}, but no file in results/ has this number.")
        code = 1
    return code


def update(path: Path, found: dict[str, Study]) -> None:
    old = json.loads(path.read_text(encoding="utf-8"))
    name = Path(old["study"].partition(":")[0]).stem
    if old["changed"]:
        raise UserError(f"{path} has other settings than its study. Write it with its command.")
    module = importlib.import_module(f"configs.studies.{name}")
    new = findings.claims_again(found[name], settings(name), old)
    for line in claims.changes(old["claims"], new):
        print(line)
    now = old | {"claims": new, "text": module.__doc__.strip()}
    write_atomically(path, to_json(now, indent=1) + "\n")


def run(name: str, found: dict[str, Study], results: list[claims.Result]) -> int:
    words = claims.compare_flags(name, found, results)
    so_far = claims.sentences(name, found, results) or ["results/ does not have it."]
    print(*(f"So far: {sentence}" for sentence in so_far), sep="\n")
    here = platform.python_version(), importlib.metadata.version("jax")
    _, before = claims.find(name, found, results)
    for result in before:
        if here != (there := claims.versions(result)):
            print(f"Note: {result.path} is of Python and jax {there}, and here are {here}.")
    command = ["-m", "experiments.compare", *words]
    print(shlex.join(["python", *command]), flush=True)
    path = Path(words[-1].removeprefix("--out="))
    path.parent.mkdir(parents=True, exist_ok=True)
    with subprocess.Popen(children.bound(command, child.LONGEST_S)) as process:
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal has sent it to the child too
    if process.returncode not in (0, 1):  # 1: a run has failed, perhaps at too high a rate
        return process.returncode
    report = json.loads(path.read_text(encoding="utf-8"))
    study = before[0].study if before else name.partition(".")[0]
    now = claims.Result(path, name.partition(".")[0], "now, here", study, report)
    print(*(f"So far: {sentence}" for sentence in so_far), sep="\n")
    print(*(f"Now: {sentence}" for sentence in claims.sentences(name, found, [now])), sep="\n")
    for result in before:
        for what in claims.changed(result, now):
            print(f"Note: {result.path} is of another {what}.")
    return process.returncode


def main(words: list[str]) -> int | None:
    found = studies()
    if len(words) == 3 and words[1] == "update":  # its claims may not be those of the study yet
        return update(Path(words[2]), found)
    results = claims.read_results(RESULTS, found, settings)
    match words[1:]:
        case ["table"]:
            for path, text in documents(found, results).items():
                write_atomically(path, text)
                print(f"Wrote {path}")
            for result in results:
                if figure.draw(result.report, picture := result.path.with_suffix(".png")):
                    print(f"Wrote {picture}")
        case ["check"]:
            return check(documents(found, results))
        case ["run", name]:
            return run(name, found, results)
        case _:
            raise UserError("Say `table`, `check`, `update FILE` or `run NAME`.")


if __name__ == "__main__":
    cli.run(main, arguments=2)
