"""The three attention kernels for TPUs that tpu.py starts: forward, dq, and dk with dv.

`tiles` says who sees whom, `bands` says which positions of the inner axis a grid step reads
(tpu_bands.py). bc: positions of that axis per tile of scores. refs are the scalars that are copied
before the kernel starts, the operands, the results and the scratch, in the order of tpu.py.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.attention import mask as masks
from pallas_kernels.attention.blocks import TPU_LANES
from pallas_kernels.attention.flash import LOG2E
from pallas_kernels.attention.tpu_bands import Scalars, column

NT = (((1,), (1,)), ((), ()))  # a [m h], b [n h] -> [m n]
NN = (((1,), (0,)), ((), ()))
TN = (((0,), (0,)), ((), ()))  # a [k m], b [k n] -> [m n]
# How much the backward kernels handle at a time inside a tile (static cycles on v6e, H = 128).
_DQ_CHUNK = 256  # queries; a tile of 256 x 768 took 601 cycles, in halves 686
_DKV_CHUNK = 512 * 256  # scores; a tile of 768 x 256 took 757 cycles, in pieces of 256 x 256 881


def dot(a, b, dims=NN):
    # fp32 inputs, which only tests and small models have, are multiplied in full precision,
    # whatever jax's default is.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _chunks(n: int, size: int) -> list[slice]:
    return [slice(low, min(low + size, n)) for low in range(0, n, size)]


def _masked(scores, seen):
    """Masks scores [G * queries, keys] by seen [queries, keys], which all G heads share."""
    G = scores.shape[0] // seen.shape[0]
    grouped = scores.reshape(G, *seen.shape)
    return jnp.where(seen[None], grouped, masks.MASKED).reshape(scores.shape)


def lanes(x, width: int):
    """x [rows, 128], in which all columns are equal, as [rows, width]."""
    if width <= x.shape[1]:
        return x[:, :width]
    return jnp.concatenate([x] * (width // x.shape[1]), axis=1)


def _each_tile(bands, j, start, tile, n):
    """Runs tile(0), ... tile(n-1). Not if step j repeats another step: then its start was moved."""

    def run():
        lax.fori_loop(0, n, tile, 0)

    pl.when(start == j * bands.size)(run) if bands.steps > 1 else run()


def forward_kernel(tiles, bands, bc, *refs):
    """Scores are [rows, keys], rows = G heads x bq queries. If the matrix unit is 256 wide and H is
    less, the product p v can also make the row sums at no cost: v gets extra columns of ones. So
    the vector unit, which is the bottleneck of this kernel, adds less (`tpu_sums_on_mxu`)."""
    q_ref, k_ref, v_ref, q_ids_ref, k_ids_ref, out_ref, lse_ref, top, total, acc = refs[3:]
    scalars = Scalars(*refs[:3], pl.program_id(0))
    i, j = pl.program_id(2), pl.program_id(3)
    G, bq, H = q_ref.shape
    R, width = acc.shape
    q_first = tiles.q_offset + i * bq
    limit = tiles.limit(scalars)
    start = bands.start(i, j, limit if tiles.lengths else None)

    @pl.when(j == 0)
    def _():
        top[...] = jnp.full_like(top, masks.MASKED)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    def tile(c, _):
        here = pl.ds(pl.multiple_of(c * bc, TPU_LANES), bc)
        k_first = start + c * bc

        def body(masked):
            s = dot(q_ref[...].reshape(R, H), k_ref[here], NT) * (tiles.scale * LOG2E)
            if masked:
                ids = tiles.columns_and_rows(q_ids_ref, slice(None), k_ids_ref, here)
                s = _masked(s, tiles.seen(q_first, k_first, (bq, bc), 0, limit, *ids))
            old = top[...]
            new = jnp.maximum(old, s.max(1, keepdims=True))
            p = jnp.exp2(s - lanes(new, bc))
            keep = lanes(jnp.exp2(old - new), max(width, TPU_LANES))
            v = v_ref[here]
            if width > H:
                v = jnp.concatenate([v, jnp.ones((bc, width - H), v.dtype)], axis=1)
            else:  # adds whole registers; the columns of a register are summed at the end
                sums = functools.reduce(jnp.add, jnp.split(p, bc // TPU_LANES, axis=1))
                total[...] = total[...] * keep[:, :TPU_LANES] + sums
            acc[...] = acc[...] * keep[:, :width] + dot(p.astype(v.dtype), v)
            top[...] = new

        tiles.apply(scalars, q_first, k_first, bq, bc, limit, body)
        return 0

    _each_tile(bands, j, start, tile, bands.size // bc)

    @pl.when(j == bands.steps - 1)
    def _():
        empty = top[...] < masks.MASKED / 2
        if width > H:
            sums = lanes(acc[:, H:], TPU_LANES)
        else:
            sums = jnp.broadcast_to(total[...].sum(1, keepdims=True), total.shape)
        sums = jnp.where(empty, 1.0, sums)
        lse = jnp.where(empty, masks.MASKED, (top[...] + jnp.log2(sums)) / LOG2E)
        out = acc[:, :H] * lanes(jnp.where(empty, 0.0, 1.0 / sums), H)
        out_ref[...] = out.reshape(G, bq, H).astype(out_ref.dtype)
        for g in range(G):
            lse_ref[g : g + 1] = lse[g * bq : (g + 1) * bq].T[:1]


def _pipelined(chunks, products, rest):
    """Calls rest(chunk, *products(chunk)) for every chunk. The products are made one chunk ahead,
    so that the compiler can overlap matrix products with exponentials. Without chunks a tile spills
    far more registers to memory and takes 5-15% longer."""
    ahead = products(chunks[0])
    for chunk, following in zip(chunks, [*chunks[1:], None], strict=True):
        mine, ahead = ahead, None if following is None else products(following)
        rest(chunk, *mine)


def dq_kernel(tiles, bands, bc, *refs):
    """Scores are [keys, queries], so that lse and delta are rows, as they are stored. dq is summed
    as [H, queries], which uses all columns of the matrix unit."""
    q_ref, k_ref, v_ref, q_ids_ref, k_ids_ref, d_out_ref, lse_ref, delta_ref, dq_ref, acc = refs[3:]
    scalars = Scalars(*refs[:3], pl.program_id(0))
    i, j = pl.program_id(2), pl.program_id(3)
    G, bq = q_ref.shape[:2]
    q_first = tiles.q_offset + i * bq
    limit = tiles.limit(scalars)
    start = bands.start(i, j, limit if tiles.lengths else None)

    @pl.when(j == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)

    def tile(n, _):
        c, g = n // G, n % G
        here = pl.ds(pl.multiple_of(c * bc, TPU_LANES), bc)
        k_first = start + c * bc

        def body(masked):
            k, v = k_ref[here], v_ref[here]

            def products(queries):
                return dot(k, q_ref[g, queries], NT), dot(v, d_out_ref[g, queries], NT)

            def rest(queries, s, dp):
                s = s * (tiles.scale * LOG2E)
                if masked:
                    ids = tiles.rows_and_columns(q_ids_ref, queries, k_ids_ref, here)
                    first = q_first + queries.start
                    s = jnp.where(
                        tiles.seen(first, k_first, s.shape, 1, limit, *ids), s, masks.MASKED
                    )
                p = jnp.exp2(s - lse_ref[pl.ds(g, 1), queries])
                ds = p * (dp - delta_ref[pl.ds(g, 1), queries])
                acc[g, :, queries] += dot(k, ds.astype(k.dtype), TN)

            _pipelined(_chunks(bq, _DQ_CHUNK), products, rest)

        tiles.apply(scalars, q_first, k_first, bq, bc, limit, body)
        return 0

    _each_tile(bands, j, start, tile, bands.size // bc * G)

    @pl.when(j == bands.steps - 1)
    def _():
        for g in range(G):
            dq_ref[g] = (acc[g] * tiles.scale).T.astype(dq_ref.dtype)


def dkv_kernel(tiles, bands, bc, *refs):
    """Scores are [queries, keys]. dk and dv are summed as [H, keys], over the queries of the band
    and the G heads of the group, in fp32."""
    q_ref, k_ref, v_ref, q_ids_ref, k_ids_ref, d_out_ref, lse_ref, delta_ref = refs[3:11]
    dk_ref, dv_ref, dk, dv = refs[11:]
    scalars = Scalars(*refs[:3], pl.program_id(0))
    i, j = pl.program_id(2), pl.program_id(3)
    G, bk = q_ref.shape[0], k_ref.shape[0]
    k_first = i * bk
    start = bands.start(i, j)
    limit = tiles.limit(scalars)

    @pl.when(j == 0)
    def _():
        dk[...] = jnp.zeros_like(dk)
        dv[...] = jnp.zeros_like(dv)

    def tile(n, _):
        c, g = n // G, n % G
        here = pl.ds(pl.multiple_of(c * bc, TPU_LANES), bc)
        q_first = tiles.q_offset + start + c * bc

        def body(masked):
            q, d_out = q_ref[g, here], d_out_ref[g, here]
            lse = column(lse_ref[pl.ds(g, 1), here])
            delta = column(delta_ref[pl.ds(g, 1), here])

            def products(rows):
                return dot(q[rows], k_ref[...], NT), dot(d_out[rows], v_ref[...], NT)

            def rest(rows, s, dp):
                s = s * (tiles.scale * LOG2E)
                if masked:
                    q_ids = pl.ds(c * bc + rows.start, rows.stop - rows.start)
                    ids = tiles.columns_and_rows(q_ids_ref, q_ids, k_ids_ref, slice(None))
                    first = q_first + rows.start
                    s = jnp.where(
                        tiles.seen(first, k_first, s.shape, 0, limit, *ids), s, masks.MASKED
                    )
                p = jnp.exp2(s - lanes(lse[rows], bk))
                ds = p * (dp - lanes(delta[rows], bk))
                dv[...] += dot(d_out[rows], p.astype(q.dtype), TN)
                dk[...] += dot(q[rows], ds.astype(q.dtype), TN)

            _pipelined(_chunks(bc, max(_DKV_CHUNK // bk, TPU_LANES)), products, rest)

        tiles.apply(scalars, q_first, k_first, bc, bk, limit, body)
        return 0

    _each_tile(bands, j, start, tile, bands.size // bc * G)

    @pl.when(j == bands.steps - 1)
    def _():
        dk_ref[...] = (dk[...] * tiles.scale).T.astype(dk_ref.dtype)
        dv_ref[...] = dv[...].T.astype(dv_ref.dtype)
