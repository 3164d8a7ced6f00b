"""The parts that every architecture shares: linear maps, RMSNorm, RoPE, SwiGLU."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from yocou_jax.typing import Array, Float, Int


def fan_in_init(fan_in: int, scale: float = 1.0) -> Callable:
    """Normal with standard deviation scale / sqrt(fan_in)."""
    return nn.initializers.normal(scale * fan_in**-0.5)


class Linear(nn.Module):
    """y = x W without bias; W may have several output dimensions, and contract several of x.

    x [..., *inputs], W [*inputs, *features], y [..., *features]. The product is always one
    two-dimensional matrix product, which is what XLA does best on every backend.
    """

    features: tuple[int, ...]
    axes: tuple[str, ...]  # logical axes of W, inputs first
    dtype: jnp.dtype
    init_scale: float = 1.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        num_in = len(self.axes) - len(self.features)
        inputs = x.shape[x.ndim - num_in :]
        fan_in = 1
        for size in inputs:
            fan_in *= size
        init = nn.with_logical_partitioning(fan_in_init(fan_in, self.init_scale), self.axes)
        kernel = self.param("kernel", init, (*inputs, *self.features), jnp.float32)
        kernel = kernel.astype(self.dtype).reshape(fan_in, -1)
        leading = x.shape[: x.ndim - num_in]
        return (x.reshape(-1, fan_in) @ kernel).reshape(*leading, *self.features)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale, over the last dimension, in float32."""

    eps: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return (x * inverse * scale).astype(self.dtype)


def rope(x: Float[Array, "B N heads H"], positions: Int[Array, "B N"], theta: float) -> Array:
    """Rotary position embedding (Su et al. 2021), halves rotated: (x1, x2) -> (x1 c - x2 s, ...).

    Angles are positions * theta^(-2i/H), computed in float32.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    x1, x2 = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


class SwiGLU(nn.Module):
    """W_down(silu(W_gate x) * W_up x), gate and up side by side in one matrix."""

    width: int
    dtype: jnp.dtype
    out_scale: float

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        gate_up = Linear((2, self.width), ("embed", "pair", "mlp"), self.dtype, name="gate_up")(x)
        hidden = nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :]
        return Linear((x.shape[-1],), ("mlp", "embed"), self.dtype, self.out_scale, name="down")(
            hidden
        )
