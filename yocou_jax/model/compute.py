"""How a model runs on this device: `config.compute`, without "auto" for its dtype."""

import dataclasses

import jax.numpy as jnp

from pallas_kernels import target_device
from yocou_jax.config import ComputeConfig


@dataclasses.dataclass(frozen=True)
class Compute:
    """dtype: of activations and matrix products; parameters are always float32. attention: the name
    of an implementation in pallas_kernels, or "auto". remat, unroll, scan: see configs/base.py.
    """

    dtype: jnp.dtype
    attention: str = "auto"
    remat: str = "none"
    unroll: int = 0
    scan: bool = True


def resolve_compute(config: ComputeConfig | None = None) -> Compute:
    """The settings of `config`, in which the device has decided dtype="auto" (float32 on a CPU,
    bfloat16 elsewhere) and `unroll` (only on a CPU). None: the defaults, with loops."""
    dtype = "auto" if config is None else config.dtype
    if dtype == "auto":
        dtype = "float32" if target_device().platform == "cpu" else "bfloat16"
    rest = {} if config is None else dataclasses.asdict(config)
    if target_device().platform != "cpu":
        rest["unroll"] = 0
    return Compute(**rest | {"dtype": jnp.dtype(dtype)})
