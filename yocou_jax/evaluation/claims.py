"""What the paper claims, and what the results of studies say: the tables of CLAIMS.md.

The results are the files results/DEVICE/studies/NAME.json, as experiments.compare writes them. The
name of a claim is NAME, a dot and `Claim.name`. The words about the paper are those of the study's
file, so that they can be corrected without its runs.
"""

import json
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from yocou_jax.config import Config
from yocou_jax.errors import UserError, shown
from yocou_jax.evaluation.findings import short_revision, study_changes
from yocou_jax.evaluation.report import Table
from yocou_jax.evaluation.statistics import NOT_HERE
from yocou_jax.study import AXES, Claim, Study

# What the README says first, and what its reader does not know about the two entries.
HEADLINES = {
    "language.yoco_u_below_yoco": "",
    "language.yoco_u_below_yoco_equal_flops": "`yoco` trained for as many FLOPs",
}
COMMAND = "python -m experiments.claims run"
UPDATE = "python -m experiments.claims update"
COLUMNS = (
    *("claim", "the paper", "expected: better by", "ours", "found: better by", "95% interval"),
    *("seeds", "smallest effect", "matters from", "verdict", "sizes", "minutes"),
    *(f"`{COMMAND}`", "remarks"),
)
# How CLAIMS.md begins.
INTRODUCTION = (
    "`python -m experiments.claims table` writes this file from results/. Do not edit it. "
    f"`{COMMAND} NAME` repeats one claim, with the name in its row.",
    "A claim is that one entry of a study has a better value of a metric than another; without "
    "the name of a metric, it is the validation loss in bits/byte. *Ours* are the two means, of"
    " the better entry first. *Found* is their difference, paired by seed: above 0, the claim "
    "holds in these runs; *outside*: not in the range that was expected. A claim that was *added "
    "later*, when the results or those of earlier runs were known, has no expectation. The "
    "*smallest effect* is the true difference that this many seeds would find with 80% "
    "probability. The minutes are those of all runs of the entries, with their sweep of the "
    "learning rate. (Two runs may have shared a machine, one on each core.)",
    "*Matters from* is the smallest difference that would matter. If the paper has a smaller one "
    "(in brackets, next to its values), the limit is that of the paper. A claim is *not at this "
    "scale* if the whole 95% interval is below the limit; *the reverse holds* if the interval is "
    "even below 0, and the difference at least what matters. A claim is *reproduced* (*holds*, if "
    "it is not in the paper) if the whole interval is above 0, and the difference at least the "
    "limit. It is *inconclusive* in all other cases, and also with fewer than 3 seeds, if a seed "
    "has no value, if the difference is the same with each seed (then its spread is not known), "
    "or if fewer than 3 seeds are left without those with which both entries have learned a task "
    "wholly, or both not at all.",
    "The intervals are those of Student's t over seeds: they assume that the differences are "
    "roughly normal, and for the share of right answers of three seeds that learn all or nothing "
    "they do not have 95% coverage. They are about seeds only, and not about the text on which a "
    "loss is measured. They are not corrected for the number of claims: of 20 claims without any "
    "effect, one is expected to have an interval without 0.",
    "The models of Table 3 read 15 tokens for each parameter, those of `language`, `loops`, "
    "`inside` and `long_text` about one. The difference in brackets after the paper's values is in "
    "our unit, but of another text: a Wiki perplexity per word is converted to bits/byte at 5.35 "
    "bytes per word, as WikiText-2 has them.",
)
WORDS = 3  # the first columns: what is known before the first run
# A figure that a document quotes: a number with one of these units.
UNITS = r"nats/token|bits/byte|tokens/s|[GT]FLOP/s|GiB\b|s\b"
FIGURE = re.compile(rf"(?<![\w.])([\d,]*\.?\d+)(?:\s*({UNITS})|x\b)")
CLOCK = re.compile(r"(?<![\w.:])\d+:[0-5]\d\b")  # minutes and seconds


class Result(NamedTuple):
    """One file of results. name: of the file, without suffix. device: of the folder. study: the
    file of the study, as in `studies`."""

    path: Path
    name: str
    device: str
    study: str
    report: Mapping[str, Any]


