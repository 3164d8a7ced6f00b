"""A study: programs that are trained under a stated match, and what was expected of them.

A file in configs/studies/ has `get_config()` with the settings of the first entry, the reference,
and STUDY, which says how the other entries differ. `twins` finds the sizes with which an entry is
equal to the reference on each axis of its match. All amounts come from accounting.py. No jax.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from yocou_jax import accounting
from yocou_jax.config import FIELDS, Config, unknown_field
from yocou_jax.errors import UserError, shown

TOLERANCE = 0.01  # largest relative difference on an axis on which two entries match
# A comparison sets these fields in each run: an entry cannot have its own, or seeds would not pair.
RATE, SEEDS = "optimizer.learning_rate", ("run.seed", "data.seed")
NOT_IN_PAPER = "not in the paper"  # the source of a claim that only this project makes


# --- Axes -----------------------------------------------------------------------------------------


class Axis(NamedTuple):
    """An amount that two entries can have in common.

    words: what it is. amount: that of a run with a config. field: the size that a twin changes to
    match. units: the size becomes a multiple of the first of them that is fine enough.
    """

    words: str
    amount: Callable[[Config], float]
    field: str
    units: tuple[int, ...] = (1,)


def _parameters(config: Config) -> float:
    return accounting.parameters(config.model).non_embedding


def _tokens(config: Config) -> float:
    return config.run.steps * config.data.batch_size * config.data.sequence_length


def _flops(config: Config) -> float:
    return _tokens(config) * accounting.run_flops_per_token(config)


def _tokens_layers(config: Config) -> float:
    program, draw = config.model.program, config.model.loop_draw
    depth: float = program.depth
    if draw is not None:
        pairs = zip(draw.probabilities, draw.counts, strict=True)
        depth = sum(share * program.with_loops(count).depth for share, count in pairs)
    return _tokens(config) * program.streams * depth


def _kv_bytes(config: Config) -> float:
    return accounting.kv_bytes(config.model, config.data.sequence_length)


# In the order in which a twin is made: the number of updates depends on the other sizes.
AXES = {
    "kv_bytes": Axis("bytes of the KV cache of a training sequence", _kv_bytes, "model.window"),
    # Multiples of 64 and of 8 suit the matrix units of accelerators.
    "parameters": Axis(
        "parameters without embeddings", _parameters, "model.d_ff", units=(64, 8, 1)
    ),
    "tokens": Axis("training tokens", _tokens, "run.steps"),
    "flops": Axis("training FLOPs", _flops, "run.steps"),
    # Section 4.1 of the paper counts FLOPs like this: no attention length, head or embedding.
    "tokens_layers": Axis("training tokens times layers", _tokens_layers, "run.steps"),
}


# --- What a study says ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Entry:
    """One program of a study.

    fields: config fields that differ from `get_config()`, by dotted name; the learning rate and the
    seeds are those of the study. match: the axes on which the entry must match the reference. None:
    those of the study.
    """

    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    match: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Claim:
    """The entry `better` has a lower value of a metric than the entry `worse`, or a higher one.

    source: the table or figure of the paper. expected: the range of the difference that was
    expected before the first run; above 0, the claim holds. least: a smaller difference would not
    matter. match: axes on which the two entries must match, and metric: its path in the record of a
    run (compare.py); None: those of the study. paper: the two values in the paper, of `better`
    first, as words. Empty: it has none. against: the path of the value of `worse`, if it is another
    one: so a claim can compare two numbers of one run. within: the range in which a metric says
    something. If both entries are at or below its start (they have learned nothing), or at or above
    its end (the task is too easy), their difference decides nothing. more: a higher value is
    better. effect: the difference in the paper, in the unit of the metric, if that is known. added:
    the claim was written when results were known, so its expectation is none.
    """

    better: str
    worse: str
    source: str
    expected: tuple[float, float]
    least: float = 0.005
    match: tuple[str, ...] | None = None
    metric: str | None = None
    paper: str = ""
    against: str | None = None
    within: tuple[float, float] | None = None
    more: bool = False
    effect: float | None = None
    added: bool = False

    @property
    def relation(self) -> str:
        """Where the value of `better` is, as seen from that of `worse`."""
        return "above" if self.more else "below"

    @property
    def name(self) -> str:
        """What users type: the two entries, and the end of the path of its own metric; or the
        entry, and the ends of the two paths."""
        end = "" if self.metric is None else f".{self.metric.rpartition('.')[2]}"
        if self.against is not None and self.better == self.worse:
            return f"{self.better}{end}_{self.relation}_{self.against.rpartition('.')[2]}"
        return f"{self.better}_{self.relation}_{self.worse}{end}"

    @property
    def entries(self) -> tuple[str, ...]:
        """The two entries, or the one entry."""
        return tuple(dict.fromkeys((self.better, self.worse)))

    @property
    def metrics(self) -> tuple[str, ...]:
        """The paths that are not those of the study."""
        return tuple(path for path in (self.metric, self.against) if path is not None)


@dataclasses.dataclass(frozen=True)
class Study:
    """What is trained, and what is claimed.

    entries: by name; the first is the reference. match: axes (keys of AXES). seeds: how many runs
    of each entry count. learning_rates: tried with one more seed, from the middle one to both sides
    until the best one has worse neighbors; the seeds that count take the best one. Empty: the rate
    of the config. metric: path in the record of a run; less is better,
    and it chooses the rate. evaluations: tasks of experiments.evaluate, each with its flags, for
    every run. notes: what a reader of the results must know, and the records of the runs do not
    say.
    """

    question: str
    entries: Mapping[str, Entry]
    claims: tuple[Claim, ...] = ()
    match: tuple[str, ...] = ("parameters", "tokens")
    seeds: int = 3
    learning_rates: tuple[float, ...] = ()
    metric: str = "summary.val_bpb"
    evaluations: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    notes: str = ""

    def __post_init__(self):
        if not self.entries:
            raise UserError("A study needs at least one entry, the reference.")
        for name, entry in self.entries.items():
            # It is the name of a folder.
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise UserError(
                    f"The entry {shown(name)} must have a name of letters, digits, '_', '-' and "
                    "'.', that does not begin with '-' or '.'."
                )
            if own := entry.fields.keys() & {RATE, *SEEDS}:
                raise UserError(
                    f"The entry {name} sets {' and '.join(sorted(own))}, but the learning rates "
                    "and the seeds are those of the whole study (learning_rates, seeds)."
                )
            _check_axes(self.match if entry.match is None else entry.match)
        self._check_claims()
        if self.seeds < 1:
            raise UserError(f"seeds={self.seeds} of a study must be at least 1.")
        if not all(0 < rate < math.inf for rate in self.learning_rates):
            raise UserError(
                f"learning_rates={self.learning_rates} of a study must be numbers above 0."
            )

    def _check_claims(self) -> None:
        for claim in self.claims:
            for name in (claim.better, claim.worse):
                if name not in self.entries:
                    raise UserError(
                        f"A claim names {shown(name)}, which is no entry of the study; the entries "
                        f"are {', '.join(self.entries)}."
                    )
            _check_axes(self.match if claim.match is None else claim.match)
        for metric in (self.metric, *(path for claim in self.claims for path in claim.metrics)):
            root, _, rest = metric.partition(".")
            if root == "evaluation" and rest.partition(".")[0] not in self.evaluations:
                raise UserError(
                    f"The metric {shown(metric)} is of a task that the study does not evaluate; "
                    f"its tasks are {', '.join(self.evaluations) or 'none'}."
                )
        for name, count in collections.Counter(claim.name for claim in self.claims).items():
            if count > 1:
                raise UserError(f"The study has {count} claims with the name {name}.")

    @property
    def reference(self) -> str:
        return next(iter(self.entries))


def _check_axes(names: tuple[str, ...]) -> None:
    for name in names:
        if name not in AXES:
            raise UserError(
                f"There is no axis {shown(name)} to match on; the axes are {', '.join(AXES)}."
            )


def check_changes(study: Study, file: Config, base: Config) -> None:
    """Checks that the flags have an effect on all entries.

    file: the settings of `get_config()`. base: the same, changed by flags. Raises UserError if a
    field has changed that the study or one of its entries sets.
    """
    for name in (name for name in FIELDS if _value(file, name) != _value(base, name)):
        start = f"--config.{name} would have no effect"
        if name in SEEDS:
            raise UserError(f"{start}: the seeds are 0, 1, 2, ... (--seeds says how many count).")
        if name == RATE and study.learning_rates:
            raise UserError(
                f"{start}: the study tries several learning rates (--learning_rates gives others)."
            )
        if entries := [e for e, entry in study.entries.items() if name in entry.fields]:
            raise UserError(
                f"{start} on {', '.join(entries)}, because the study sets this field there. Change "
                "it in a copy of the study's file."
            )


# --- Twins ----------------------------------------------------------------------------------------


def _value(config: Config, name: str) -> Any:
    group, field = name.split(".")
    return getattr(getattr(config, group), field)


def with_fields(config: Config, fields: Mapping[str, Any]) -> Config:
    """The config with other values of the fields with these dotted names."""
    tree = config.to_dict()
    for name, value in fields.items():
        if name not in FIELDS:
            raise unknown_field(name)
        group, field = name.split(".")
        tree[group][field] = value
    return Config.from_dict(tree)


def ratios(config: Config, other: Config) -> dict[str, float]:
    """The amount of `config` over that of `other`, on each axis."""
    return {name: axis.amount(config) / axis.amount(other) for name, axis in AXES.items()}


def matched(config: Config, other: Config) -> tuple[str, ...]:
    """The axes on which two configs match."""
    return tuple(n for n, ratio in ratios(config, other).items() if abs(ratio - 1) <= TOLERANCE)


def twins(study: Study, base: Config) -> dict[str, Config]:
    """The config of each entry, with the sizes that its match asks for.

    base: that of `get_config()`. Raises UserError if an entry cannot match the reference, or if two
    entries of a claim do not match on its axes.
    """
    reference = with_fields(base, study.entries[study.reference].fields)
    found = {}
    for name, entry in study.entries.items():
        match = study.match if entry.match is None else entry.match
        config = with_fields(base, entry.fields)
        for axis_name, axis in AXES.items():
            if axis_name in match:
                config = _solve(config, axis, axis.amount(reference))
        _check_match(study.reference, reference, name, config, match)
        found[name] = config
    for claim in study.claims:
        match = study.match if claim.match is None else claim.match
        _check_match(claim.better, found[claim.better], claim.worse, found[claim.worse], match)
    return found


def _solve(config: Config, axis: Axis, wanted: float) -> Config:
    """The config with the size of `axis.field` that comes nearest to the amount. Every amount is a
    linear function of its size. Returns the config as it is if no size comes near enough."""

    def sized(size: int) -> Config:
        return with_fields(config, {axis.field: size})

    size, now = _value(config, axis.field), axis.amount(config)
    slope = (axis.amount(sized(2 * size)) - now) / size
    if now == wanted or slope == 0:
        return config
    exact = size + (wanted - now) / slope
    for unit in axis.units:
        near = sized(max(unit, round(exact / unit) * unit))
        if abs(axis.amount(near) / wanted - 1) <= TOLERANCE:
            return near
    return config


def _check_match(name: str, config: Config, other_name: str, other: Config, match) -> None:
    for axis in match:
        first, second = AXES[axis].amount(config), AXES[axis].amount(other)
        if abs(second / first - 1) > TOLERANCE:
            raise UserError(
                f"{other_name} cannot be compared with {name} at equal {AXES[axis].words}: "
                f"{second:,.6g} and {first:,.6g}, a ratio of {second / first:.3f}. The two may "
                f"differ by {TOLERANCE:.0%}; a twin changes only {AXES[axis].field}."
            )
