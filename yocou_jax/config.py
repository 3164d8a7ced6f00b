"""Frozen, validated settings, built once from the ConfigDict of a file in configs/.

`configs/base.py` lists every field with its default and its unit or reason. The classes here only
say which values are possible: the type of each field, and its range or its set of values. A config
that breaks a rule gets one sentence (UserError).
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections.config_dict import ConfigDict, RequiredValueError

from yocou_jax.errors import UserError, shown
from yocou_jax.loops import MAX_COUNTS, LoopDraw
from yocou_jax.program import Program

# The names in pallas_kernels/attention/api.py; a test compares them. They are not imported from
# there, because that loads jax. What only counts (this file, program.py, accounting.py) must start
# fast, and must not occupy a device that another process uses.
ATTENTION = ("auto", "pallas_tpu", "pallas_gpu", "triton", "cudnn", "xla", "reference")

PROFILE_FROM = 10  # steps before a trace begins: the first ones compile and warm up

MAX_INT32 = 2**31 - 1  # the largest counter or position on a device
MAX_SIZE = 2**20  # the largest width: 64 bits hold a count of the product of two
MAX_TEXT = 4096  # characters, as in a path; Python does not read longer integers
MAX_LONG_TEXT = 16_384  # characters of a prompt, or of a mixture of many globs
MAX_LAYERS, MAX_LOOPS, MAX_STREAMS = 10_000, 10_000, 1024

HOPS = re.compile(r"(?<![\w/])hops\([\w=, ]*\)(?![\w.])")  # in a data source; not in a path

Fields = Mapping[str, Any] | ConfigDict  # a ConfigDict is not a subclass of Mapping


def _require(ok: bool, sentence: str):
    if not ok:
        raise UserError(sentence)


# --- What one field may be ------------------------------------------------------------------------
# Each function returns a field without a default. The metadata of the field has a rule. A rule
# takes a value and returns what is wrong with it (the end of a sentence), or None. `resume` says
# whether the field may change when a run is resumed:
#   None  it may not.
#   FREE  it may, because it does not change the updates, only how a run is computed, measured,
#         shown, saved or split. data.validation_sequences is FREE too: it changes the validation
#         loss that is reported, because other text is measured, but not the parameters.
#   END   it says when and how a run ends, and may change if no past update depends on it.

FREE, END = "free", "end"


def number(
    low: float,
    high: float,
    *,
    above: bool = False,
    below: bool = False,
    resume: str | None = None,
    default: Any = dataclasses.MISSING,
) -> Any:
    """A field from `low` to `high`. `above` excludes `low` itself, and `below` excludes `high`.
    default: for Python code that makes a mesh. A config always has every field."""

    def rule(value: float) -> str | None:
        if value != value:  # NaN; math.isnan cannot read large integers
            return "must be a number"
        if value < low or (above and value == low):
            return f"must be {'more than' if above else 'at least'} {low}"
        if value > high or (below and value == high):
            return f"must be {'less than' if below else 'at most'} {high}"
        return None

    return dataclasses.field(default=default, metadata={"rule": rule, "resume": resume})


def truth(*, resume: str | None = None) -> Any:
    """A field that is True or False."""
    return dataclasses.field(metadata={"resume": resume})


def one_of(*choices: str, resume: str | None = None) -> Any:
    """A field with one of `choices` as its value."""

    def rule(value: str) -> str | None:
        return None if value in choices else f"is not one of {', '.join(choices)}"

    return dataclasses.field(metadata={"rule": rule, "resume": resume})


def text(*, empty: bool = False, longest: int = MAX_TEXT, resume: str | None = None) -> Any:
    """A field with a text that a file or a terminal can hold. It may be empty only with `empty`."""

    def rule(value: str) -> str | None:
        if not empty and not value.strip():
            return "must not be empty"
        if len(value) > longest:
            return f"has {len(value)} characters; it must have at most {longest}"
        if "\0" in value:
            return "must not contain NUL characters"
        try:
            value.encode()
        except UnicodeEncodeError:
            return (
                "must be valid Unicode; if the locale of your terminal is not UTF-8, set "
                "LC_ALL=C.UTF-8"
            )
        return None

    return dataclasses.field(metadata={"rule": rule, "resume": resume})


def loop_counts() -> Any:
    """A field with one loop count, or with a text of several, from which training draws."""
    count = number(1, MAX_LOOPS).metadata["rule"]

    def rule(value: int | str) -> str | None:
        if isinstance(value, int):
            return count(value)
        return (
            None
            if LoopDraw.parse(value)
            else (
                f"must be a whole number, 2 to {MAX_COUNTS} different ones from 1 to 9999 such as "
                f"'1,2,3,5', or 'poisson(3)' with a mean from 2 to {MAX_COUNTS // 2}"
            )
        )

    return dataclasses.field(metadata={"rule": rule})


def weights() -> Any:
    """A field with a text of numbers from 0 to 1000, the last one above 0. It may be empty."""

    def rule(value: str) -> str | None:
        try:
            found = _numbers(value)
        except ValueError:
            found = (math.nan,)
        if all(0 <= weight <= 1000 for weight in found) and (not found or found[-1] > 0):
            return None
        return "must be numbers from 0 to 1000 such as '0.1,0.2,1', the last one above 0"

    return dataclasses.field(metadata={"rule": rule})


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(",")) if text else ()


def _check_fields(config) -> None:
    """Applies the rule of each field. Raises UserError for the first value that breaks one."""
    group = type(config).__name__.removesuffix("Config").lower()
    for field in dataclasses.fields(config):
        value, rule = getattr(config, field.name), field.metadata.get("rule")
        if rule is not None and value is not None and (wrong := rule(value)):
            raise UserError(f"{group}.{field.name}={shown(value)} {wrong}.")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of one model. configs/base.py says what each field means."""

    architecture: str = text()
    num_layers: int = number(1, MAX_LAYERS)
    num_loops: int | str | None = loop_counts()
    vocab_size: int = number(1, 10_000_000)
    d_model: int = number(1, MAX_SIZE)
    num_heads: int = number(1, 65_536)
    num_kv_heads: int = number(1, 65_536)
    head_dim: int = number(2, 65_536)
    d_ff: int = number(1, MAX_SIZE)
    window: int = number(1, 2**30)
    rope_theta: float = number(1, 1e12)
    cross_rope: bool = truth()
    qk_norm: bool = truth()
    norm_eps: float = number(1e-30, 1)
    tie_embeddings: bool = truth()
    num_experts: int = number(0, 65_536)
    experts_per_token: int = number(1, 65_536)
    num_shared_experts: int = number(0, 1024)
    expert_width: int = number(1, MAX_SIZE)
    load_balance_weight: float = number(0, 1000)
    router_z_weight: float = number(0, 1000)
    prefix_length: int = number(0, 65_536)
    gate_floor: float = number(0, 1, below=True)

    def __post_init__(self):
        _check_fields(self)
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"model.num_heads={self.num_heads} must be a multiple of "
            f"model.num_kv_heads={self.num_kv_heads}: each K/V head serves the same number of "
            "query heads.",
        )
        _require(
            self.head_dim % 2 == 0,
            f"model.head_dim={self.head_dim} must be even: RoPE rotates pairs.",
        )
        _require(
            not self.num_experts or self.experts_per_token <= self.num_experts,
            f"model.experts_per_token={self.experts_per_token} is more than "
            f"model.num_experts={self.num_experts}.",
        )
        # An impossible program is an error here, not only at the first step.
        program = self.program
        loops = max(stage.num_loops for stage in program.stages)
        for count, most, what in (
            (program.layers, MAX_LAYERS, "layers"),
            (loops, MAX_LOOPS, "loops"),
            (program.streams, MAX_STREAMS, "streams"),
        ):
            _require(
                count <= most,
                f"model.architecture={shown(self.architecture)} has {shown(count)} {what}; there "
                f"can be at most {most}.",
            )

    @classmethod
    def from_dict(cls, fields: Fields) -> "ModelConfig":
        """Builds this group only. `Config.from_dict` builds all groups."""
        return _build(cls, fields, "model.")

    @property
    def residual_scale(self) -> float:
        """Factor of the initial output matrix of each sublayer: 1 / sqrt(2 depth), as in GPT-2. So
        the variance of the residual stream does not grow with the depth, loops counted."""
        return (2 * self.program.depth) ** -0.5

    @property
    def kv_prefix(self) -> int:
        """Number of learned keys and values before those of a full layer (ParScale); 0 without
        parallel streams."""
        return self.prefix_length if self.program.streams > 1 else 0

    @property
    def loop_draw(self) -> LoopDraw | None:
        """What each training step draws its loop count from. None: it has those of `program`."""
        return LoopDraw.parse(self.num_loops) if isinstance(self.num_loops, str) else None

    @property
    def program(self) -> Program:
        program = Program.from_architecture(self.architecture, self.num_layers)
        if draw := self.loop_draw:
            return program.with_loops(draw.own_count(program.loop_counts))
        return program.with_loops(self.num_loops) if isinstance(self.num_loops, int) else program


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How a model runs. This does not change what the parameters of a checkpoint mean."""

    dtype: str = one_of("auto", "float32", "bfloat16")
    attention: str = one_of(*ATTENTION, resume=FREE)
    remat: str = one_of("none", "attention", "full", resume=FREE)
    unroll: int = number(0, 1000, resume=FREE)
    scan: bool = truth(resume=FREE)

    def __post_init__(self):
        _check_fields(self)

    @classmethod
    def from_dict(cls, fields: Fields) -> "ComputeConfig":
        """Builds this group only. `Config.from_dict` builds all groups."""
        return _build(cls, fields, "compute.")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    name: str = one_of("adamw", "muon")
    # The smallest positive value is 1e-30: float32 on the device rounds smaller ones to 0.
    learning_rate: float = number(1e-30, 1000)
    schedule: str = one_of("cosine", "wsd", "constant", resume=END)
    warmup_steps: int = number(0, MAX_INT32)
    decay_fraction: float = number(0, 1, above=True, resume=END)
    final_fraction: float = number(0, 1, resume=END)
    # float32 rounds 1 - 1e-8 to 1, and the bias correction would divide by 0.
    beta1: float = number(0, 0.999_999)
    beta2: float = number(0, 0.999_999)
    momentum: float = number(0, 0.999_999)
    eps: float = number(1e-30, 1)
    weight_decay: float = number(0, 1000)
    clip_norm: float = number(1e-30, 1e12)
    z_loss: float = number(0, 1000)
    loop_loss: str = weights()
    backprop_loops: int | None = number(1, MAX_LOOPS)
    accumulation_steps: int = number(1, MAX_SIZE)
    max_skipped_updates: int = number(1, 2**30, resume=FREE)

    def __post_init__(self):
        _check_fields(self)

    @property
    def loop_weights(self) -> tuple[float, ...]:
        """Weights of the losses after each loop. Empty: there is only the loss after the last."""
        return _numbers(self.loop_loss)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    source: str = text(longest=MAX_LONG_TEXT)
    text_field: str = text()
    bad_rows: str = one_of("refuse", "skip")
    tokenizer: str = text()
    end_of_text: str = text(empty=True)
    allow_lossy_tokenizer: bool = truth()
    vocab_size: int = number(1, 10_000_000)
    packing: bool = truth()
    batch_size: int = number(1, MAX_SIZE)
    sequence_length: int = number(1, 2**24)
    validation_fraction: float = number(0, 1, above=True, below=True)
    validation_sequences: int = number(1, MAX_INT32, resume=FREE)
    seed: int = number(0, MAX_INT32)  # parts of a mixture take the next ones, below 2^32
    cache_dir: str = text(resume=FREE)
    verify: bool = truth(resume=FREE)

    def __post_init__(self):
        _check_fields(self)
        tokens = self.batch_size * self.sequence_length
        _require(
            tokens <= MAX_INT32,
            f"data.batch_size={self.batch_size} times data.sequence_length={self.sequence_length} "
            f"is {tokens} tokens; a batch can have at most {MAX_INT32}.",
        )
        _require(
            self.tokenizer != "bpe" or not HOPS.search(self.source),
            f"data.source={shown(self.source)} has hops(...), in which each letter must be a token "
            "of its own: set data.tokenizer=bytes.",
        )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int = number(-1, MAX_SIZE, resume=FREE, default=1)
    fsdp: int = number(-1, MAX_SIZE, resume=FREE, default=1)
    tensor: int = number(-1, MAX_SIZE, resume=FREE, default=1)
    context: int = number(-1, MAX_SIZE, resume=FREE, default=1)
    expert: int = number(-1, MAX_SIZE, resume=FREE, default=1)

    def __post_init__(self):
        _check_fields(self)
        sizes = dataclasses.asdict(self)
        _require(
            0 not in sizes.values() and list(sizes.values()).count(-1) <= 1,
            f"mesh {sizes} needs sizes of at least 1, and at most one -1 (the devices left).",
        )


@dataclasses.dataclass(frozen=True)
class RunConfig:
    steps: int = number(1, MAX_INT32, resume=END)
    seed: int = number(0, 2**32 - 1)  # jax.random.key uses 32 bits and drops the others
    log_every: int = number(1, MAX_INT32, resume=FREE)
    eval_every: int = number(1, MAX_INT32, resume=FREE)
    analysis: bool = truth(resume=FREE)
    sample_every: int = number(1, MAX_INT32, resume=FREE)
    sample_prompt: str = text(empty=True, longest=MAX_LONG_TEXT, resume=FREE)
    sample_tokens: int = number(1, MAX_SIZE, resume=FREE)
    checkpoint_every: int = number(1, MAX_INT32, resume=FREE)
    keep_checkpoints: int = number(2, MAX_INT32, resume=FREE)
    profile_steps: int = number(0, MAX_INT32, resume=FREE)

    def __post_init__(self):
        _check_fields(self)
        _require(
            not self.profile_steps or PROFILE_FROM + self.profile_steps <= self.steps,
            f"run.profile_steps={self.profile_steps} steps cannot be traced: the trace begins "
            f"after step {PROFILE_FROM}, and the run has run.steps={self.steps}.",
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run. Each field is checked first, then rules about several fields."""

    model: ModelConfig
    compute: ComputeConfig
    optimizer: OptimizerConfig
    data: DataConfig
    mesh: MeshConfig
    run: RunConfig

    def __post_init__(self):
        data, optimizer = self.data, self.optimizer
        _require(
            data.batch_size % optimizer.accumulation_steps == 0,
            f"data.batch_size={data.batch_size} does not divide into "
            f"optimizer.accumulation_steps={optimizer.accumulation_steps} microbatches.",
        )
        _require(
            optimizer.warmup_steps < self.run.steps or optimizer.schedule == "constant",
            f"optimizer.warmup_steps={optimizer.warmup_steps} leaves no step of "
            f"run.steps={self.run.steps} at the full learning rate.",
        )
        _require(
            not (data.packing and self.model.program.streams > 1),
            "data.packing=True cannot be used with a program of parallel streams: the learned "
            "K/V prefix has no segment.",
        )
        self._check_loops()

    def _check_loops(self):
        model, optimizer, program = self.model, self.optimizer, self.model.program
        if optimizer.backprop_loops is not None:
            _require(
                program.loop_counts != [],
                f"optimizer.backprop_loops={optimizer.backprop_loops} needs a looped stage, but "
                f"the program is {shown(str(program))}.",
            )
            most = max(model.loop_draw.counts if model.loop_draw else program.loop_counts)
            _require(
                optimizer.backprop_loops <= most,
                f"optimizer.backprop_loops={optimizer.backprop_loops} is more than the {most} "
                "loops of the model; none means all of them.",
            )
        if not (weights := optimizer.loop_weights):
            return
        given = f"optimizer.loop_loss={shown(optimizer.loop_loss)}"
        looped = [stage for stage in program.stages if stage.loops is not None]
        _require(
            len(looped) == 1,
            f"{given} needs a program with one looped stage, not {shown(str(program))}.",
        )
        _require(
            model.loop_draw is None,
            f"{given} has a weight for each loop, so it needs one loop count, not "
            f"model.num_loops={shown(model.num_loops)}.",
        )
        _require(
            len(weights) == looped[0].num_loops,
            f"{given} has {len(weights)} weights, but the stage {shown(str(looped[0]))} runs "
            f"{looped[0].num_loops} times.",
        )
        _require(
            optimizer.backprop_loops is None,
            f"{given} cannot be combined with optimizer.backprop_loops="
            f"{optimizer.backprop_loops}: each loss would have other last loops.",
        )

    @classmethod
    def from_dict(cls, fields: Fields) -> "Config":
        """Builds the settings from a ConfigDict (or nested dicts) that has every field."""
        return _build(cls, fields, "")

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return dataclasses.asdict(self)


