"""What the runs of a comparison say: means, differences, verdicts, and why to doubt them."""

import contextlib
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from yocou_jax import accounting
from yocou_jax.config import Config
from yocou_jax.errors import UserError
from yocou_jax.evaluation.compare import IGNORED, SWEEP, Comparison, distinct, given_flags
from yocou_jax.evaluation.statistics import (
    HOLDS,
    INCONCLUSIVE,
    PAIRS,
    REPRODUCED,
    Interval,
    all_equal,
    interval,
    paired,
    smallest_effect,
    verdict,
)
from yocou_jax.study import AXES, NOT_IN_PAPER, TOLERANCE, Claim, Study, matched, ratios, twins
from yocou_jax.trees import differences, flat


def report(comparison: Comparison) -> dict[str, Any]:
    """Everything that tables and figures need, from the runs that have ended, as JSON values."""
    study, twins = comparison.study, comparison.twins
    entries = {name: _entry(comparison, name) for name in twins}  # this reads all runs
    records = comparison.records.values()
    return {
        "question": study.question,
        "reference": study.reference,
        "metric": study.metric,
        "match": list(study.match),
        "seeds": list(comparison.seeds),
        "sweep_seed": SWEEP,
        "learning_rates": list(comparison.rates),
        "minutes": sum(record["minutes"] for record in records),
        "claims": [_claim(comparison, claim) for claim in study.claims],
        "entries": entries,
        "environments": distinct(record["environment"] for record in records),
        "remarks": _origin(records),
        "config": twins[study.reference].to_dict(),
    }


def study_changes(study: Study, base: Config | None, old: Mapping[str, Any]) -> list[str]:
    """How a study differs from what the runs of a report were made with, as words.

    base: the settings of its `get_config()`. None: flags have changed the settings of these runs,
    so only their evaluations are compared.
    """
    runs = [run for entry in old["entries"].values() for run in entry["runs"]]
    found = []
    for task, flags in study.evaluations.items():
        evaluations = [run["evaluation"][task] for run in runs if task in run["evaluation"]]
        for given in distinct(sorted(given_flags(made)) for made in evaluations):
            if given != sorted({*flags}):
                found.append(f"the task {task}: {' '.join(given)} -> {' '.join(flags)}")
    if base is None:
        return found
    configs = twins(study, base)
    if old["entries"].keys() != configs.keys():
        return [*found, "its entries"]
    before, now = flat(old["config"]), flat(configs[study.reference].to_dict())
    common = before.keys() & now.keys()  # a field that is newer than the runs has changed nothing
    found += differences(*({key: s[key] for key in common} for s in (before, now)), IGNORED)
    for name, entry in old["entries"].items():
        fields = _fields(configs[name], configs[study.reference])
        found += [f"{name}: {words}" for words in differences(entry["fields"], fields, IGNORED)]
        if entry["program"] != (program := str(configs[name].model.program)):
            found.append(f"{name}: {entry['program']} -> {program}")
    return found


