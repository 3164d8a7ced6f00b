"""Frozen, validated settings, built once from the ConfigDict of a file in configs/.

`configs/base.py` lists every field with its unit or reason and its default; the classes here only
say what is possible. Each rule that a config can break is answered by one sentence (UserError).
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

from yocou_jax.errors import UserError
from yocou_jax.program import Program

DTYPES = ("auto", "float32", "bfloat16")
REMAT_POLICIES = ("none", "attention", "full")
SCHEDULES = ("cosine", "wsd", "constant")
BAD_ROWS = ("refuse", "skip")


def _require(ok: bool, sentence: str):
    if not ok:
        raise UserError(sentence)


def _require_at_least(config, prefix: str, name: str, least: int):
    value = getattr(config, name)
    _require(value >= least, f"{prefix}.{name}={value} must be at least {least}.")


def _require_positive(config, prefix: str, *names: str):
    for name in names:
        _require_at_least(config, prefix, name, 1)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of one model; see configs/base.py for what each field means."""

    architecture: str
    num_layers: int
    num_loops: int | None
    vocab_size: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    window: int
    rope_theta: float
    cross_rope: bool
    qk_norm: bool
    norm_eps: float
    tie_embeddings: bool
    num_experts: int
    experts_per_token: int
    num_shared_experts: int
    expert_width: int
    load_balance_weight: float
    router_z_weight: float
    prefix_length: int
    gate_floor: float
    dtype: str
    attention: str
    remat: str
    scan: bool

    def __post_init__(self):
        _require_positive(self, "model", "num_layers", "vocab_size", "d_model", "num_heads")
        _require_positive(self, "model", "num_kv_heads", "head_dim", "d_ff", "window")
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
        for name, choices in (("dtype", DTYPES), ("remat", REMAT_POLICIES)):
            value = getattr(self, name)
            _require(value in choices, f"model.{name}='{value}' is not one of {choices}.")
        if self.num_experts:
            _require_positive(self, "model", "experts_per_token", "expert_width")
            _require(
                self.experts_per_token <= self.num_experts,
                f"model.experts_per_token={self.experts_per_token} is more than "
                f"model.num_experts={self.num_experts}.",
            )
        for name in ("num_experts", "num_shared_experts", "load_balance_weight", "router_z_weight"):
            _require_at_least(self, "model", name, 0)
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            _require(value > 0, f"model.{name}={value} must be positive.")
        _require(
            0.0 <= self.gate_floor < 1.0,
            f"model.gate_floor={self.gate_floor} must lie in [0, 1).",
        )
        _require_at_least(self, "model", "prefix_length", 0)
        _ = self.program  # a program that makes no sense is refused here, not at the first step

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "ModelConfig":
        """Builds the sizes alone, as `Config.from_dict` does for all settings."""
        return _build(cls, fields, "model.")

    @property
    def residual_scale(self) -> float:
        """Shrinks what each sublayer adds at the start, so that the residual stream's variance does
        not grow with the depth that a token passes through: 1 / sqrt(2 depth) (GPT-2)."""
        return (2 * self.program.depth) ** -0.5

    @property
    def kv_prefix(self) -> int:
        """Learned keys and values before a full layer's own: ParScale's, with parallel streams."""
        return self.prefix_length if self.program.streams > 1 else 0

    @property
    def program(self) -> Program:
        program = Program.from_architecture(self.architecture, self.num_layers)
        return program if self.num_loops is None else program.with_loops(self.num_loops)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    name: str
    learning_rate: float
    schedule: str
    warmup_steps: int
    decay_fraction: float
    final_fraction: float
    beta1: float
    beta2: float
    momentum: float
    eps: float
    weight_decay: float
    clip_norm: float
    z_loss: float
    accumulation_steps: int
    max_skipped_updates: int

    def __post_init__(self):
        _require(
            self.name in ("adamw", "muon"),
            f"optimizer.name='{self.name}' is neither 'adamw' nor 'muon'.",
        )
        _require(
            self.schedule in SCHEDULES,
            f"optimizer.schedule='{self.schedule}' is not one of {SCHEDULES}.",
        )
        for name in ("warmup_steps", "final_fraction", "weight_decay", "z_loss"):
            _require_at_least(self, "optimizer", name, 0)
        for name in ("learning_rate", "eps", "clip_norm"):
            value = getattr(self, name)
            _require(value > 0, f"optimizer.{name}={value} must be positive.")
        for name in ("beta1", "beta2", "momentum"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"optimizer.{name}={value} must lie in [0, 1).")
        _require(
            0 < self.decay_fraction <= 1,
            f"optimizer.decay_fraction={self.decay_fraction} must lie in (0, 1].",
        )
        _require_positive(self, "optimizer", "accumulation_steps", "max_skipped_updates")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    source: str
    text_field: str
    bad_rows: str
    tokenizer: str
    end_of_text: str
    allow_lossy_tokenizer: bool
    vocab_size: int
    packing: bool
    batch_size: int
    sequence_length: int
    validation_fraction: float
    validation_sequences: int
    seed: int
    cache_dir: str

    def __post_init__(self):
        _require_positive(self, "data", "batch_size", "sequence_length", "validation_sequences")
        _require(
            self.bad_rows in BAD_ROWS,
            f"data.bad_rows='{self.bad_rows}' is not one of {BAD_ROWS}.",
        )
        _require(
            0 < self.validation_fraction < 1,
            f"data.validation_fraction={self.validation_fraction} must lie in (0, 1).",
        )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int
    fsdp: int
    tensor: int

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        _require(
            all(size == -1 or size >= 1 for size in sizes.values())
            and list(sizes.values()).count(-1) <= 1,
            f"mesh {sizes} needs sizes of at least 1, and at most one -1 (what is left).",
        )


