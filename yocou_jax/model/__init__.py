"""The model: layers, mixers, experts, the memory of inference, and the language model."""

from yocou_jax.model.compute import Compute, resolve_compute
from yocou_jax.model.language_model import (
    Block,
    LanguageModel,
    ModelOutput,
    abstract_params,
    empty_memory,
    head_matrix,
    logits,
    to_logits,
)

__all__ = [
    "Block",
    "Compute",
    "LanguageModel",
    "ModelOutput",
    "abstract_params",
    "empty_memory",
    "head_matrix",
    "logits",
    "resolve_compute",
    "to_logits",
]
