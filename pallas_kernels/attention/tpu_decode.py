"""Decode on TPUs: one query per row over a cache, which is read as it is stored, or over a ring.

How XLA stores a cache [B, S, K, H] depends on H, because it wastes no memory on padding (seen in
the compiled programs for v5e, v5p, v6e and tpu7x):

* H < 128: the slots are the last axis, as in an array [B, K, H, S].
* H = 128 n: a slot is K rows of 128 numbers for the first part of the heads, then K rows for the
  second part, and so on. If K is a multiple of 8, the heads are in blocks of 8.

Each of the two kernels takes one of these views, so that XLA need not copy the cache.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.attention import mask as masks
from pallas_kernels.attention.blocks import TPU_LANES, tpu_decode_rows
from pallas_kernels.attention.flash import LOG2E, kernel_name
from pallas_kernels.attention.tpu import call_kernel
from pallas_kernels.attention.tpu_kernels import NN, NT, dot, lanes

_SUBLANES = 8  # rows of a register


def _softmax(step, valid, out_ref, lse2_ref, top, total, acc):
    """Runs a running softmax over the grid steps. step() returns masked scores [Q, slots], in base
    2, and a function from their exponentials to the sums of values [Q, width] that these weigh. It
    runs if the step has valid slots."""
    j = pl.program_id(1)

    @pl.when(j == 0)
    def _():
        top[...] = jnp.full_like(top, masks.MASKED)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    @pl.when(valid > 0)
    def _():
        s, weigh = step()
        old = top[...]
        new = jnp.maximum(old, s.max(1, keepdims=True))
        p = jnp.exp2(s - new[:, :1])
        keep = jnp.exp2(old - new)
        top[...], total[...] = new, total[...] * keep + p.sum(1, keepdims=True)
        acc[...] = acc[...] * lanes(keep, acc.shape[1]) + weigh(p)

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        sums = total[...]
        empty = sums == 0
        sums = jnp.where(empty, 1.0, sums)
        out_ref[...] = (acc[...] / lanes(sums, acc.shape[1])).astype(out_ref.dtype)
        lse2_ref[...] = jnp.where(empty, masks.MASKED, top[...] + jnp.log2(sums))


def _existing(v, axis, valid):
    """v without the slots after the valid ones, which may hold anything, even NaN."""
    exists = lax.broadcasted_iota(jnp.int32, v.shape, axis) < valid
    return jnp.where(exists, v, jnp.zeros((), v.dtype))


def _columns_kernel(scale, valid_ref, q_ref, k_ref, v_ref, *outputs_and_sums):
    """k and v are [K * H, slots]. Row h of q [Q, K * H] is the query of head h in the columns of
    its K/V head, and 0 in the others. The result is the mean of the values of all K/V heads: those
    of the other heads are not used."""
    slots = k_ref.shape[1]
    valid = valid_ref[pl.program_id(0)] - pl.program_id(1) * slots

    def step():
        s = dot(q_ref[...], k_ref[...], NN) * (scale * LOG2E)
        s = jnp.where(lax.broadcasted_iota(jnp.int32, s.shape, 1) < valid, s, masks.MASKED)
        return s, lambda p: dot(p.astype(v_ref.dtype), _existing(v_ref[...], 1, valid), NT)

    _softmax(step, valid, *outputs_and_sums)


def _rows_kernel(scale, K, together, parts, valid_ref, q_ref, k_ref, v_ref, *outputs_and_sums):
    """k and v are [rows, width]. A row is one of the `parts` of a K/V head in a slot. For each
    slot and each block of `together` heads come the rows of the first part, then those of the
    second, and so on. q and the result are [Q, parts * width].

    The kernel computes the scores of every query head with every row, and masks the rows of other
    K/V heads. These are K times as many scores as needed. But the matrix unit has time for them,
    since the kernel waits for memory, and to separate the heads it would have to transpose all that
    it reads. The score of a head is the sum over its parts; it is at the row of the first part."""
    Q, (rows, width) = q_ref.shape[0], k_ref.shape
    row_count = K * parts
    before = pl.program_id(1) * (rows // row_count)
    valid = (valid_ref[pl.program_id(0)] - before) * row_count

    def moved(x, part):
        """x [Q, rows], moved by so many parts to later rows."""
        by = -part * together % rows
        return x if by == 0 else jnp.concatenate([x[:, by:], x[:, :by]], axis=1)

    def step():
        k, v = k_ref[...], _existing(v_ref[...], 0, valid)
        columns = [slice(n * width, (n + 1) * width) for n in range(parts)]
        s = sum(moved(dot(q_ref[:, c], k, NT), -n) for n, c in enumerate(columns))
        s = s * (scale * LOG2E)
        row = lax.broadcasted_iota(jnp.int32, s.shape, 1)
        block = row // together
        head = block // parts % (K // together) * together + row % together
        mine = lax.broadcasted_iota(jnp.int32, s.shape, 0) // (Q // K)
        s = jnp.where((head == mine) & (block % parts == 0) & (row < valid), s, masks.MASKED)

        def weigh(p):
            p = [moved(p, n).astype(v.dtype) for n in range(parts)]
            return jnp.concatenate([dot(x, v) for x in p], axis=1)

        return s, weigh

    _softmax(step, valid, *outputs_and_sums)


def _call(kernel, slots, block, positions, valid, q, k, v, cost):
    """Starts a kernel that reads `slots` slots of k and v per grid step, a block of this shape.
    positions: the axis of the block that is cut into such blocks. Returns the result in the shape
    of q, and its lse [B, Q]."""
    B, Q, width = q.shape

    def kv_index(b, j, valid_ref):
        # After the last valid block the index does not change, so nothing is copied.
        j = jnp.minimum(j, jnp.maximum(valid_ref[b] - 1, 0) // slots)
        return (b, j, 0) if positions == 0 else (b, 0, j)

    def q_spec(width):
        return pl.BlockSpec((pl.squeezed, Q, width), lambda b, j, valid_ref: (b, 0, 0))

    kv_spec = pl.BlockSpec((pl.squeezed, *block), kv_index)
    steps = pl.cdiv(k.shape[1 + positions], block[positions])
    out, lse2 = call_kernel(
        kernel,
        kernel_name("decode", "pallas_tpu"),
        (B, steps),
        (q_spec(width), kv_spec, kv_spec),
        (q_spec(width), q_spec(TPU_LANES)),
        (
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((B, Q, TPU_LANES), jnp.float32),  # equal in all lanes
        ),
        [(Q, TPU_LANES), (Q, TPU_LANES), (Q, width)],
        cost,
        (valid,),
        q,
        k,
        v,
    )
    lse2 = lse2[..., 0]
    return out, jnp.where(lse2 <= masks.MASKED, masks.MASKED, lse2 / LOG2E)


def _slots(S: int, K: int, H: int, multiple: int) -> int:
    """How many slots a grid step reads. The last block may end outside the cache: to pad the cache,
    each step of decode would have to copy it."""
    return min(max(tpu_decode_rows(H) // K // multiple, 1) * multiple, S)


def decode(q, k, v, valid, *, scale):
    """As `reference.decode`: q [B Q H], k and v [B S K H], valid [B] -> [B Q H], [B Q]. Its time is
    that of reading the cache: each valid slot is read once for all heads, and no block after the
    last valid one."""
    (B, Q, H), (S, K) = q.shape, k.shape[1:3]
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    cost = pl.CostEstimate(
        flops=4 * B * Q * K * S * H,
        transcendentals=B * Q * S * (1 if H < TPU_LANES else K),
        bytes_accessed=2 * B * K * S * H * q.dtype.itemsize,
    )
    if H < TPU_LANES:
        slots = _slots(S, K, H, TPU_LANES)
        k, v = (x.transpose(0, 2, 3, 1).reshape(B, K * H, S) for x in (k, v))
        mine = (jnp.arange(Q)[:, None] // (Q // K) == jnp.arange(K)[None])[..., None]
        q = jnp.where(mine[None], q[:, :, None], 0).reshape(B, Q, K * H)
        kernel = functools.partial(_columns_kernel, scale)
        out, lse = _call(kernel, slots, (K * H, slots), 1, valid, q, k, v, cost)
        return jnp.where(mine[None], out.reshape(B, Q, K, H), 0).sum(2), lse
    parts = H // TPU_LANES if H % TPU_LANES == 0 and K > 1 else 1
    together = _SUBLANES if K % _SUBLANES == 0 else K
    slots, rows = _slots(S, K, H, 16), K * parts

    def view(x):
        x = x.reshape(B, S, K // together, together, parts, H // parts)
        return x.swapaxes(3, 4).reshape(B, S * rows, H // parts)

    kernel = functools.partial(_rows_kernel, scale, K, together, parts)
    return _call(kernel, slots, (slots * rows, H // parts), 0, valid, q, view(k), view(v), cost)