@dataclasses.dataclass(frozen=True)
class RunConfig:
    steps: int
    seed: int
    log_every: int
    eval_every: int
    sample_every: int
    sample_prompt: str
    sample_tokens: int
    checkpoint_every: int
    keep_checkpoints: int
    profile_steps: int

    def __post_init__(self):
        _require_positive(self, "run", "steps", "log_every", "eval_every", "sample_tokens")
        _require_positive(self, "run", "sample_every", "checkpoint_every")
        _require_at_least(self, "run", "keep_checkpoints", 2)
        _require_at_least(self, "run", "profile_steps", 0)
        _require_at_least(self, "run", "seed", 0)


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a run depends on, checked field by field and then together."""

    model: ModelConfig
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
            f"optimizer.warmup_steps={optimizer.warmup_steps} leaves nothing of "
            f"run.steps={self.run.steps} to train at the full learning rate.",
        )
        _require(
            not (data.packing and self.model.program.streams > 1),
            "data.packing=True cannot be used with a program of parallel streams: the learned "
            "K/V prefix has no segment.",
        )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Config":
        """Builds the settings from a ConfigDict (or nested dicts); every field must be there."""
        return _build(cls, fields, "")

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return dataclasses.asdict(self)


def _build(cls, fields: Mapping[str, Any], prefix: str):
    known = typing.get_type_hints(cls)
    for name in fields:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean '{prefix}{close[0]}'?" if close else ""
            raise UserError(f"The config has no field '{prefix}{name}'.{hint}")
    missing = [prefix + name for name in known if name not in fields]
    _require(not missing, f"The config lacks the fields {', '.join(missing)}.")
    values = {}
    for name, kind in known.items():
        value = fields[name]
        if dataclasses.is_dataclass(kind):
            values[name] = _build(kind, value, f"{prefix}{name}.")
            continue
        kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
        if float in kinds and type(value) is int:
            value = float(value)
        if type(value) not in kinds:
            wanted = " or ".join("none" if k is type(None) else k.__name__ for k in kinds)
            raise UserError(f"{prefix}{name}={value!r} must be of type {wanted}.")
        values[name] = value
    return cls(**values)
