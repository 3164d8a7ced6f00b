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


def _masked(scores, seen, ceiling):
    """Masks scores [G * queries, keys] by seen [queries, keys] and by ceiling (`Ceilings`), which
    all G heads share. One of the two may be None."""
    shared = seen if ceiling is None else ceiling
    grouped = scores.reshape(-1, *shared.shape)
    if ceiling is not None:
        grouped = jnp.minimum(grouped, ceiling[None])
    if seen is not None:
        grouped = jnp.where(seen[None], grouped, masks.MASKED)
    return grouped.reshape(scores.shape)


def lanes(x, width: int):
    """x [rows, 128], in which all columns are equal, as [rows, width]."""
    copies = -(-width // x.shape[1])
    x = jnp.concatenate([x] * copies, axis=1) if copies > 1 else x
    return x[:, :width]


def _each_tile(bands, j, start, tile, n):
    """Runs tile(0), ... tile(n-1). Not if step j repeats another step: then its start was moved."""

    def run():
        lax.fori_loop(0, n, tile, 0)

    pl.when(start == j * bands.size)(run) if bands.steps > 1 else run()


def _softmax_step(s, v, H, top, total, acc):
    """Adds scores s [rows, keys] and values v [keys, H] to the running softmax of the rows."""
    bc, width = s.shape[1], acc.shape[1]
    old = top[...]
    new = jnp.maximum(old, s.max(1, keepdims=True))
    p = jnp.exp2(s - lanes(new, bc))
    keep = lanes(jnp.exp2(old - new), max(width, TPU_LANES))
    if width > H:
        v = jnp.concatenate([v, jnp.ones((bc, width - H), v.dtype)], axis=1)
    else:  # adds whole registers; the columns of a register are summed at the end
        sums = functools.reduce(jnp.add, jnp.split(p, bc // TPU_LANES, axis=1))
        total[...] = total[...] * keep[:, :TPU_LANES] + sums
    acc[...] = acc[...] * keep[:, :width] + dot(p.astype(v.dtype), v)
    top[...] = new


def forward_kernel(tiles, bands, bc, ceilings, *refs):
    """Scores are [rows, keys], rows = G heads x bq queries. If the matrix unit is 256 wide and H is
    less, the product p v can also make the row sums at no cost: v gets extra columns of ones. So
    the vector unit, which is the bottleneck of this kernel, adds less (`TpuForm.sums_on_mxu`).
    ceilings: how to mask with the last scratch array, or None (`TpuForm.ceilings`)."""
    q_ref, k_ref, v_ref, q_ids_ref, k_ids_ref, out_ref, lse_ref, top, total, acc = refs[3:13]
    ceiling_ref = refs[13] if ceilings else None
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

    if ceilings:
        first = functools.reduce(jnp.maximum, [pl.program_id(axis) for axis in range(4)]) == 0
        pl.when(first)(lambda: ceilings.fill(ceiling_ref))

    def tile(c, _):
        here = pl.ds(pl.multiple_of(c * bc, TPU_LANES), bc)
        k_first = start + c * bc

        def body(masked):
            s = dot(q_ref[...].reshape(R, H), k_ref[here], NT) * (tiles.scale * LOG2E)
            if masked:
                ids = tiles.ids(0, q_ids_ref, slice(None), k_ids_ref, here)
                at = q_first, k_first, (bq, bc), 0, limit, *ids
                ceiling = ceilings and ceilings.of(ceiling_ref, q_first - k_first)
                s = _masked(s, tiles.seen(*at, by_position=not ceilings), ceiling)
            _softmax_step(s, v_ref[here], H, top, total, acc)

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


def _scores(a, b, q_axis):
    """a [queries, H] times b [keys, H], as [queries, keys] (q_axis 0) or [keys, queries]."""
    return dot(a, b, NT) if q_axis == 0 else dot(b, a, NT)


def _scaled(tiles, s, masked, q_first, k_first, q_axis, limit, ids):
    """Products of q and k as scores in base 2, masked if `masked`. ids: the last arguments of
    `Tiles.ids`."""
    s = s * (tiles.scale * LOG2E)
    if not masked:
        return s
    seen = tiles.seen(q_first, k_first, s.shape, q_axis, limit, *tiles.ids(q_axis, *ids))
    return jnp.where(seen, s, masks.MASKED)


def _along_queries(row, q_axis, keys):
    """A row [1, queries] for scores with queries on q_axis."""
    return row if q_axis == 1 else lanes(column(row), keys)


def _result(sums, transposed, dtype):
    return (sums.T if transposed else sums).astype(dtype)


def _pipelined(chunks, products, rest):
    """Calls rest(chunk, *products(chunk)) for every chunk. The products are made one chunk ahead,
    so that the compiler can overlap matrix products with exponentials. Without chunks a tile spills
    far more registers to memory and takes 5-15% longer."""
    ahead = products(chunks[0])
    for chunk, following in zip(chunks, [*chunks[1:], None], strict=True):
        mine, ahead = ahead, None if following is None else products(following)
        rest(chunk, *mine)


def dq_kernel(tiles, bands, bc, transposed, *refs):
    """transposed (`TpuForm.transposed`): scores are [keys, queries], so that lse and delta are
    rows, as they are stored, and dq is summed as [H, queries]. Else scores are [queries, keys], and
    dq is summed as [queries, H]."""
    q_ref, k_ref, v_ref, q_ids_ref, k_ids_ref, d_out_ref, lse_ref, delta_ref, dq_ref, acc = refs[3:]
    scalars = Scalars(*refs[:3], pl.program_id(0))
    i, j = pl.program_id(2), pl.program_id(3)
    G, bq = q_ref.shape[:2]
    q_first = tiles.q_offset + i * bq
    limit = tiles.limit(scalars)
    start = bands.start(i, j, limit if tiles.lengths else None)
    q_axis = 1 if transposed else 0

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
                q, d_out = q_ref[g, queries], d_out_ref[g, queries]
                return _scores(q, k, q_axis), _scores(d_out, v, q_axis)

            def rest(queries, s, dp):
                ids = q_ids_ref, queries, k_ids_ref, here
                first = q_first + queries.start
                s = _scaled(tiles, s, masked, first, k_first, q_axis, limit, ids)
                lse, delta = (
                    _along_queries(x[pl.ds(g, 1), queries], q_axis, bc)
                    for x in (lse_ref, delta_ref)
                )
                ds = (jnp.exp2(s - lse) * (dp - delta)).astype(k.dtype)
                if transposed:
                    acc[g, :, queries] += dot(k, ds, TN)
                else:
                    acc[g, queries] += dot(ds, k)

            _pipelined(_chunks(bq, _DQ_CHUNK if transposed else bq), products, rest)

        tiles.apply(scalars, q_first, k_first, bq, bc, limit, body)
        return 0

    _each_tile(bands, j, start, tile, bands.size // bc * G)

    @pl.when(j == bands.steps - 1)
    def _():
        for g in range(G):
            dq_ref[g] = _result(acc[g] * tiles.scale, transposed, dq_ref.dtype)


def dkv_kernel(tiles, bands, bc, transposed, *refs):
    """transposed (`TpuForm.transposed`): scores are [queries, keys]; dk and dv are summed as
    [H, keys], in fp32. Else these are [keys, queries] and [keys, H]. The G heads are summed too."""
    q_ref, k_ref, v_ref, q_ids_ref, k_ids_ref, d_out_ref, lse_ref, delta_ref = refs[3:11]
    dk_ref, dv_ref, dk, dv = refs[11:]
    scalars = Scalars(*refs[:3], pl.program_id(0))
    i, j = pl.program_id(2), pl.program_id(3)
    G, bk = q_ref.shape[0], k_ref.shape[0]
    k_first = i * bk
    start = bands.start(i, j)
    limit = tiles.limit(scalars)
    q_axis = 0 if transposed else 1

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
            lse, delta = (
                _along_queries(x[pl.ds(g, 1), here], q_axis, bk) for x in (lse_ref, delta_ref)
            )

            def products(rows):
                s = _scores(q[rows], k_ref[...], q_axis)
                return s, _scores(d_out[rows], v_ref[...], q_axis)

            def rest(rows, s, dp):
                q_ids = pl.ds(c * bc + rows.start, rows.stop - rows.start)
                ids = q_ids_ref, q_ids, k_ids_ref, slice(None)
                s = _scaled(tiles, s, masked, q_first + rows.start, k_first, q_axis, limit, ids)
                at = rows if transposed else (slice(None), rows)
                p = jnp.exp2(s - lse[at])
                ds = (p * (dp - delta[at])).astype(q.dtype)
                p = p.astype(q.dtype)
                if transposed:
                    dv[...] += dot(d_out[rows], p, TN)
                    dk[...] += dot(q[rows], ds, TN)
                else:
                    dv[...] += dot(p, d_out[rows])
                    dk[...] += dot(ds, q[rows])

            size = max(_DKV_CHUNK // bk, TPU_LANES) if transposed else bc
            _pipelined(_chunks(bc, size), products, rest)

        tiles.apply(scalars, q_first, k_first, bc, bk, limit, body)
        return 0

    _each_tile(bands, j, start, tile, bands.size // bc * G)

    @pl.when(j == bands.steps - 1)
    def _():
        dk_ref[...] = _result(dk[...] * tiles.scale, transposed, dk_ref.dtype)
        dv_ref[...] = _result(dv[...], transposed, dv_ref.dtype)