def read_results(
    folder: Path, studies: Mapping[str, Study], settings: Callable[[str], Config]
) -> list[Result]:
    """The results of the given studies in a folder results/. studies: by file name without suffix.
    settings: what `get_config()` of a study gives, by the same name.

    Raises UserError if a file does not have the claims of its study, or if the entries, the
    settings or the flags of evaluation of the study have changed since its runs.
    """
    found = []
    for path in sorted(folder.glob("*/studies/*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        file = Path(report.get("study", "").partition(":")[0])
        if file.parts[-3:-1] != ("configs", "studies") or file.stem not in studies:
            if "study" in report:  # somebody's own study
                continue
            raise UserError(f"{path} does not name its study. Write it again: {report['command']}")
        result = Result(path, path.stem, path.parts[-3], file.stem, report)
        base = None if report["changed"] else settings(file.stem)
        if changed := study_changes(studies[file.stem], base, report):
            raise UserError(
                f"{path} is of another study than {report['study']} is now: {'; '.join(changed)}. "
                f"Make its runs again: {report['command']}"
            )
        _check_claims(result, studies[file.stem])
        found.append(result)
    return found


def _check_claims(result: Result, study: Study) -> None:
    """What was expected before the runs stays as it was, and a verdict is of the claim as it is
    now. Only words about the paper may change."""

    def fixed(claim: Mapping[str, Any]) -> dict[str, Any]:
        names = ("better", "worse", "more", "metric", "against", "match", "expected", "least")
        names += ("within", "source", "effect", "added")
        return {name: claim.get(name) for name in names}

    ours = {}
    for c in study.claims:
        facts = vars(c) | {"metric": _metric(study, c), "match": [*_match(study, c)]}
        facts |= {"expected": [*c.expected], "within": c.within and [*c.within]}
        ours[c.name] = fixed(facts)
    for claim in result.report["claims"]:
        if ours.get(claim["name"]) != fixed(claim):
            raise UserError(
                f"{result.path} has the claim {claim['name']}, which is absent from the study "
                f"{result.study} or differs there. `{UPDATE} {result.path}` writes it again."
            )


def _metric(study: Study, claim: Claim) -> str:
    return claim.metric or study.metric


def _match(study: Study, claim: Claim) -> Sequence[str]:
    return study.match if claim.match is None else claim.match


# --- CLAIMS.md ------------------------------------------------------------------------------------


def tables(studies: Mapping[str, Study], results: Sequence[Result]) -> list[Table]:
    """A table of claims for each file of results and for each study without one, and where the
    results are from. Text is Markdown."""
    made = [
        Table(_title(result), COLUMNS, _rows(studies[result.study], result)) for result in results
    ]
    columns = [*COLUMNS[:WORDS], COLUMNS[-2]]
    for name in [n for n in studies if n not in {result.name for result in results}]:
        rows = [[*row[:WORDS], row[-2]] for row in _rows(studies[name], None, name)]
        made.append(Table(f"{name}: not run", columns, rows))
    return [*made, _origins(studies, results)] if results else made


def _title(result: Result) -> str:
    changed = result.report["changed"]
    return f"{result.name}{' with ' + ' '.join(changed) if changed else ''}, on {result.device}"


def _rows(study: Study, result: Result | None, name: str = "") -> list[list[str]]:
    found = {} if result is None else {c["name"]: c for c in result.report["claims"]}
    rows = []
    for claim in study.claims:
        low, high = claim.expected
        metric = "" if claim.metric is None else f" in `{claim.metric}`"
        words = f"`{claim.better}` {claim.relation} `{claim.worse}`{metric}"
        if claim.against is not None:
            words = f"`{claim.better}`{metric} {claim.relation} `{claim.worse}`"
            words += f" in `{claim.against}`"
        equal = "" if len(claim.entries) == 1 else f", at equal {', '.join(_match(study, claim))}"
        first = [
            f"{words}{equal}",
            _paper(claim),
            "added later" if claim.added else f"{low:+g} to {high:+g}",
        ]
        command = f"`{result.name if result else name}.{claim.name}`"
        if result is None or found.get(claim.name, {}).get("difference") is None:
            rows.append([*first, *["-"] * 6, "not run", "-", "-", command, ""])
        else:
            cells = _cells(claim, found[claim.name], result.report)
            rows.append([*first, *cells[:-1], command, cells[-1]])
    return rows


def _paper(claim: Claim) -> str:
    """What the paper has, with the difference that its values mean in our unit."""
    effect = "" if claim.effect is None else f" ({claim.effect:+.4f})"
    return f"{claim.source}: {claim.paper}{effect}" if claim.paper else claim.source


def _is_reversed(claim: Mapping[str, Any]) -> bool:
    found = claim["difference"]
    return found["high"] < 0 and -found["mean"] >= claim["least"]


def _cells(made: Claim, claim: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    """What was found, from the two means to the minutes, and the remarks. made: the claim of the
    study, and claim: that of the results."""
    found, (low, high) = claim["difference"], claim["expected"]
    outside = "" if made.added or low <= found["mean"] <= high else " (outside)"
    reverse = claim["verdict"] == NOT_HERE and _is_reversed(claim)
    sizes = [_sizes(report["entries"][claim[side]]["amounts"]) for side in ("better", "worse")]
    excluded = ["the paper's difference is outside of the interval"] * _is_excluded(claim)
    return [
        " and ".join(f"{side['mean']:.4f}" for side in claim["means"]),
        f"{found['mean']:+.4f}{outside}",
        _interval(found),
        str(found["n"]),
        _smallest(claim),
        f"{claim['least']:g}",
        claim["verdict"] + (" (the reverse holds)" if reverse else ""),
        "; ".join(dict.fromkeys(sizes)),
        f"{claim['minutes']:.0f}",
        "; ".join([*claim["doubts"], *excluded, *claim["remarks"]]),
    ]


def _smallest(claim: Mapping[str, Any]) -> str:
    effect = claim["difference"]["smallest_effect"]
    if effect is None:
        return "-"
    share = claim["metric"].rpartition(".")[2].startswith("accuracy")  # it is at most 1
    return "> 1" if share and effect > 1 else f"{effect:.4f}"


def _is_excluded(claim: Mapping[str, Any]) -> bool:
    """Whether the paper's difference is not in the interval, and the interval decides something."""
    found, effect = claim["difference"], claim["effect"]
    if effect is None or found["low"] is None or claim["doubts"]:
        return False
    return not found["low"] <= effect <= found["high"]


def _in_words(made: Claim, claim: Mapping[str, Any]) -> str:
    """The same for a sentence that says in words which entry has more."""
    if made.effect is None or not _is_excluded(claim):
        return ""
    word = "more" if (made.effect > 0) == made.more else "less"
    return (
        f". The paper has {made.paper}, on another text: {abs(made.effect):.3f} {word} in this "
        "unit, which is outside of the interval"
    )


def _interval(found: Mapping[str, Any]) -> str:
    return "-" if found["low"] is None else f"{found['low']:+.4f} to {found['high']:+.4f}"


def _sizes(amounts: Mapping[str, float]) -> str:
    parameters, tokens = _short(amounts["parameters"]), _short(amounts["tokens"])
    each = amounts["tokens"] / amounts["parameters"]
    return f"{parameters} parameters without embeddings, {tokens} tokens ({each:.2g} per parameter)"


def _short(number: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def _origins(studies: Mapping[str, Study], results: Iterable[Result]) -> Table:
    rows = []
    for result in results:
        report = result.report
        code = report["environments"]
        devices = (f"{c['device']['count']} x {c['device']['kind']}" for c in code)
        versions = (f"Python {c['python']}, jax {c['packages']['jax']}" for c in code)
        made = [run for entry in report["entries"].values() for run in entry["runs"]]
        rates = [f"{rate:g}" for rate in sorted({run["learning_rate"] for run in made})]
        rows.append(
            [
                str(result.path),
                *(", ".join(dict.fromkeys(names)) for names in (devices, versions)),
                ", ".join(dict.fromkeys(short_revision(c["git"] or "not known") for c in code)),
                ", ".join(rates) + ("" if len(rates) > 1 else " (not swept)"),
                str(len(made)),
                f"{report['minutes']:.0f}",
                f"`{report['command']}`",
                "; ".join([*report["remarks"], *filter(None, [studies[result.study].notes])]),
            ]
        )
    columns = [
        *("results", "device", "versions", "revision", "learning rates", "runs", "minutes"),
        *("command", "remarks"),
    ]
    return Table("Where the results are from", columns, rows)


# --- One claim ------------------------------------------------------------------------------------


def find(name: str, studies: Mapping[str, Study], results: Sequence[Result]) -> tuple[Claim, list]:
    """A claim, and the results that have it. Raises UserError if no study and no result has it."""
    start, _, end = name.partition(".")
    having = [result for result in results if result.name == start]
    study = studies.get(having[0].study if having else start)
    for claim in study.claims if study else ():
        if claim.name == end:
            return claim, having
    raise UserError(f"There is no claim {shown(name)}. CLAIMS.md has their names.")


def compare_flags(name: str, studies: Mapping[str, Study], results: Sequence[Result]) -> list[str]:
    """The flags with which experiments.compare trains the two entries of a claim."""
    claim, having = find(name, studies, results)
    start = name.partition(".")[0]
    words = [f"--config=configs/studies/{start}.py"]
    if having:  # its flags may have changed the settings; of a flag that is given twice, the last
        words = shlex.split(having[0].report["command"])[3:]  # counts
    folder = f"runs/claims/{start}"
    only = f"--only={','.join(claim.entries)}"
    return [*words, only, f"--workdir={folder}", f"--out={folder}.json"]


def sentences(
    name: str, studies: Mapping[str, Study], results: Sequence[Result], note: str = ""
) -> list[str]:
    """What the results say about a claim: one sentence for each file that has an answer. note: what
    `worse` is."""
    claim, having = find(name, studies, results)
    said = []
    for result in having:
        found = next((c for c in result.report["claims"] if c["name"] == claim.name), None)
        if found is not None and found["difference"] is not None:
            *_, seeds, _, _, word, sizes, _, _ = _cells(claim, found, result.report)
            unit = "bits/byte" if found["metric"] == "summary.val_bpb" else f"in {found['metric']}"
            axes = " and ".join(AXES[name].words for name in found["match"])
            axes = axes.replace("parameters without embeddings", "parameters")  # as in the sizes
            equal = f"At equal {axes}, " if len(claim.entries) > 1 else ""
            mean, low, high = (found["difference"][x] for x in ("mean", "low", "high"))
            bounds = "no interval"
            if low is not None:
                low, high = sorted((low, high) if mean >= 0 else (-low, -high))
                bounds = f"95% interval {low:.4f} to {high:.4f}"
            than = f"`{claim.worse}`{f' ({note})' if note else ''}"
            than += "" if claim.against is None else f" has in {claim.against}"
            better, worse = ("more", "less") if claim.more else ("less", "more")
            said.append(
                f"{equal}`{claim.better}` has {abs(mean):.4f} {unit} "
                f"{better if mean >= 0 else worse} than {than} ({bounds}; {seeds} seeds; {sizes}; "
                f"{result.device}). The claim that it has {better}: {word}"
                f"{_in_words(claim, found)}."
            )
    return said


def changes(before: Iterable[Mapping], now: Iterable[Mapping]) -> list[str]:
    """Which claims came and went. Raises UserError if the expectation of one has changed, or what
    it is an expectation of."""
    old, new = ({claim["name"]: claim for claim in claims} for claims in (before, now))
    for name in old.keys() & new.keys():
        for field in ("expected", "least", "within", "match", "more", "added"):
            if field in old[name] and old[name][field] != new[name][field]:  # `added` is newer
                raise UserError(
                    f"The claim {name} had {field} {old[name][field]} before its runs, and not "
                    f"{new[name][field]}."
                )
    return [f"- {name}" for name in old if name not in new] + [
        f"+ {name}" for name in new if name not in old
    ]


def versions(result: Result) -> tuple[str, str]:
    """Of Python and jax, with which the first of its runs was made."""
    first = result.report["environments"][0]
    return first["python"], first["packages"]["jax"]


def changed(before: Result, now: Result) -> list[str]:
    """What two results differ in, besides their numbers."""
    facts = {"corpus": "text", "tokenizer": "tokenizer", "git": "revision of the code"}
    one, two = (result.report["environments"][0] for result in (before, now))
    return [what for key, what in facts.items() if one[key] != two[key]]


# --- Documents ------------------------------------------------------------------------------------


def numbers(value: Any) -> Iterator[float]:
    """All numbers in a JSON value."""
    if isinstance(value, dict):
        value = [*value.values()]
    if isinstance(value, list):
        for part in value:
            yield from numbers(part)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def unknown_figures(text: str, folder: Path) -> list[str]:
    """The figures in a text (numbers with a unit of FIGURE, and times as in 4:47) that no file of
    results/ has, at the precision in which they are written. The files have bytes and seconds.
    Files of studies do not count: they have so many numbers that a short figure would always be
    among them. Not seen are figures with other words, such as ranges of minutes."""
    files = [f for f in sorted(folder.rglob("*.json")) if f.parent.name != "studies"]
    known = [n for f in files for n in numbers(json.loads(f.read_text(encoding="utf-8")))]
    unknown = []
    for match in FIGURE.finditer(text):
        figure, size = match[1].replace(",", ""), 2**30 if match[2] == "GiB" else 1
        digits = len(figure.partition(".")[2])
        if not any(f"{number / size:.{digits}f}" == figure for number in known):
            unknown.append(match[0])
    clocks = {f"{round(number) // 60}:{round(number) % 60:02}" for number in known}
    unknown += [match[0] for match in CLOCK.finditer(text) if match[0] not in clocks]
    return [*dict.fromkeys(unknown)]