# Fields that are newer than some settings in files, with the value that says what was done before.
ADDED = {
    "compute": {"unroll": 0},  # all stages were loops
    "optimizer": {"loop_loss": "", "backprop_loops": None},
    "data": {"verify": False},
    "mesh": {"context": 1, "expert": 1},
    "run": {"analysis": False},
}


def migrated_fields(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings of any version of this code, with the groups and fields of this version.

    Before version 3 of exported folders there was no group `compute`, and its fields were in
    `model`. Fields of ADDED are added. Newer settings are returned unchanged.
    """
    model, compute = fields.get("model"), fields.get("compute")
    if compute is None and isinstance(model, Mapping):
        moved = {field.name for field in dataclasses.fields(ComputeConfig)}
        compute = {name: value for name, value in model.items() if name in moved}
        model = {name: value for name, value in model.items() if name not in moved}
    if not isinstance(compute, Mapping) or "scan" not in compute:
        return fields
    fields = {**fields, "model": model, "compute": compute}
    for group, added in ADDED.items():
        if isinstance(old := fields.get(group), Mapping):
            fields[group] = {**added, **old}
    return fields


# --- From a ConfigDict ----------------------------------------------------------------------------


def _kinds(cls: Any = Config, prefix: str = "") -> dict[str, tuple[type, ...]]:
    fields = {}
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            fields |= _kinds(kind, f"{prefix}{name}.")
        else:
            union = isinstance(kind, types.UnionType)
            fields[prefix + name] = typing.get_args(kind) if union else (kind,)
    return fields


FIELDS = _kinds()  # for each dotted name, the possible types of its value


def resumable(how: str) -> tuple[str, ...]:
    """Dotted names of the fields with resume=`how` (FREE or END)."""
    return tuple(
        f"{group.name}.{field.name}"
        for group in dataclasses.fields(Config)
        for field in dataclasses.fields(typing.get_type_hints(Config)[group.name])
        if field.metadata.get("resume") == how
    )


def unknown_field(name: str) -> UserError:
    """The error for a dotted name that is not a field. It names the most similar field."""
    sentence = f"The config has no field {shown(name)}."
    if inside := [field for field in FIELDS if field.startswith(name.rstrip(".") + ".")]:
        return UserError(
            f"{sentence} It is a group: name one of its fields, such as '{inside[0]}'."
        )
    # The same name in another group is a better guess than a similar spelling.
    last = name.rpartition(".")[2]
    close = [field for field in FIELDS if field.rpartition(".")[2] == last]
    close = close or difflib.get_close_matches(name[:100], FIELDS, n=1)
    hint = f"Did you mean '{close[0]}'?" if close else "configs/base.py lists every field."
    return UserError(f"{sentence} {hint}")


def check_names(fields: object, cls: Any = Config, prefix: str = "") -> None:
    """Raises UserError if a field is missing or unknown. Does not check values."""
    if not isinstance(fields, Mapping | ConfigDict):  # a ConfigDict is not a Mapping
        what = f"{prefix.rstrip('.')}=" if prefix else "The config "
        raise UserError(f"{what}{shown(fields)} must be a group of fields.")
    known = typing.get_type_hints(cls)
    for name in fields:
        if name not in known:
            raise unknown_field(f"{prefix}{name}")
    missing = [prefix + name for name in known if name not in fields]
    _require(not missing, f"The config lacks the fields {', '.join(missing)}.")
    for name, kind in known.items():
        try:
            value = fields[name]
        except RequiredValueError:  # the value of a placeholder that was never set
            raise UserError(f"The config has no value for {prefix}{name}.") from None
        if dataclasses.is_dataclass(kind):
            check_names(value, kind, f"{prefix}{name}.")


def _build(cls, fields: Any, prefix: str):
    check_names(fields, cls, prefix)
    values = {}
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            values[name] = _build(kind, fields[name], f"{prefix}{name}.")
        else:
            values[name] = _value(fields, name, prefix)
    return cls(**values)


def _value(fields: Fields, name: str, prefix: str):
    kinds, value = FIELDS[prefix + name], fields[name]
    if float in kinds and type(value) is int:
        if abs(value) > 2**1000:  # more than a float can hold
            return math.inf if value > 0 else -math.inf
        return float(value)
    if type(value) not in kinds:
        wanted = " or ".join("none" if k is type(None) else k.__name__ for k in kinds)
        found = "none" if value is None else type(value).__name__
        raise UserError(f"{prefix}{name}={shown(value)} must be of type {wanted}, not {found}.")
    return value
