"""Trains several programs under a stated match, with several seeds, and compares them.

    python -m experiments.compare --config=configs/studies/language.py [--dry_run]
    python -m experiments.compare --config=configs/studies/language.py --only=yoco_u,yoco --seeds=5

The study is a file with `get_config()`, the settings of its reference, and STUDY
(yocou_jax/study.py). The accounting finds the sizes of the other entries, and an entry that cannot
match is an error. The first seed of each entry runs at every learning rate, the others at the best.
Each run is a process of `experiments.train`, one after the other, in a workdir of its own. A run
that fails does not end the others (exit code 1).

The command can be killed at any time. The same command again resumes the run that was not finished,
skips those that were, and makes those that failed again. After each run, these are written anew:
the results (--out, by default results/DEVICE/studies/ and the name of the workdir), a figure next
to them, and the page report.html in the workdir, which needs no other file. Flags change the
settings of all entries (--config.run.steps=1000); then give another --workdir.
"""

import runpy
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from absl import flags

from benchmarks.report import Grid, console, output_file, plain_name, table, write_json
from experiments import cli
from pallas_kernels import children
from yocou_jax import plots  # noqa: F401  it needs matplotlib: fail now, and not after hours
from yocou_jax.config import Config
from yocou_jax.errors import UserError, shown
from yocou_jax.evaluation import report as tables
from yocou_jax.evaluation.compare import Comparison, RunFailed, Spec, overrides, report
from yocou_jax.files import expand_path, write_atomically
from yocou_jax.study import Study
from yocou_jax.training.preemption import EXIT_PREEMPTED

CONFIG = cli.config_file(None, "The study, a file such as configs/studies/language.py.")
ONLY = flags.DEFINE_list("only", [], "Names of entries to train. Default: all.")
SEEDS = flags.DEFINE_integer("seeds", None, "How many. Default: those of the study.", lower_bound=1)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the plan only.")
WORKDIR = flags.DEFINE_string("workdir", None, "For all runs. Default: runs/compare/<study>.")
OUT = flags.DEFINE_string("out", None, "File for the results (.json). The figure is next to it.")
flags.mark_flag_as_required("config")

LONGEST_S = 30 * 24 * 3600  # of one process


def process(words: list[str], log: Path) -> None:
    """Runs `python -m words`, which writes to the file `log`. If this process is asked to stop, it
    asks that process to save and stop. Raises RunFailed if the command failed."""
    with log.open("ab") as file:
        child = subprocess.Popen(
            children.bound(["-m", *words], LONGEST_S),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,  # Ctrl-C reaches only this process
        )
        try:
            code = child.wait()
        except BaseException:
            child.terminate()
            child.wait()
            raise
    if code == EXIT_PREEMPTED:
        raise UserError(f"The run of {log} was asked to stop. The same command goes on.")
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        raise RunFailed(f"exit code {code}, see {log}: {last[:300]}")


class Runner:
    """Runs the commands of a study, and writes its results after each of them."""

    def __init__(self, file: str, module: dict, comparison: Comparison):
        self.file, self.module, self.comparison = file, module, comparison
        self.out = output_file("out", OUT.value, ("json",))

    def command(self, spec: Spec) -> list[str]:
        changes = overrides(self.module["get_config"](), spec.config)
        return ["experiments.train", f"--config={self.file}", *changes, f"--workdir={spec.workdir}"]

    def train(self, spec: Spec) -> None:
        process(self.command(spec), spec.log)

    def evaluate(self, spec: Spec, task: str, options: tuple[str, ...]) -> None:
        words = [f"--workdir={spec.workdir}", f"--task={task}", *options]
        process(["experiments.evaluate", *words], spec.log)

    def ended(self, spec: Spec) -> None:
        print(f"{spec.name}: {self.comparison.outcome(spec)}", flush=True)
        self.write()

    def write(self) -> dict:
        """Writes the results, if there are any, and returns them."""
        comparison, python = self.comparison, ["python", "-m"]
        first = [comparison.first(name) for name in comparison.twins]
        found = report(comparison) | {
            "text": self.module.get("__doc__") or "",
            "command": shlex.join([*python, "experiments.compare", *sys.argv[1:]]),
            "commands": {s.entry: shlex.join([*python, *self.command(s)]) for s in first},
        }
        if found["environments"]:
            device = plain_name(found["environments"][0]["device"]["kind"])
            # The name of the folder, because flags may make another study from the same file.
            name = f"{comparison.folder.name}.json"
            out = self.out or Path("results") / device / "studies" / name
            out.parent.mkdir(parents=True, exist_ok=True)
            write_json(out, found)
            png = out.with_suffix(".png")
            drawn = tables.draw(found, png)
            page = tables.page(found, png.read_bytes() if drawn else None)
            write_atomically(comparison.folder / "report.html", page)
        return found


def stop(number, frame):
    sys.exit(EXIT_PREEMPTED)


def main(_):
    cli.refuse_empty(WORKDIR)
    file = flags.FLAGS["config"].config_filename.partition(":")[0]  # without a preset
    module = runpy.run_path(str(expand_path(file)))
    study = module.get("STUDY")
    if not isinstance(study, Study):
        raise UserError(f"The file {shown(file)} has no STUDY (yocou_jax/study.py).")
    folder = expand_path(WORKDIR.value or f"runs/compare/{Path(file).stem}")
    comparison = Comparison(study, Config.from_dict(CONFIG.value), folder, SEEDS.value)
    comparison.check_entries(ONLY.value)
    runner, screen = Runner(file, module, comparison), console(160)
    screen.print(table(Grid(*tables.plan(comparison, ONLY.value))))
    if DRY_RUN.value:
        return 0
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    comparison.train(runner.train, runner.evaluate, runner.ended, ONLY.value)
    found = runner.write()
    for made in tables.tables(found)[:2]:
        screen.print(table(Grid(*made)))
    print(f"The report: {folder}/report.html")
    return 1 if any(entry["failures"] for entry in found["entries"].values()) else 0


if __name__ == "__main__":
    cli.run(main)
