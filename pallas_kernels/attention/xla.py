"""Blocked attention in plain XLA: exact, differentiable, on any device, never an N x S array.

One pair of loops serves the window and full causal attention. They differ only in the keys that a
block of bq queries visits (`_visits`). The window takes its band (the bq + W - 1 keys that these
queries see) in one piece. Full attention takes the chunks of keys up to the diagonal one after the
other, with a running softmax (FlashAttention-2, arXiv 2307.08691). If there are few blocks with few
scores, and no lengths, the loops are unrolled, and every block takes the keys that it sees in one
piece (with a window up to 31 more). The backward recomputes p block by block from q, k, v, o, lse.

Shapes inside: queries [B K R H] with R = G * bq rows, so that the G query heads of a group are rows
of one matrix product and keys are never repeated. Softmax in base 2, fp32.

The gradients of k and v are summed as [H, keys], because (d_out^T) p is 2-3 times faster than
p^T d_out on XLA's CPU backend, where one pass over the scores costs as much as a product with them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention import mask as masks
from pallas_kernels.attention.blocks import (
    BAND_MULTIPLE,
    XLA_UNROLLED_BLOCKS,
    XLA_UNROLLED_SCORES,
    xla_blocks,
    xla_decode_keys,
)
from pallas_kernels.attention.flash import LOG2E, Spec, kernel_name, padded, round_up
from pallas_kernels.attention.mask import Mask
from pallas_kernels.device import target_device

UNSEEN = masks.MASKED / 2  # the largest score of a row that has seen no key
_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The static facts of one call. N is a multiple of bq (the caller pads)."""

    N: int
    S: int
    K: int
    window: int | None
    q_offset: int
    scale: float
    bq: int
    bk: int
    few: bool  # all blocks together have few scores, so the loop over them may be unrolled
    low: int | None = None  # the first key of an unrolled block, which visits bk keys

    def unrolled(self, i: int):
        """The plan of block i alone: it visits the keys that it sees, in one chunk."""
        first = self.q_offset + i * self.bq
        low = 0 if self.window is None else min(first - self.window + 1, self.S - 1)
        low = max(low, 0) // BAND_MULTIPLE * BAND_MULTIPLE
        return dataclasses.replace(self, low=low, bk=min(first + self.bq, self.S) - low)

    def rows(self, x, i):
        """Query block i of x [B N Q ...] as rows [B K R ...]."""
        x = lax.dynamic_slice_in_dim(x, i * self.bq, self.bq, 1)
        x = x.reshape(*x.shape[:2], self.K, -1, *x.shape[3:])  # B n K G ...
        x = jnp.moveaxis(x, 1, 3)
        return x.reshape(*x.shape[:2], -1, *x.shape[4:])

    def put_rows(self, x, rows, i):
        """Writes rows [B K R ...] into query block i of x [B N Q ...]."""
        rows = rows.reshape(*rows.shape[:2], -1, self.bq, *rows.shape[3:])
        rows = jnp.moveaxis(rows, 3, 1)
        rows = rows.reshape(*rows.shape[:2], -1, *rows.shape[4:])
        return lax.dynamic_update_slice_in_dim(x, rows.astype(x.dtype), i * self.bq, 1)

    def keys(self, x, low):
        """Keys low..low+bk of x [B K S H]."""
        return lax.dynamic_slice_in_dim(x, low, self.bk, 2)


def _visits(plan: _Plan, i, lengths):
    """Which keys query block i visits: the number of chunks of bk keys, and a function from chunk j
    to its first key. A chunk that would end outside the array is moved back inside. No chunk after
    the end of the longest row is visited."""
    if plan.low is not None:
        return 1, lambda j: plan.low
    first = plan.q_offset + i * plan.bq
    last_start = plan.S - plan.bk
    if plan.window is not None:
        return 1, lambda j: jnp.clip(first - plan.window + 1, 0, last_start)
    high = jnp.minimum(first + plan.bq, plan.S if lengths is None else lengths.max())
    return (high + plan.bk - 1) // plan.bk, lambda j: jnp.minimum(j * plan.bk, last_start)


def _is_one(n) -> bool:
    return isinstance(n, int) and n == 1


def _loop(n, body, carry):
    return body(0, carry) if _is_one(n) else lax.fori_loop(0, n, body, carry)


def _blocks(plan: _Plan, lengths, body, carry):
    """The carry after body(plan, i, carry) for every block i of queries."""
    count = plan.N // plan.bq
    if lengths is None and plan.few and count <= XLA_UNROLLED_BLOCKS:
        for i in range(count):
            carry = body(plan.unrolled(i), i, carry)
        return carry
    return _loop(count, functools.partial(body, plan), carry)


def _scores(plan, q, k):
    """Scores in base 2 of the queries and the keys that it is given: [B K R bk] fp32."""
    return _einsum("bkrh,bksh->bkrs", q, k) * (plan.scale * LOG2E)


