"""Trains the runs of a study, one after the other, and reads what they gave (findings.py compares).

A run has an ordinary workdir: FOLDER/ENTRY/lr=RATE,seed=SEED. The seed is that of the parameters
and of the order of the data. So all entries see the same batches with the same seed, and their
differences are paired. If the study has several learning rates, every entry first runs at each of
them with the seed SWEEP, which then does not count: the best of several runs was lucky too. The
seeds that count run at the best rate.

The record of a run is what its workdir says: `summary`, `evaluation` (the result of each task of
the study), `curve` (validation), `training` (thinned), `minutes`, and where it came from. A metric
of a study is a dotted path in it, such as summary.val_bpb or evaluation.hops.results.0.accuracy;
`with_gains` adds some numbers. So a comparison that was killed finds the runs that have ended, and
goes on. That may take days, so other code, devices or versions are no error: remarks say where
numbers come from several of them.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from yocou_jax.config import Config
from yocou_jax.errors import UserError, shown
from yocou_jax.files import write_atomically
from yocou_jax.manifest import CODE
from yocou_jax.manifest import FILE as MANIFEST
from yocou_jax.manifest import read as read_manifest
from yocou_jax.study import AXES, Study, twins, with_fields
from yocou_jax.training import metrics
from yocou_jax.training.resume import FREE_FIELDS
from yocou_jax.trees import differences, flat

SWEEP = 0  # the seed with which learning rates are tried
POINTS = 64  # at most, of a curve of the training loss in a record
# Fields that may differ from those of a run that has ended, because its result does not change.
IGNORED = tuple(name for name in FREE_FIELDS if name != "data.validation_sequences")


class RunFailed(Exception):
    """A run has ended with an error. The comparison goes on without it."""


class Spec(NamedTuple):
    """One run of a study."""

    entry: str
    rate: float
    seed: int
    config: Config
    workdir: Path

    @property
    def name(self) -> str:
        return f"{self.entry} lr={self.rate:g} seed={self.seed}"

    @property
    def log(self) -> Path:
        """A file for what the processes of the run print."""
        return self.workdir.with_name(f"{self.workdir.name}.log")

    @property
    def clock(self) -> Path:
        """A file with the seconds that all processes of the run took, evaluations too. Absent if
        nobody has measured them."""
        return self.workdir.with_name(f"{self.workdir.name}.seconds")

    @property
    def seconds(self) -> float:
        """What `clock` says. 0 if it is absent."""
        with contextlib.suppress(FileNotFoundError):
            return float(self.clock.read_text(encoding="utf-8"))
        return 0.0

    @property
    def failure(self) -> Path:
        """A file that says why the run failed the last time. Absent if it did not."""
        return self.workdir.with_name(f"{self.workdir.name}.failed")


def overrides(fields: ConfigDict, config: Config) -> list[str]:
    """The flags that turn the settings of a config file into `config`.

    fields: a new result of its get_config(). It is changed, because a field may follow another.
    """
    flags = []
    for name, value in flat(config.to_dict()).items():
        group, field = name.split(".")
        if fields[group][field] != value:
            fields[group][field] = value
            flags.append(f"--config.{name}={'none' if value is None else value}")
    return flags


class Comparison:
    """The runs of a study.

    study: what to compare. base: the settings of its reference. folder: for all workdirs. seeds:
    how many, instead of study.seeds.

    Raises UserError if entries do not match (study.twins), or if a workdir has a run with other
    settings. It does so too if a run that has ended has no value for a metric of the study, at once
    or when `record` reads the run: the path has a mistake, and no other run would have a value.
    """

    def __init__(self, study: Study, base: Config, folder: Path, seeds: int | None = None):
        self.study, self.folder = study, folder
        self.twins = twins(study, base)
        self.rates = tuple(sorted({*study.learning_rates})) or (base.optimizer.learning_rate,)
        count, first = study.seeds if seeds is None else seeds, SWEEP + (len(self.rates) > 1)
        self.seeds = range(first, first + count)  # those that count
        self.records: dict[Path, dict] = {}  # of the runs that have ended, by their workdirs
        self._specs = {
            key: self._make(*key)
            for key in itertools.product(self.twins, self.rates, sorted({SWEEP, *self.seeds}))
        }
        for spec in self._specs.values():
            _check_settings(spec)
            self.record(spec)

    def _make(self, entry: str, rate: float, seed: int) -> Spec:
        fields = {"optimizer.learning_rate": rate, "run.seed": seed, "data.seed": seed}
        workdir = self.folder / entry / f"lr={rate:g},seed={seed}"
        return Spec(entry, rate, seed, with_fields(self.twins[entry], fields), workdir)

    def spec(self, entry: str, rate: float, seed: int) -> Spec:
        return self._specs[entry, rate, seed]

    def record(self, spec: Spec) -> dict | None:
        """What a run gave. None if its training has not ended. An evaluation may still be missing.

        Raises UserError if it has read another text than a run that should have read the same.
        """
        found = self.records.get(spec.workdir)
        if found is None or self._missing(found):
            found = _read(spec, self.study.evaluations)
            if found is None:
                return None
            self._check_text(spec, found)
            self._check_metrics(spec, found)
            self.records[spec.workdir] = found
        return found

    def _missing(self, record: dict) -> list[str]:
        return [task for task in self.study.evaluations if task not in record["evaluation"]]

    def has_ended(self, spec: Spec) -> bool:
        """Whether nothing is left to do for a run: neither training nor an evaluation."""
        record = self.record(spec)
        return record is not None and not self._missing(record)

    def _check_text(self, spec: Spec, record: dict) -> None:
        data = dataclasses.replace(spec.config.data, seed=0)
        for other in self._specs.values():
            found = self.records.get(other.workdir)
            if found is None or dataclasses.replace(other.config.data, seed=0) != data:
                continue
            for key in ("corpus", "tokenizer"):
                one, two = (r["environment"][key] for r in (record, found))
                if one != two:
                    raise UserError(
                        f"The runs in {spec.workdir} and {other.workdir} cannot be compared: the "
                        f"{key} of one is {shown(str(one))}, that of the other {shown(str(two))}. "
                        "(Another Python has another standard library.) Remove one of them, and "
                        "make it again."
                    )

    def _check_metrics(self, spec: Spec, record: dict) -> None:
        """Raises UserError if the path of a metric that is asked of the run leads to no number."""
        if self._missing(record):
            return
        claims = [c for c in self.study.claims if spec.entry in c.entries]
        for metric in {self.study.metric, *(path for claim in claims for path in claim.metrics)}:
            try:
                found = look_up(with_gains(record), metric)
            except LookupError as error:
                raise UserError(
                    f"The run in {spec.workdir} has ended, but it has no metric {metric}: "
                    f"{error.args[0]}."
                ) from None
            if found is not None and not isinstance(found, int | float):
                raise UserError(
                    f"The metric {metric} of the run in {spec.workdir} is not a number: "
                    f"{shown(str(found))}."
                )

    def value(self, spec: Spec, metric: str | None = None) -> float | None:
        """A metric of a run. None if the run has not ended, or if the number is not finite."""
        try:
            record = with_gains(self.record(spec) or {})
            found = look_up(record, metric or self.study.metric)
        except LookupError:
            return None
        return float(found) if isinstance(found, int | float) else None

    def values(self, entry: str, metric: str | None = None) -> dict[int, float]:
        """The metric of the runs at the best rate that have ended, by seed."""
        rate = self.best_rate(entry)
        specs = [] if rate is None else [self.spec(entry, rate, seed) for seed in self.seeds]
        found = {spec.seed: self.value(spec, metric) for spec in specs}
        return {seed: value for seed, value in found.items() if value is not None}

    def sweep(self, entry: str) -> dict[float, float | None]:
        """The metric of each learning rate that must be tried, if there are several.

        The first ones are the middle one and its neighbors. When all have ended, and the best of
        them is the last on its side, the next one on this side must be tried too. If none has a
        result, they were too high.
        """
        if len(self.rates) == 1:
            return {}
        middle = (len(self.rates) - 1) // 2
        low, high = max(middle - 1, 0), min(middle + 1, len(self.rates) - 1)
        while True:
            rates = self.rates[low : high + 1]
            found = {rate: self.value(self.spec(entry, rate, SWEEP)) for rate in rates}
            ended = all(self._tried(entry, rate) for rate in rates)
            values = {rate: value for rate, value in found.items() if value is not None}
            best = min(values, key=lambda rate: values[rate]) if values else rates[0]
            if not ended:
                return found
            if best == rates[0] and low > 0:
                low -= 1
            elif best == rates[-1] and high < len(self.rates) - 1:
                high += 1
            else:
                return found

    def _tried(self, entry: str, rate: float) -> bool:
        """Whether the run of the sweep has ended, or has failed."""
        spec = self.spec(entry, rate, SWEEP)
        return self.has_ended(spec) or spec.failure.exists()

    def swept(self, entry: str) -> bool:
        """Whether all rates were tried that must be, each to its end or until it failed."""
        rates = self.sweep(entry)
        return bool(rates) and all(self._tried(entry, rate) for rate in rates)

    def best_rate(self, entry: str) -> float | None:
        """The best learning rate of those that have a result, or the only one."""
        if len(self.rates) == 1:
            return self.rates[0]
        found = {rate: value for rate, value in self.sweep(entry).items() if value is not None}
        return min(found, key=lambda rate: found[rate]) if found else None

    def at_edge(self, entry: str) -> str | None:
        """ "lowest" or "highest", if the best of several learning rates is one of these: another
        one, not tried, may be better."""
        if len(self.rates) == 1:
            return None
        ends = {self.rates[0]: "lowest", self.rates[-1]: "highest"}
        return ends.get(self.best_rate(entry) or math.nan)

    def first(self, entry: str) -> Spec:
        """The run of the first seed that counts at the best rate, or at the lowest one if none has
        a result."""
        return self.spec(entry, self.best_rate(entry) or self.rates[0], self.seeds[0])

    def runs(self, only: Iterable[str] = ()) -> Iterator[Spec]:
        """All runs in their order. The rate of the seeds that count is known after the sweep, so
        the runs are looked up one by one. An entry of which no rate has a result has none."""
        entries = list(only) or list(self.twins)
        for entry in entries:
            done: set[float] = set()
            while left := [rate for rate in self.sweep(entry) if rate not in done]:
                done.add(left[0])
                yield self.spec(entry, left[0], SWEEP)
        for seed in self.seeds:
            for entry in entries:
                if (rate := self.best_rate(entry)) is not None:
                    yield self.spec(entry, rate, seed)

    def train(
        self,
        train: Callable[[Spec], None],
        evaluate: Callable[[Spec, str, tuple[str, ...]], None],
        ended: Callable[[Spec], None] = lambda spec: None,
        only: Iterable[str] = (),
    ) -> None:
        """Makes all runs that have not ended, also those that failed before.

        train: makes or resumes one run. evaluate: runs one task on its workdir, with flags. Both
        raise RunFailed if that failed. ended: called after each run that was made here.
        """
        for spec in self.runs(only):
            if self.has_ended(spec):
                continue
            spec.workdir.parent.mkdir(parents=True, exist_ok=True)
            try:
                if not (spec.workdir / "summary.json").exists():
                    if not (spec.workdir / MANIFEST).exists():
                        spec.clock.unlink(missing_ok=True)  # of a run that somebody has removed
                    train(spec)
                for task, flags in self.study.evaluations.items():
                    if _evaluation(spec, task, flags) is None:
                        evaluate(spec, task, flags)
                spec.failure.unlink(missing_ok=True)
            except RunFailed as failure:
                write_atomically(spec.failure, f"{failure}\n")
            ended(spec)

    def outcome(self, spec: Spec) -> str:
        """What a run gave, in words."""
        if spec.failure.exists():
            return f"failed: {spec.failure.read_text(encoding='utf-8').strip()}"
        if (record := self.record(spec)) is not None:
            value = self.value(spec)
            number = "not finite" if value is None else f"{value:.4f}"
            return f"{self.study.metric} {number} in {record['minutes']:.1f} minutes"
        return "has not ended"

    def check_entries(self, names: Iterable[str]) -> None:
        """Raises UserError if a name is not that of an entry."""
        for name in names:
            if name not in self.twins:
                raise UserError(
                    f"The study has no entry {shown(name)}; the entries are "
                    f"{', '.join(self.twins)}."
                )

    def minutes(self, spec: Spec) -> float | None:
        """How long a run will take: its FLOPs, at the mean speed of the runs that have ended. None
        if none has."""
        done = self.records.values()
        flops = sum(record["summary"]["train_flops"] for record in done)
        minutes = sum(record["minutes"] for record in done)
        return AXES["flops"].amount(spec.config) / flops * minutes if flops else None


# --- Files ----------------------------------------------------------------------------------------


def look_up(record: Mapping, path: str) -> Any:
    """The value at a dotted path. Raises LookupError with the names where the path ends."""
    found: Any = record
    keys = path.split(".")
    for number, key in enumerate(keys):
        if isinstance(found, list | tuple):
            found = {str(n): value for n, value in enumerate(found)}
        names = list(found) if isinstance(found, Mapping) else []
        if key not in names:
            there = ".".join(keys[:number]) or "the record"
            raise LookupError(f"{there} has {', '.join(names) or 'no names'}, and not {key}")
        found = found[key]
    return found


def with_gains(record: Mapping) -> Mapping:
    """The record, with what a longer text before them is worth to the last tokens (Figure 4 of the
    paper): gain_L in the scalars of the task perplexity, which is the loss with the fewest tokens
    that the model saw, minus that with L tokens. Records do not store it, as it follows from them.
    """
    task = record.get("evaluation", {}).get("perplexity", {})
    start, scalars = "nats_seeing_", task.get("scalars", {})
    seen = {int(n.removeprefix(start)): v for n, v in scalars.items() if n.startswith(start)}
    if not seen:
        return record
    first = seen[min(seen)]
    gains = {
        f"gain_{tokens}": None if None in (first, nats) else first - nats
        for tokens, nats in seen.items()
    }
    tasks = record["evaluation"] | {"perplexity": {**task, "scalars": {**scalars, **gains}}}
    return {**record, "evaluation": tasks}


def given_flags(evaluation: Mapping) -> set[str]:
    """The flags with which a task has made its report, without those that say which task it is, and
    of which run."""
    words = [word for word in shlex.split(evaluation["command"]) if word.startswith("--")]
    return {word for word in words if not word.startswith(("--workdir=", "--task="))}


def _evaluation(spec: Spec, task: str, flags: Iterable[str]) -> dict | None:
    """The report of a task. None if there is none, or if it is one of other flags or of a step
    before the last."""
    try:
        found = json.loads((spec.workdir / f"evaluation/{task}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    # Somebody may have measured an earlier checkpoint while the run was training.
    same = given_flags(found) == set(flags) and found["step"] == spec.config.run.steps
    return found if same else None


def _check_settings(spec: Spec) -> None:
    before = read_manifest(spec.workdir) if (spec.workdir / MANIFEST).exists() else None
    settings = flat(spec.config.to_dict())
    if before and (changed := differences(flat(before["config"]), settings, IGNORED)):
        raise UserError(
            f"The workdir {spec.workdir} has a run with other settings: {'; '.join(changed)}. Give "
            "the old values, or another --workdir."
        )


def _read(spec: Spec, tasks: Mapping[str, tuple[str, ...]]) -> dict[str, Any] | None:
    try:
        summary = json.loads((spec.workdir / "summary.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    reports = {task: _evaluation(spec, task, flags) for task, flags in tasks.items()}
    manifest = read_manifest(spec.workdir) or {}
    rows = metrics.read_metrics(spec.workdir / "metrics.jsonl")
    return {
        "learning_rate": spec.rate,
        "seed": spec.seed,
        "workdir": str(spec.workdir),
        "environment": {key: manifest.get(key) for key in (*CODE, "corpus", "tokenizer")},
        "code": _code(manifest, reports.values()),
        # wall_s is of the last process only. Without a clock (a run that was made by hand), and
        # after a resume, it is less than what the run took.
        "minutes": max(spec.seconds, summary["wall_s"]) / 60,
        "clock": spec.clock.exists(),
        "resumes": len(manifest.get("resumes", [])),
        "summary": summary,
        "evaluation": {task: found for task, found in reports.items() if found is not None},
        "curve": _points(rows, metrics.VAL_BPB),
        "training": _thinned(_points(rows, metrics.BPB)),
    }


def _code(manifest: Mapping, reports: Iterable[Mapping | None]) -> list[dict[str, Any]]:
    """Revision, versions and device of every process that worked on a run, each once."""
    before = [resume.get("before") for resume in manifest.get("resumes", [])]
    starts = [start for start in (manifest, *before, *reports) if start and start.get("device")]
    return distinct({key: start.get(key) for key in CODE} for start in starts)


def distinct(values: Iterable[Any]) -> list:
    """Each value once, in order. They need no hash."""
    found: list = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def _points(rows: list[dict], metric: str) -> list[tuple[float, float]]:
    """(tokens, value) of the rows that have the metric."""
    return [(row[metrics.TOKENS], row[metric]) for row in rows if row.get(metric) is not None]


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS points: means of neighbors, at the token count of the last of them."""
    size = math.ceil(len(points) / POINTS) or 1
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]
