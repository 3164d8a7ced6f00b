"""Attention as the textbook writes it, in fp32: the right answer for the tests.

It stores all N x S scores and jax differentiates it. Every other implementation is tested against
this file. So it has no blocks and no custom gradients. Only rows that see no key need some care.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.mask import MASKED, Mask


def _softmax_average(scores, seen, v, spec: str):
    """Averages v over the visible keys. Returns the average and the natural log of the sum of
    exponentials; where no key is visible, these are 0 and MASKED."""
    scores = jnp.where(seen, scores, MASKED)
    top = lax.stop_gradient(scores.max(-1, keepdims=True))
    p = jnp.where(seen, jnp.exp(scores - top), 0.0)
    total = p.sum(-1, keepdims=True)
    empty = total == 0
    total = jnp.where(empty, 1.0, total)  # inside the where, so that the gradient is 0, not NaN
    lse = jnp.where(empty, MASKED, top + jnp.log(total))[..., 0]
    return jnp.einsum(spec, p / total, v), lse


def _as_read(x, dtype):
    """x in fp32, rounded to the values of `dtype`; its gradient is not rounded."""
    wide = x.astype(jnp.float32)
    return wide + lax.stop_gradient(x.astype(dtype).astype(jnp.float32) - wide)


def attention(
    q: Float[Array, "B N Q H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    *,
    scale: float,
    partition=None,  # left to XLA, which can split plain operations by itself
) -> tuple[Float[Array, "B N Q H"], Float[Array, "B N Q"]]:
    """Attention of the keys that `mask` shows to each query: out in q's dtype, and lse in fp32. A
    query that sees no key gets 0 and MASKED. scale: factor of the scores."""
    B, N, Q, H = q.shape
    S, K = k.shape[1:3]
    k, v = (_as_read(x, q.dtype) for x in (k, v))
    seen = mask.as_array(N, S)
    grouped = q.astype(jnp.float32).reshape(B, N, K, Q // K, H)
    scores = jnp.einsum("bnkgh,bskh->bkgns", grouped, k) * scale
    out, lse = _softmax_average(scores, seen[:, None, None], v, "bkgns,bskh->bnkgh")
    return out.reshape(q.shape).astype(q.dtype), lse.transpose(0, 3, 1, 2).reshape(B, N, Q)


def decode(
    q: Float[Array, "B Q H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    valid: Int[Array, " B"],
    *,
    scale: float,
    partition=None,
) -> tuple[Float[Array, "B Q H"], Float[Array, "B Q"]]:
    """One query per row over the first `valid` slots, which may be in any order. Returns the result
    and its lse, as `attention`."""
    B, Q, H = q.shape
    S, K = k.shape[1:3]
    k, v = (_as_read(x, q.dtype) for x in (k, v))
    seen = (jnp.arange(S)[None] < valid[:, None])[:, None, None, :]
    grouped = q.astype(jnp.float32).reshape(B, K, Q // K, H)
    scores = jnp.einsum("bkgh,bskh->bkgs", grouped, k) * scale
    out, lse = _softmax_average(scores, seen, v, "bkgs,bskh->bkgh")
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(B, Q)
