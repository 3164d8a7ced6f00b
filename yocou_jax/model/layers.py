"""The parts that every architecture shares: linear maps, RMSNorm, RoPE, SwiGLU."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from yocou_jax.sharding import length_ways
from yocou_jax.typing import AnyArray, Array, Float, Int


def fan_in_init(fan_in: int, scale: float = 1.0) -> Callable:
    """Normal with standard deviation scale / sqrt(fan_in)."""
    return nn.initializers.normal(scale * fan_in**-0.5)


class ExactPartitioned(nn.LogicallyPartitioned):
    """The box of a parameter that is always used in float32. Inference does not cast it to the
    compute type, as it casts the others."""


def exact(init: Callable, axes: tuple[str | None, ...]) -> Callable:
    """Like `nn.with_logical_partitioning`, for a parameter that is always used in float32."""

    @functools.wraps(init)
    def boxed(*args, **kwargs) -> ExactPartitioned:
        return ExactPartitioned(init(*args, **kwargs), axes)

    return boxed


class Linear(nn.Module):
    """y = x W without bias. W may have several input and several output dimensions.

    x [..., *inputs], W [*inputs, *features], y [..., *features]. It is computed as one product of
    two-dimensional matrices, which XLA does best on every backend; but not if a mesh splits the
    positions, because an axis of rows and positions could then not stay split over both.
    """

    features: tuple[int, ...]
    axes: tuple[str, ...]  # logical axes of W, inputs first
    dtype: jnp.dtype
    init_scale: float = 1.0
    exact: bool = False  # True for a router or a gate, which is always float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        num_in = len(self.axes) - len(self.features)
        inputs = x.shape[x.ndim - num_in :]
        fan_in = 1
        for size in inputs:
            fan_in *= size
        box = exact if self.exact else nn.with_logical_partitioning
        init = box(fan_in_init(fan_in, self.init_scale), self.axes)
        kernel = self.param("kernel", init, (*inputs, *self.features), jnp.float32)
        kernel = kernel.astype(self.dtype).reshape(fan_in, -1)
        leading = x.shape[: x.ndim - num_in]
        # float32 must be exact: by default, TPUs would use bfloat16 passes.
        precision = jax.lax.Precision.HIGHEST if self.dtype == jnp.float32 else None
        rows = leading if len(leading) > 1 and length_ways(leading[1]) > 1 else (-1,)
        y = jnp.matmul(x.reshape(*rows, fan_in), kernel, precision=precision)
        return y.reshape(*leading, *self.features)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "... D"], scale: Float[AnyArray, " D"], eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last dimension, in float32."""
    normed, _ = _rms(x, eps)
    return (normed * _like(scale, x)).astype(x.dtype)


def _like(scale, x):
    """A vector [D] with as many axes as x [..., D]: nothing is broadcast without being asked."""
    return jnp.expand_dims(scale, range(x.ndim - 1))


def _rms(x, eps):
    x = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return x * inverse, inverse


# Written by hand, so that backward keeps only x. autodiff keeps three arrays of this size.
def _rms_norm_fwd(x, scale, eps):
    return rms_norm(x, scale, eps), (x, scale)


def _rms_norm_bwd(eps, residuals, g):
    x, scale = residuals
    normed, inverse = _rms(x, eps)
    g = g.astype(jnp.float32)
    g_normed = g * _like(scale, x)
    dx = inverse * (g_normed - normed * jnp.mean(g_normed * normed, axis=-1, keepdims=True))
    return dx.astype(x.dtype), jnp.sum(g * normed, axis=tuple(range(x.ndim - 1)))


rms_norm.defvjp(_rms_norm_fwd, _rms_norm_bwd)


class RMSNorm(nn.Module):
    """`rms_norm` with a scale that is learned."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        init = exact(nn.initializers.ones, ("norm",))
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
        return rms_norm(x, scale, self.eps)


class Rotation(NamedTuple):
    """The angles by which `rope` rotates: cos and sin [1 or B, N, 1, H/2], float32."""

    cos: Float[AnyArray, "#B N 1 half"]
    sin: Float[AnyArray, "#B N 1 half"]


def rotation(positions: Int[AnyArray, "#B N"], width: int, theta: float) -> Rotation:
    """The angles positions * theta^(-2i/H) for heads of H = `width` numbers. A model computes them
    once for all its layers, because XLA would compute them again in every layer."""
    half = width // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies[None, None, None]
    return Rotation(jnp.cos(angles), jnp.sin(angles))


@jax.custom_vjp
def rope(x: Float[Array, "B N heads H"], angles: Rotation) -> Float[Array, "B N heads H"]:
    """Rotary position embedding (Su et al. 2021). x1 and x2 are the two halves of a head:
    (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), in float32."""
    cos, sin = angles
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


# The gradient is rotated back. autodiff would pad and add the two halves.
rope.defvjp(
    lambda x, angles: (rope(x, angles), angles),
    lambda angles, g: (rope(g, Rotation(angles.cos, -angles.sin)), None),
)


@jax.custom_vjp
def gated_silu(gate: Float[Array, "... F"], up: Float[Array, "... F"]) -> Float[Array, "... F"]:
    """silu(gate) * up, computed in float32. The result has the type of `gate`."""
    return (nn.silu(gate.astype(jnp.float32)) * up).astype(gate.dtype)


# Written by hand for the same reason: backward keeps gate and up, but not the sigmoid.
def _gated_silu_bwd(residuals, g):
    dtype = g.dtype
    gate, up, g = (x.astype(jnp.float32) for x in (*residuals, g))
    sigmoid = nn.sigmoid(gate)
    silu = gate * sigmoid
    return (g * up * (sigmoid + silu * (1 - sigmoid))).astype(dtype), (g * silu).astype(dtype)


gated_silu.defvjp(lambda gate, up: (gated_silu(gate, up), (gate, up)), _gated_silu_bwd)


class SwiGLU(nn.Module):
    """W_down(silu(W_gate x) * W_up x)."""

    width: int
    dtype: jnp.dtype
    out_scale: float

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        # Two matrices. If they were one, their gradients would have to be joined and split.
        gate = Linear((self.width,), ("embed", "mlp"), self.dtype, name="gate")(x)
        up = Linear((self.width,), ("embed", "mlp"), self.dtype, name="up")(x)
        return Linear((x.shape[-1],), ("mlp", "embed"), self.dtype, self.out_scale, name="down")(
            gated_silu(gate, up)
        )