def claims_again(study: Study, base: Config, old: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The claims that a study has now, about the runs of an older report. base: the settings of the
    study's reference.

    Raises UserError if the runs are not those of the study as it is now.
    """
    if changed := study_changes(study, base, old):
        words = "; ".join(changed)
        raise UserError(f"The study has changed since these runs: {words}. Make them again.")
    with tempfile.TemporaryDirectory() as folder:
        comparison = Comparison(study, base, Path(folder), len(old["seeds"]))
        for name, entry in old["entries"].items():
            for run in entry["runs"]:
                try:
                    spec = comparison.spec(name, run["learning_rate"], run["seed"])
                except KeyError:
                    raise UserError(
                        f"The study has no run of {name} with seed {run['seed']} and the learning "
                        f"rate {run['learning_rate']:g}. Make its runs again."
                    ) from None
                comparison.records[spec.workdir] = run
            for spec in comparison.runs([name]):
                if spec.name in entry["failures"]:
                    spec.failure.parent.mkdir(parents=True, exist_ok=True)
                    spec.failure.write_text(entry["failures"][spec.name], encoding="utf-8")
        new = report(comparison)
    for name, entry in old["entries"].items():
        if (count := len(new["entries"][name]["runs"])) != len(entry["runs"]):
            raise UserError(
                f"Only {count} of {len(entry['runs'])} runs of {name} have what the study asks. "
                "Make them again."
            )
    return new["claims"]


def _fields(config: Config, reference: Config) -> dict[str, Any]:
    """The fields that differ from those of the reference."""
    new, old = flat(config.to_dict()), flat(reference.to_dict())
    return {field: new[field] for field in new if new[field] != old[field]}


def _entry(comparison: Comparison, name: str) -> dict[str, Any]:
    reference = comparison.study.reference
    config, other = comparison.twins[name], comparison.twins[reference]
    values, failures = comparison.values(name), {}
    for spec in comparison.runs([name]):
        with contextlib.suppress(FileNotFoundError):
            failures[spec.name] = spec.failure.read_text(encoding="utf-8").strip()
    return {
        "program": str(config.model.program),
        "fields": _fields(config, other),
        "amounts": {axis: AXES[axis].amount(config) for axis in AXES},
        "ratios": ratios(config, other),  # amounts over those of the reference
        "matched": list(matched(config, other)),
        "learning_rate": comparison.best_rate(name),
        "sweep": {f"{rate:g}": value for rate, value in comparison.sweep(name).items()},
        "swept": comparison.swept(name),
        "rate_at_edge": comparison.at_edge(name),
        "values": {str(seed): value for seed, value in values.items()},
        "mean": _numbers(interval(list(values.values())) if values else None),
        # The reference minus the entry, as in a claim that the entry is lower.
        "difference": None
        if name == reference
        else _numbers(paired(values, comparison.values(reference))),
        "runs": _records(comparison, name),
        "failures": failures,
    }


def _records(comparison: Comparison, *entries: str) -> list[dict]:
    found = [comparison.record(spec) for name in entries for spec in comparison.runs([name])]
    return [record for record in found if record is not None]


def _claim(comparison: Comparison, claim: Claim) -> dict[str, Any]:
    paths = (claim.metric, claim.against or claim.metric)
    values = [*map(comparison.values, (claim.better, claim.worse), paths)]
    found = paired(*(reversed(values) if claim.more else values))
    doubts = _doubts(comparison, claim, values)
    # A difference that the paper has cannot be excluded by an interval that contains it.
    word = verdict(found, claim.least if claim.effect is None else min(claim.least, claim.effect))
    if word == REPRODUCED and claim.source == NOT_IN_PAPER:
        word = HOLDS
    return {
        "name": claim.name,
        "better": claim.better,
        "worse": claim.worse,
        "more": claim.more,
        "source": claim.source,
        "paper": claim.paper,
        "effect": claim.effect,
        "added": claim.added,
        "metric": claim.metric or comparison.study.metric,
        "against": claim.against,
        "match": list(comparison.study.match if claim.match is None else claim.match),
        "expected": list(claim.expected),
        "least": claim.least,
        "within": claim.within and list(claim.within),
        # Of `better` and `worse`.
        "means": [_numbers(interval([*side.values()])) if side else None for side in values],
        "difference": _numbers(found),  # above 0: `better` is better
        "verdict": INCONCLUSIVE if doubts else word,
        "minutes": sum(record["minutes"] for record in _records(comparison, *claim.entries)),
        "doubts": [] if found is None else doubts,
        "remarks": ["not run"] if found is None else _remarks(comparison, claim),
    }


def _doubts(comparison: Comparison, claim: Claim, values: list[dict[int, float]]) -> list[str]:
    """Why a difference decides nothing, whatever its interval is."""
    pairs = len(values[0].keys() & values[1].keys())
    doubts = [f"fewer than {PAIRS} seeds"] if pairs < PAIRS else []
    # A run that failed is evidence too, so the others alone must not decide.
    for name, side in zip((claim.better, claim.worse), values, strict=True):
        if missing := [str(seed) for seed in comparison.seeds if seed not in side]:
            doubts.append(f"{name} has no value with seed {', '.join(missing)}")
    if claim.within is not None and all(values):
        means = [sum(side.values()) / len(side) for side in values]
        if max(means) <= claim.within[0]:
            doubts.append("neither of the two has learned the task")
        if min(means) >= claim.within[1]:
            doubts.append("the task is too easy for both")
        pairs_of_runs = [[side[seed] for side in values] for seed in values[0] if seed in values[1]]
        ends = sum(max(p) <= claim.within[0] or min(p) >= claim.within[1] for p in pairs_of_runs)
        # Such pairs differ by nearly nothing, and would only make the interval narrower.
        if not doubts and pairs - ends < PAIRS:
            words = f"with {ends} of {pairs} seeds, both have learned the task wholly, or both not "
            doubts.append(f"{words}at all: fewer than {PAIRS} seeds are left")
    found = paired(*values)
    if not doubts and found is not None and all_equal(found):
        doubts.append("the difference is the same with each seed, so its spread is not known")
    return list(dict.fromkeys(doubts))


def _remarks(comparison: Comparison, claim: Claim) -> list[str]:
    """What a reader must know before he believes a difference."""
    remarks = []
    for name in claim.entries:
        if len(comparison.rates) > 1 and not comparison.swept(name):
            remarks.append(f"the sweep of learning rates of {name} has not ended")
    if len(comparison.rates) == 1:
        remarks.append("learning rates not swept")
    for name in claim.entries:
        if (edge := comparison.at_edge(name)) is not None:
            remarks.append(f"the best learning rate of {name} is the {edge} of those tried")
    better, worse = (comparison.twins[name] for name in (claim.better, claim.worse))
    # In small models, embeddings are much of a model. Entries of one width have the same.
    totals = [accounting.parameters(config.model).total for config in (better, worse)]
    if abs(totals[1] / totals[0] - 1) > TOLERANCE:
        remarks.append(f"with embeddings they have {totals[0]:,} and {totals[1]:,} parameters")
    if better.data != worse.data:
        remarks.append("the two entries see different batches")
    records = _records(comparison, *claim.entries)
    if without := sum(not record["clock"] for record in records):
        remarks.append(f"runs whose minutes are only those of their last process: {without}")
    return remarks + _origin(records)


def _origin(records: Iterable[Mapping]) -> list[str]:
    """Remarks about runs that other code, devices or versions have made."""
    code = distinct(about for record in records for about in record["code"])
    revisions = sorted({about["git"] or "not known" for about in code})
    devices = sorted({f"{d['count']} x {d['kind']}" for d in (a["device"] for a in code)})
    remarks = []
    if len(revisions) > 1:
        names = ", ".join(map(short_revision, revisions))
        remarks.append(f"{len(revisions)} revisions of the code: {names}")
    if any(name.endswith("+dirty") for name in revisions):  # two of one name may differ too
        remarks.append("the code had changes that were not committed")
    if len(devices) > 1:
        remarks.append(f"{len(devices)} devices: {', '.join(devices)}")
    versions = [{"python": about["python"], **about["packages"]} for about in code]
    for name in versions[0] if versions else ():
        found = sorted({str(version.get(name)) for version in versions})
        if len(found) > 1:
            remarks.append(f"{len(found)} versions of {name}: {', '.join(found)}")
    return remarks


def short_revision(name: str) -> str:
    """The first 10 digits of a commit, and +dirty if the code had other changes."""
    return re.sub(r"^([0-9a-f]{10})[0-9a-f]+", r"\1", name)


def _numbers(found: Interval | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {**found._asdict(), "smallest_effect": smallest_effect(found)}
