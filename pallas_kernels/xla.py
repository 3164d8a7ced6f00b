"""Blocked attention in plain XLA: exact, differentiable, on any device, never an N x N array.

One pair of loops serves the window and full causal attention; they differ only in which keys a
block of queries visits (`_visits`): the window takes its band of bq + W - 1 keys in one piece, full
attention walks the key chunks at or below the diagonal with a running softmax
(FlashAttention-2, arXiv 2307.08691). Backward recomputes p block by block from q, k, v, o, lse.

Shapes inside: q [B K G n H] and k [B K s H], so that the G query heads of a group are rows of one
matrix product and keys are never repeated. Softmax in base 2, fp32.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import mask as masks
from pallas_kernels import reference
from pallas_kernels.blocks import blocks

LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """All that is static about one call."""

    N: int
    S: int
    window: int | None
    q_offset: int
    scale: float
    bq: int
    bk: int
    unrolled: bool

    @property
    def num_q_blocks(self) -> int:
        return -(-self.N // self.bq)


def _plan(q, k, window, q_offset, scale) -> _Plan:
    N, S = q.shape[1], k.shape[1]
    if window is not None and window >= q_offset + N:
        window = None  # it cuts nothing off
    table = blocks("xla", window)
    bq = min(table.q, N)
    bk = min(S, table.kv if window is None else bq + window - 1)
    return _Plan(N, S, window, q_offset, scale, bq, bk, -(-N // bq) <= table.unroll)


def _loop(n, body, carry, unrolled):
    if not unrolled:
        return lax.fori_loop(0, n, body, carry)
    for i in range(n):
        carry = body(i, carry)
    return carry


def _visits(plan: _Plan, i):
    """Which keys query block i visits: (number of chunks, j -> first key, keys per chunk)."""
    first = plan.q_offset + i * plan.bq
    if plan.unrolled:  # i is an int: one chunk, cut to what the block can see
        low, high = masks.key_span(first, first + plan.bq - 1, plan.S, plan.window)
        return 1, lambda j: low, high - low
    if plan.window is not None:  # one chunk of constant size, moved inside the array at its ends
        low = jnp.clip(first - plan.window + 1, 0, plan.S - plan.bk)
        return 1, lambda j: low, plan.bk
    high = jnp.minimum(first + plan.bq, plan.S)
    return (
        (high + plan.bk - 1) // plan.bk,
        lambda j: jnp.minimum(j * plan.bk, plan.S - plan.bk),
        plan.bk,
    )


def _cut(x, start, size, axis):
    return lax.dynamic_slice_in_dim(x, start, size, axis)


def _put(x, piece, start, axis):
    return lax.dynamic_update_slice_in_dim(x, piece.astype(x.dtype), start, axis)


def _scores(plan, q, k, seg, lengths, i, j, low):
    """Masked scores in base 2 for query block i and the keys from `low` on: [B K G bq bk] fp32."""
    s = jnp.einsum("bkgnh,bksh->bkgns", q, k, preferred_element_type=jnp.float32)
    s = s * (plan.scale * LOG2E)
    n, size = q.shape[3], k.shape[2]
    q_pos = plan.q_offset + i * plan.bq + lax.broadcasted_iota(jnp.int32, (n, size), 0)
    k_pos = low + lax.broadcasted_iota(jnp.int32, (n, size), 1)
    seen = masks.visible(q_pos, k_pos, plan.window)
    if not plan.unrolled and plan.window is None and plan.S % plan.bk:
        seen = seen & (k_pos >= j * plan.bk)  # the last chunk was moved back over its neighbour
    seen = seen[None]
    if seg is not None:
        seen = seen & (
            _cut(seg.q, i * plan.bq, n, 1)[:, :, None] == _cut(seg.kv, low, size, 1)[:, None]
        )
    if lengths is not None:
        seen = seen & (k_pos < lengths[:, None, None])
    return jnp.where(seen[:, None, None], s, masks.MASKED)


def _fold(x, plan, K):
    """[B N Q ...] -> [B K G N' ...], N' a multiple of the query block (zeros at the end)."""
    x = x.reshape(*x.shape[:2], K, x.shape[2] // K, *x.shape[3:])
    x = jnp.moveaxis(x, 1, 3)
    pad = plan.num_q_blocks * plan.bq - plan.N
    return jnp.pad(x, [(0, 0)] * 3 + [(0, pad)] + [(0, 0)] * (x.ndim - 4)) if pad else x


def _unfold(x, plan):
    x = jnp.moveaxis(x[:, :, :, : plan.N], 3, 1)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _pad_segments(seg, plan):
    if seg is None:
        return None
    pad = plan.num_q_blocks * plan.bq - plan.N
    return masks.SegmentIds(jnp.pad(seg.q, ((0, 0), (0, pad))), seg.kv)


def _forward(plan: _Plan, q, k, v, seg, lengths):
    K = k.shape[2]
    qf, kf, vf = _fold(q, plan, K), k.swapaxes(1, 2), v.swapaxes(1, 2)
    seg = _pad_segments(seg, plan)

    def block(i, carry):
        out, lse = carry
        qi = _cut(qf, i * plan.bq, plan.bq, 3)
        num, start, size = _visits(plan, i)

        def chunk(j, state):
            top, total, acc = state
            low = start(j)
            kj, vj = _cut(kf, low, size, 2), _cut(vf, low, size, 2)
            s = _scores(plan, qi, kj, seg, lengths, i, j, low)
            new = jnp.maximum(top, s.max(-1))
            # A row that has seen nothing yet is shifted by 0, so that its exponentials are 0.
            shift = jnp.where(new < masks.MASKED / 2, 0.0, new)
            p = jnp.exp2(s - shift[..., None])
            keep = jnp.exp2(top - shift)
            pv = jnp.einsum(
                "bkgns,bksh->bkgnh", p.astype(v.dtype), vj, preferred_element_type=jnp.float32
            )
            return new, total * keep + p.sum(-1), acc * keep[..., None] + pv

        top = jnp.full(qi.shape[:-1], masks.MASKED, jnp.float32)
        state = (top, jnp.zeros_like(top), jnp.zeros(qi.shape, jnp.float32))
        top, total, acc = _loop(num, chunk, state, isinstance(num, int))
        empty = total == 0
        total = jnp.where(empty, 1.0, total)
        lse_i = jnp.where(empty, masks.MASKED, (top + jnp.log2(total)) / LOG2E)
        out = _put(out, acc / total[..., None], i * plan.bq, 3)
        return out, _put(lse, lse_i, i * plan.bq, 3)

    carry = jnp.zeros(qf.shape, q.dtype), jnp.zeros(qf.shape[:-1], jnp.float32)
    out, lse = _loop(plan.num_q_blocks, block, carry, plan.unrolled)
    return _unfold(out, plan), _unfold(lse, plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan, q, k, v, seg, lengths):
    return _forward(plan, q, k, v, seg, lengths)


def _attention_fwd(plan, q, k, v, seg, lengths):
    out, lse = _forward(plan, q, k, v, seg, lengths)
    # Named, so that a remat policy can keep them and not run attention again.
    out, lse = checkpoint_name(out, "attn_out"), checkpoint_name(lse, "attn_lse")
    return (out, lse), (q, k, v, seg, lengths, out, lse)


def _attention_bwd(plan, residuals, cotangents):
    q, k, v, seg, lengths, out, lse = residuals
    d_out, d_lse = cotangents
    K = k.shape[2]
    # ds = p (dp - delta), and d lse / d s = p, so the gradient of lse joins delta.
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1) - d_lse
    # An empty row: its scores are MASKED too; without this p would be 1 there.
    lse = jnp.where(lse < masks.MASKED / 2, 0.0, lse * LOG2E)
    qf, df = _fold(q, plan, K), _fold(d_out, plan, K)
    lf, deltaf = _fold(lse, plan, K), _fold(delta, plan, K)
    kf, vf = k.swapaxes(1, 2), v.swapaxes(1, 2)
    seg = _pad_segments(seg, plan)

    def block(i, carry):
        dq, dk, dv = carry
        at = i * plan.bq
        qi, di = _cut(qf, at, plan.bq, 3), _cut(df, at, plan.bq, 3)
        li, deltai = _cut(lf, at, plan.bq, 3), _cut(deltaf, at, plan.bq, 3)
        num, start, size = _visits(plan, i)

        def chunk(j, state):
            dqi, dk, dv = state
            low = start(j)
            kj, vj = _cut(kf, low, size, 2), _cut(vf, low, size, 2)
            p = jnp.exp2(_scores(plan, qi, kj, seg, lengths, i, j, low) - li[..., None])
            f32 = {"preferred_element_type": jnp.float32}
            dp = jnp.einsum("bkgnh,bksh->bkgns", di, vj, **f32)
            ds = (p * (dp - deltai[..., None])).astype(q.dtype)
            dvj = jnp.einsum("bkgns,bkgnh->bksh", p.astype(v.dtype), di, **f32)
            dkj = jnp.einsum("bkgns,bkgnh->bksh", ds, qi, **f32)
            dqi = dqi + jnp.einsum("bkgns,bksh->bkgnh", ds, kj, **f32)
            dk = _put(dk, _cut(dk, low, size, 2) + dkj, low, 2)
            return dqi, dk, _put(dv, _cut(dv, low, size, 2) + dvj, low, 2)

        state = jnp.zeros(qi.shape, jnp.float32), dk, dv
        dqi, dk, dv = _loop(num, chunk, state, isinstance(num, int))
        return _put(dq, dqi * plan.scale, at, 3), dk, dv

    zeros = jnp.zeros(kf.shape, jnp.float32)
    dq, dk, dv = _loop(
        plan.num_q_blocks, block, (jnp.zeros(qf.shape, q.dtype), zeros, zeros), plan.unrolled
    )
    dk = (dk * plan.scale).swapaxes(1, 2).astype(k.dtype)
    return _unfold(dq, plan), dk, dv.swapaxes(1, 2).astype(v.dtype), None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def attention(q, k, v, *, window, q_offset, segments, kv_lengths, scale):
    """Same contract as `reference.attention`."""
    return _attention(_plan(q, k, window, q_offset, scale), q, k, v, segments, kv_lengths)


decode = reference.decode  # one query a row: dense is already linear in S
