"""What a model computes: layers, mixers, experts, what inference keeps, and the whole."""

from yocou_jax.model.language_model import (
    Block,
    LanguageModel,
    ModelOutput,
    abstract_params,
    compute_dtype,
    empty_memory,
    head_matrix,
    logits,
    to_logits,
)

__all__ = [
    "Block",
    "LanguageModel",
    "ModelOutput",
    "abstract_params",
    "compute_dtype",
    "empty_memory",
    "head_matrix",
    "logits",
    "to_logits",
]
