"""How a model runs on this device: `config.compute`, without "auto" for its dtype."""

import dataclasses

import jax.numpy as jnp

from pallas_kernels import target_device
from yocou_jax.config import ComputeConfig


@dataclasses.dataclass(frozen=True)
class Compute:
    """dtype: of activations and matrix products; parameters are always float32. attention: the name
    of an implementation in pallas_kernels, or "auto". remat, unroll, scan: see configs/base.py,
    which has all defaults.
    """

    dtype: jnp.dtype
    attention: str
    remat: str
    unroll: int
    scan: bool


def resolve_compute(config: ComputeConfig) -> Compute:
    """The settings of `config`, in which the device has decided dtype="auto" (float32 on a CPU,
    bfloat16 elsewhere) and `unroll` (only on a CPU)."""
    fields, on_cpu = dataclasses.asdict(config), target_device().platform == "cpu"
    if config.dtype == "auto":
        fields["dtype"] = "float32" if on_cpu else "bfloat16"
    if not on_cpu:
        fields["unroll"] = 0
    return Compute(**fields | {"dtype": jnp.dtype(fields["dtype"])})
