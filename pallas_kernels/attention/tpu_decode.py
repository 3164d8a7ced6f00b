"""Decode on TPUs: one query per row over a cache, which is read as it is stored, or over a ring."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.attention import mask as masks
from pallas_kernels.attention.blocks import TPU_LANES, tpu_decode_rows
from pallas_kernels.attention.flash import LOG2E, kernel_name
from pallas_kernels.attention.tpu import call_kernel
from pallas_kernels.attention.tpu_kernels import NT, dot, lanes


def _decode_kernel(scale, K, valid_ref, q_ref, k_ref, v_ref, out_ref, top, total, acc):
    """Handles all heads at once. k and v are read as they are stored: row r is slot r // K of K/V
    head r % K. The kernel computes the score of every query head with every row, and masks the rows
    of other K/V heads. These are K times as many scores as needed. But the matrix unit has time for
    them, since the kernel waits for memory, and to separate the heads it would have to transpose
    all that it reads."""
    j = pl.program_id(1)
    Q, H = q_ref.shape
    rows = k_ref.shape[0]
    valid = (valid_ref[pl.program_id(0)] - j * (rows // K)) * K  # rows of this block that exist

    @pl.when(j == 0)
    def _():
        top[...] = jnp.full_like(top, masks.MASKED)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    @pl.when(valid > 0)
    def _():
        s = dot(q_ref[...], k_ref[...], NT) * (scale * LOG2E)
        row = lax.broadcasted_iota(jnp.int32, s.shape, 1)
        mine = lax.broadcasted_iota(jnp.int32, s.shape, 0) // (Q // K)
        s = jnp.where((row % K == mine) & (row < valid), s, masks.MASKED)
        old = top[...]
        new = jnp.maximum(old, s.max(1, keepdims=True))
        p = jnp.exp2(s - new[:, :1])
        keep = jnp.exp2(old - new)
        top[...], total[...] = new, total[...] * keep + p.sum(1, keepdims=True)
        # The slots after the valid ones may hold anything, also NaN.
        exists = lax.broadcasted_iota(jnp.int32, v_ref.shape, 0) < valid
        v = jnp.where(exists, v_ref[...], jnp.zeros((), v_ref.dtype))
        acc[...] = acc[...] * lanes(keep, H) + dot(p.astype(v.dtype), v)

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        sums = total[...]
        sums = jnp.where(sums == 0, 1.0, sums)
        out_ref[...] = (acc[...] / lanes(sums, H)).astype(out_ref.dtype)


def decode(q, k, v, valid, *, scale):
    """Same contract as `reference.decode`. Its time is that of reading the cache. With H = 128 each
    valid slot is read once for all heads, and no block after the last valid one. With other widths
    XLA first copies the cache to another layout (seen for H = 64 and 256); this cost is known."""
    B, Q, H = q.shape
    S, K = k.shape[1:3]
    # The last block may end outside the cache: to pad the cache, each step would have to copy it.
    size = min(max(tpu_decode_rows(H) // K // 16, 1) * 16, S)
    k, v = (x.astype(q.dtype).reshape(B, S * K, H) for x in (k, v))

    def block(b, j, valid_ref):
        # After the last valid block the index does not change, so nothing is copied.
        return b, jnp.minimum(j, jnp.maximum(valid_ref[b] - 1, 0) // size), 0

    q_spec = pl.BlockSpec((pl.squeezed, Q, H), lambda b, j, valid_ref: (b, 0, 0))
    kv_spec = pl.BlockSpec((pl.squeezed, size * K, H), block)
    return call_kernel(
        functools.partial(_decode_kernel, scale, K),
        kernel_name("decode", "pallas_tpu"),
        (B, pl.cdiv(S, size)),
        (q_spec, kv_spec, kv_spec),
        q_spec,
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        [(Q, TPU_LANES), (Q, TPU_LANES), (Q, H)],
        pl.CostEstimate(
            flops=4 * B * Q * K * S * H,
            transcendentals=B * Q * K * S,
            bytes_accessed=2 * B * K * S * H * q.dtype.itemsize,
        ),
        (valid,),
        q,
        k,
        v,
    )