def _where_seen(plan, x, other, mask: Mask, i, j, low):
    """x [B K R bk], of query block i and the chunk of keys at `low`, with `other` where a query
    does not see a key."""
    q_pos = plan.q_offset + i * plan.bq + lax.broadcasted_iota(jnp.int32, (plan.bq, plan.bk), 0)
    k_pos = low + lax.broadcasted_iota(jnp.int32, (plan.bq, plan.bk), 1)
    seen = masks.visible(q_pos, k_pos, plan.window)
    if plan.window is None and plan.low is None and plan.S % plan.bk:
        seen = seen & (k_pos >= j * plan.bk)  # the last chunk was moved and overlaps with another
    seen = seen[None]
    if mask.segments is not None:
        seg_q = lax.dynamic_slice_in_dim(mask.segments.q, i * plan.bq, plan.bq, 1)
        seg_k = lax.dynamic_slice_in_dim(mask.segments.kv, low, plan.bk, 1)
        seen = seen & masks.same_segment(seg_q, seg_k)
    if mask.lengths is not None:
        seen = seen & (k_pos[None] < mask.lengths[:, None, None])
    grouped = x.reshape(*x.shape[:2], -1, plan.bq, plan.bk)
    return jnp.where(seen[:, None, None], grouped, other).reshape(x.shape)


def _forward(plan: _Plan, q, k, v, mask: Mask):
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)

    def block(plan, i, carry):
        out, lse = carry
        qi = plan.rows(q, i)
        num, start = _visits(plan, i, mask.lengths)

        def chunk(j, state):
            low = start(j)
            kj, vj = plan.keys(k, low), plan.keys(v, low)
            s = _where_seen(plan, _scores(plan, qi, kj), masks.MASKED, mask, i, j, low)
            # If a row has seen nothing yet, this is far above its scores, and all p are 0.
            new = jnp.maximum(s.max(-1, keepdims=True), UNSEEN if state is None else state[0])
            p = jnp.exp2(s - new)
            pv = _einsum("bkrs,bksh->bkrh", p.astype(v.dtype), vj)
            if state is None:
                return new, p.sum(-1, keepdims=True), pv
            top, total, acc = state
            keep = jnp.exp2(top - new)
            return new, total * keep + p.sum(-1, keepdims=True), acc * keep + pv

        top = jnp.full_like(qi[..., :1], UNSEEN, jnp.float32)
        state = (top, jnp.zeros_like(top), jnp.zeros_like(qi, jnp.float32))
        top, total, acc = chunk(0, None) if _is_one(num) else lax.fori_loop(0, num, chunk, state)
        empty, total = total == 0, jnp.maximum(total, 1.0)  # the largest p of a row is 1
        lse_i = jnp.where(empty, masks.MASKED, (top + jnp.log2(total)) / LOG2E)
        return plan.put_rows(out, acc / total, i), plan.put_rows(lse, lse_i[..., 0], i)

    # zeros_like, here and below: inside shard_map a carry must vary over the same axes as q.
    carry = jnp.zeros_like(q), jnp.zeros_like(q[..., 0], jnp.float32)
    return _blocks(plan, mask.lengths, block, carry)


def _backward(plan: _Plan, q, k, v, mask: Mask, lse, delta, d_out, kv_grad_dtype):
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)

    def block(plan, i, carry):
        dq, dk, dv = carry
        qi, di = plan.rows(q, i), plan.rows(d_out, i)
        li, deltai = plan.rows(lse, i), plan.rows(delta, i)
        num, start = _visits(plan, i, mask.lengths)

        def chunk(j, state):
            dqi, dk, dv = state
            low = start(j)
            kj, vj = plan.keys(k, low), plan.keys(v, low)
            p = jnp.exp2(_scores(plan, qi, kj) - li[..., None])  # may be inf where nothing is seen
            p = _where_seen(plan, p, 0.0, mask, i, j, low)
            dp = _einsum("bkrh,bksh->bkrs", di, vj)
            ds = (p * (dp - deltai[..., None])).astype(q.dtype)
            dvj = _einsum("bkrh,bkrs->bkhs", di, p.astype(v.dtype))
            dkj = _einsum("bkrh,bkrs->bkhs", qi, ds)
            dqi = dqi + _einsum("bkrs,bksh->bkrh", ds, kj)

            def add(x, piece):
                piece += lax.dynamic_slice_in_dim(x, low, plan.bk, 3)
                return lax.dynamic_update_slice_in_dim(x, piece, low, 3)

            return dqi, add(dk, dkj), add(dv, dvj)

        state = jnp.zeros_like(qi, jnp.float32), dk, dv
        dqi, dk, dv = _loop(num, chunk, state)
        return plan.put_rows(dq, dqi * plan.scale, i), dk, dv

    zeros = jnp.zeros_like(k.swapaxes(2, 3), jnp.float32)
    dq, dk, dv = _blocks(plan, mask.lengths, block, (jnp.zeros_like(q), zeros, zeros))
    dk = (dk * plan.scale).transpose(0, 3, 1, 2).astype(kv_grad_dtype)
    return dq, dk, dv.transpose(0, 3, 1, 2).astype(kv_grad_dtype)


def _plan(spec: Spec, q, k, mask: Mask):
    """The plan, in which N is rounded up to a multiple of bq, and the mask for that N."""
    B, N, Q = q.shape[:3]
    S, K = k.shape[1:3]
    bq, bk = xla_blocks(B, Q, N, S, mask.window, mask.q_offset >= S - 1)
    N = round_up(N, bq)
    if mask.segments is not None:
        segments = mask.segments._replace(q=padded(mask.segments.q, 1, N))
        mask = dataclasses.replace(mask, segments=segments)
    few = B * Q * N * (S if mask.window is None else bk) <= XLA_UNROLLED_SCORES
    return _Plan(N, S, K, mask.window, mask.q_offset, spec.scale, bq, bk, few), mask


def forward(spec: Spec, q, k, v, mask: Mask):
    """Shapes, dtypes and results: see flash.Kernels."""
    N = q.shape[1]
    plan, mask = _plan(spec, q, k, mask)
    with jax.named_scope(kernel_name("forward", "xla", mask.window)):
        out, lse = _forward(plan, padded(q, 1, plan.N), k, v, mask)
    return out[:, :N], lse[:, :N].swapaxes(1, 2)


def backward(spec: Spec, q, k, v, mask: Mask, lse2, delta, d_out):
    """Shapes, dtypes and results: see flash.Kernels."""
    N = q.shape[1]
    plan, mask = _plan(spec, q, k, mask)
    rows = q, lse2.swapaxes(1, 2), delta.swapaxes(1, 2), d_out
    q, lse2, delta, d_out = (padded(x, 1, plan.N) for x in rows)
    with jax.named_scope(kernel_name("backward", "xla", mask.window)):
        dq, dk, dv = _backward(plan, q, k, v, mask, lse2, delta, d_out, spec.kv_grad_dtype)
    return dq[:, :N], dk, dv


@jax.named_scope(kernel_name("decode", "xla"))
def decode(q, k, v, valid, *, scale):
    """As `reference.decode`: q [B Q H], k and v [B S K H], valid [B] -> [B Q H], [B Q]. It has a
    running softmax over chunks of keys, and reads no chunk after the end of the longest row.

    The cache is read as it is stored, [S, K H]. Each query is written into K H numbers that are
    zero outside its own K/V head. These are K times as many multiplications, but the cache is not
    transposed (2.2-3.2 times faster on 2 CPU cores at S = 16384 with 2 or 4 K/V heads; more heads
    were not measured). The cache keeps its dtype: bf16 is 2-3 times faster than a copy in fp32.
    """
    B, Q, H = q.shape
    S, K = k.shape[1:3]
    # At least two chunks: with a single one, XLA would reshape (copy) the cache before the loop.
    keys = xla_decode_keys(target_device(q).platform, B, K * H, k.dtype.itemsize)
    bk = min(-(-S // 2), keys)
    own = jnp.eye(K, dtype=q.dtype)
    spread = _einsum("bkgh,kj->bkgjh", q.reshape(B, K, Q // K, H), own).astype(q.dtype)
    spread = spread.reshape(B, Q, K * H)

    def chunk(j, state):
        top, total, acc = state
        low = jnp.minimum(j * bk, S - bk)
        # First the slice, then the reshape: so the loop reads the cache itself, not a copy.
        kj, vj = (lax.dynamic_slice_in_dim(x, low, bk, 1).reshape(B, bk, K * H) for x in (k, v))
        position = low + jnp.arange(bk)[None]
        seen = (position >= j * bk) & (position < valid[:, None])
        s = _einsum("bqc,bsc->bqs", spread, kj) * (scale * LOG2E)
        s = jnp.where(seen[:, None], s, masks.MASKED)
        new = jnp.maximum(top, s.max(-1))
        p = jnp.exp2(s - new[..., None]) * seen[:, None]
        keep = jnp.exp2(top - new)
        pv = _einsum("bqs,bsc->bqc", p.astype(v.dtype), vj)
        return new, total * keep + p.sum(-1), acc * keep[..., None] + pv

    top = jnp.full_like(q[..., 0], masks.MASKED, jnp.float32)
    state = top, jnp.zeros_like(top), jnp.zeros_like(spread, jnp.float32)
    top, total, acc = lax.fori_loop(0, (valid.max() + bk - 1) // bk, chunk, state)
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    out = acc / total[..., None]
    out = _einsum("bkgjh,kj->bkgh", out.reshape(B, K, Q // K, K, H), own.astype(jnp.float32))
    lse = jnp.where(empty, masks.MASKED, top / LOG2E + jnp.log(total))
    return out.reshape(q.shape).astype(q.dtype), lse
