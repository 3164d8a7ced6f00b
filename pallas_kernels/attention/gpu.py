"""Attention for NVIDIA Hopper (sm_90a) in Pallas's Mosaic GPU dialect: forward, dq, dk and dv.

Why it exists: plain XLA moves every block of scores through device memory, and public kernels visit
all blocks in the backward of a window. Here one template serves the window and full causal
attention: `_Plan` says which blocks of the other axis a block of rows visits, and which of those
need a mask; nothing else is loaded.

How: FlashAttention-3 (arXiv 2407.08608). A thread block is a producer warpgroup, which streams
blocks through shared memory with the copy engine (TMA), and two consumer warpgroups of 64 rows,
which multiply with wgmma. The two take turns in the forward: one is in its softmax while the other
has the tensor cores. One query head a thread block; those of a group run side by side and share
their keys in the L2 cache. Backward has a kernel for dq and one for dk and dv, which sums over the
query heads of the group in registers: no atomics, so the same input gives the same bits.

How it rounds: q, k, v in bf16 or fp16; products accumulate in fp32; softmax in fp32 in base 2 with
the scale folded into the exponent; p and ds are rounded to the input's dtype before their products;
dk and dv leave the fp32 accumulators in spec.kv_grad_dtype.

What it runs on: jax 0.11 and newer, compute capability 9.0. Compiled for an H200, not yet run on
one; values and races are tested in Pallas's interpreter on the host. Expected limits on an H200:
600 TFLOP/s forward and, because dq and dk, dv recompute the scores each (7 products where a fused
backward has 5), 5/7 of that backward; a window's thread blocks live for five blocks of keys only,
so that starting and ending them shows. What differs in the interpreter is in hopper.py.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention import hopper
from pallas_kernels.attention import mask as masks
from pallas_kernels.attention.blocks import GPU_HEAD_WIDTHS, gpu_blocks
from pallas_kernels.attention.flash import LOG2E, Spec, kernel_name, padded, round_up
from pallas_kernels.attention.hopper import CONSUMERS, pl, plgpu
from pallas_kernels.call import Call
from pallas_kernels.device import interpretation


def unsupported_reason(call: Call) -> str | None:
    """See api.Implementation. Interpreted kernels take any head width, and float32 too."""
    if plgpu is None:
        return f"pallas_gpu needs Pallas's Mosaic GPU dialect: {hopper.IMPORT_ERROR}."
    interpreted = interpretation() is not None
    device = call.device
    if not interpreted and device.platform != "gpu":
        return f"pallas_gpu runs on NVIDIA Hopper GPUs; this computation is for a {device.kind}."
    if not interpreted and device.compute_capability != 90:
        return "pallas_gpu is written for compute capability 9.0 (Hopper: H100, H200, GH200); " + (
            f"{device.kind} is not in the table of pallas_kernels/device.py."
            if device.compute_capability is None
            else f"{device.kind} has {device.compute_capability / 10}."
        )
    if not hasattr(plgpu, "InterpretGPUParams"):
        what = "has no interpreter for it" if interpreted else "has another interface"
        return f"pallas_gpu needs jax 0.11 or newer; this is {jax.__version__}, which {what}."
    dtypes = ("bfloat16", "float16") + (("float32",) if interpreted else ())
    if call.dtype_name not in (None, *dtypes):
        return f"pallas_gpu takes {' and '.join(dtypes)}; got {call.dtype_name}."
    if (H := call.head_width) is None:
        return None
    if not interpreted and H not in GPU_HEAD_WIDTHS:
        widths = " and ".join(map(str, GPU_HEAD_WIDTHS))
        return f"pallas_gpu takes heads of {widths}; got {H}."
    rows = gpu_blocks(H).rows
    if call.decodes and call.k_shape is not None and rows < call.group:
        return f"pallas_gpu decodes at most {rows} query heads a key/value head; got {call.group}."
    return None


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Which blocks meet. Rows count from 0, positions of queries from q_offset; bounds are traced
    int32. `bounded`: some keys of the arrays must not be seen although causality allows it."""

    N: int
    S: int
    group: int
    window: int | None
    q_offset: int
    scale: float
    bounded: bool

    @property
    def scale2(self) -> float:
        return self.scale * LOG2E

    def limit(self, lengths, b):
        """Keys from here on do not exist in row b."""
        return jnp.int32(self.S) if lengths is None else jnp.minimum(lengths[b], self.S)

    def key_blocks(self, row, rows: int, size: int, limit):
        """first, last: the blocks of `size` keys that queries row..row+rows see any of."""
        position, oldest = self.q_offset + row, jnp.int32(0)
        if self.window is not None:
            oldest = jnp.maximum(position - (self.window - 1), 0)
        first = lax.div(oldest, size)
        last = hopper.ceil_div(jnp.minimum(position + rows, limit), size)
        return first, jnp.where(oldest < limit, last, first)

    def inner_key_blocks(self, row, rows: int, size: int, limit, first, last):
        """Of those, the blocks low..high that each of these queries sees all of."""
        position = self.q_offset + row
        low = first
        if self.window is not None:
            low = hopper.ceil_div(jnp.maximum(position + rows - self.window, 0), size)
            low = jnp.minimum(jnp.maximum(low, first), last)
        high = lax.div(jnp.minimum(position + 1, limit), size)
        return low, jnp.minimum(jnp.maximum(high, low), last)

    def query_blocks(self, key, keys: int, size: int, limit):
        """first, last: the blocks of `size` queries that see any of keys key..key+keys."""
        first = lax.div(jnp.maximum(key - self.q_offset, 0), size)
        end = jnp.int32(self.N)
        if self.window is not None:
            beyond = jnp.minimum(key + keys, limit) + (self.window - 1) - self.q_offset
            end = jnp.minimum(jnp.maximum(beyond, 0), self.N)
        last = jnp.where(key < limit, hopper.ceil_div(end, size), 0)
        return first, jnp.maximum(last, first)

    def inner_query_blocks(self, key, keys: int, size: int, limit, first, last):
        """Of those, the blocks low..high whose queries each see all of these keys."""
        low = hopper.ceil_div(jnp.maximum(key + (keys - 1) - self.q_offset, 0), size)
        low = jnp.minimum(jnp.maximum(low, first), last)
        high = last
        if self.window is not None:
            high = lax.div(jnp.maximum(key + self.window - self.q_offset, 0), size)
        if self.bounded:
            high = jnp.where(key + keys <= limit, high, 0)
        return low, jnp.minimum(jnp.maximum(high, low), last)

    def seen(self, row, key, limit, shape, query_axis: int):
        """The mask of one block of scores [M N], whose queries lie along query_axis. What changes
        from block to block is added to the rows, behind a barrier: otherwise the compiler keeps M N
        loop-invariant differences in registers."""
        ahead = self.q_offset + row - key
        rows = plgpu.broadcasted_iota(jnp.int32, shape[:1], 0, layout=plgpu.Layout.WGMMA.reduce(1))
        rows = rows + ahead if query_axis == 0 else rows - ahead
        rows = hopper.each_row(lax.optimization_barrier(rows), shape)
        columns = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
        if query_axis == 0:
            seen, beyond = masks.visible(rows, columns, self.window), limit - key
            return seen & (columns < beyond) if self.bounded else seen
        seen, beyond = masks.visible(columns, rows, self.window), limit - key - ahead
        return seen & (rows < beyond) if self.bounded else seen


def _edges_and_inside(step, first, low, high, last, carry):
    """Three loops, so that only the blocks on an edge pay for a mask."""
    carry = lax.fori_loop(first, low, functools.partial(step, edge=True), carry)
    carry = lax.fori_loop(low, high, functools.partial(step, edge=False), carry)
    return lax.fori_loop(high, last, functools.partial(step, edge=True), carry)


def _forward_kernel(plan, q_ref, k_ref, v_ref, ids_ref, lengths_ref, out_ref, lse_ref, **scratch):
    """out, lse of 2 x `rows` queries of one head: a running softmax over blocks of keys."""
    q_smem, k_smem, v_smem, lse_smem, ids_smem = (scratch[x] for x in ("q", "k", "v", "lse", "ids"))
    q_full, k_full, v_full = (scratch[x] for x in ("q_full", "k_full", "v_full"))
    k_free, v_free, turn = (scratch[x] for x in ("k_free", "v_free", "turn"))
    (stages, size, H), rows = k_smem.shape, q_smem.shape[1]
    b, head = lax.axis_index("batch"), lax.axis_index("heads")
    tile = q_ref.shape[1] // (CONSUMERS * rows) - 1 - lax.axis_index("tiles")  # longest rows first
    row = tile * (CONSUMERS * rows)
    limit = plan.limit(lengths_ref, b)
    first, last = plan.key_blocks(row, CONSUMERS * rows, size, limit)

    def producer():
        hopper.stream(
            first, last, _copy_keys(plan, k_ref, v_ref, ids_ref, b, head, scratch), (k_free, v_free)
        )

    def consumer(wg):
        mine = row + wg * rows
        here = pl.ds(mine, rows)
        plgpu.copy_gmem_to_smem(q_ref.at[b, here, head], q_smem.at[wg], q_full.at[wg])
        q_ids = None if ids_ref is None else hopper.load_rows(ids_ref.q.at[b, here])

        def take_turn():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def step(j, carry, edge):
            acc, top, total = carry
            slot = lax.rem(j - first, stages)
            plgpu.barrier_wait(k_full.at[slot])
            s = hopper.scores(q_smem.at[wg], k_smem.at[slot], take_turn)
            seen = plan.seen(mine, j * size, limit, s.shape, 0) if edge else None
            if q_ids is not None:
                kv_ids = hopper.load_columns(ids_smem.at[slot])
                seen = hopper.both(
                    seen, hopper.each_row(q_ids, s.shape) == hopper.each_column(kv_ids, s.shape)
                )
            plgpu.barrier_arrive(k_free.at[slot])
            p, keep, top = hopper.exponentials(s, plan.scale2, seen, top)
            total = total * keep + p.sum(axis=1)
            acc = acc * hopper.each_row(keep, acc.shape)
            p = p.astype(v_smem.dtype)
            # All of the softmax before the other warpgroup gives up the tensor cores.
            acc, top, total, p = lax.optimization_barrier((acc, top, total, p))
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(v_full.at[slot])
            plgpu.barrier_wait(turn)
            acc = hopper.add_product(acc, p, v_smem.at[slot])
            plgpu.barrier_arrive(v_free.at[slot])
            return acc, top, total

        plgpu.barrier_wait(q_full.at[wg])
        pl.when(wg == 1)(take_turn)  # half a step behind the other
        low, high = plan.inner_key_blocks(mine, rows, size, limit, first, last)
        carry = (
            hopper.zeros((rows, H)),
            hopper.per_row(masks.MASKED, rows),
            hopper.per_row(0.0, rows),
        )
        acc, top, total = _edges_and_inside(step, first, low, high, last, carry)
        pl.when(wg == 0)(take_turn)

        empty = total == 0.0
        total = jnp.where(empty, 1.0, total)
        lse_smem[wg] = jnp.where(empty, masks.MASKED, top / LOG2E + jnp.log(total))
        q_smem[wg] = (acc * hopper.each_row(1.0 / total, acc.shape)).astype(q_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem.at[wg], out_ref.at[b, here, head])
        plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse_ref.at[b, head, here])
        plgpu.wait_smem_to_gmem(0)

    hopper.specialise(producer, consumer)


def _copy_keys(plan, k_ref, v_ref, ids_ref, b, head, scratch):
    """For hopper.stream: block j of the keys (and their segment ids), then of the values."""
    size = scratch["k"].shape[1]
    kv_head = lax.div(head, plan.group)

    def copies(j, slot):
        keys = pl.ds(j * size, size)
        k_full, v_full = scratch["k_full"].at[slot], scratch["v_full"].at[slot]

        def copy_k():
            plgpu.copy_gmem_to_smem(k_ref.at[b, keys, kv_head], scratch["k"].at[slot], k_full)
            if ids_ref is not None:
                plgpu.copy_gmem_to_smem(ids_ref.kv.at[b, keys], scratch["ids"].at[slot], k_full)

        def copy_v():
            plgpu.copy_gmem_to_smem(v_ref.at[b, keys, kv_head], scratch["v"].at[slot], v_full)

        return copy_k, copy_v

    return copies


def _dq_kernel(
    plan,
    q_ref,
    k_ref,
    v_ref,
    ids_ref,
    lengths_ref,
    lse2_ref,
    delta_ref,
    d_out_ref,
    dq_ref,
    **scratch,
):
    """dq of 2 x `rows` queries of one head: p and ds once more, block by block of keys."""
    q_smem, k_smem, v_smem, d_out_smem = (scratch[x] for x in ("q", "k", "v", "d_out"))
    q_full, k_full, v_full = (scratch[x] for x in ("q_full", "k_full", "v_full"))
    k_free, v_free = scratch["k_free"], scratch["v_free"]
    (stages, size, H), rows = k_smem.shape, q_smem.shape[1]
    b, head = lax.axis_index("batch"), lax.axis_index("heads")
    tile = q_ref.shape[1] // (CONSUMERS * rows) - 1 - lax.axis_index("tiles")  # longest rows first
    row = tile * (CONSUMERS * rows)
    limit = plan.limit(lengths_ref, b)
    first, last = plan.key_blocks(row, CONSUMERS * rows, size, limit)

    def producer():
        hopper.stream(
            first, last, _copy_keys(plan, k_ref, v_ref, ids_ref, b, head, scratch), (k_free, v_free)
        )

    def consumer(wg):
        mine = row + wg * rows
        here = pl.ds(mine, rows)
        plgpu.copy_gmem_to_smem(q_ref.at[b, here, head], q_smem.at[wg], q_full.at[wg])
        plgpu.copy_gmem_to_smem(d_out_ref.at[b, here, head], d_out_smem.at[wg], q_full.at[wg])
        q_ids = None if ids_ref is None else hopper.load_rows(ids_ref.q.at[b, here])
        lse2, delta = (hopper.load_rows(x.at[b, head, here]) for x in (lse2_ref, delta_ref))

        def step(j, dq, edge):
            slot = lax.rem(j - first, stages)

            def probabilities(s):
                seen = plan.seen(mine, j * size, limit, s.shape, 0) if edge else None
                if q_ids is not None:
                    kv_ids = hopper.load_columns(scratch["ids"].at[slot])
                    seen = hopper.both(
                        seen, hopper.each_row(q_ids, s.shape) == hopper.each_column(kv_ids, s.shape)
                    )
                return hopper.probabilities(s, plan.scale2, seen, hopper.each_row(lse2, s.shape))

            plgpu.barrier_wait(k_full.at[slot])
            own = hopper.anew(wg)
            _, ds = hopper.p_and_ds(
                q_smem.at[own],
                k_smem.at[slot],
                probabilities,
                lambda: plgpu.barrier_wait(v_full.at[slot]),
                d_out_smem.at[own],
                v_smem.at[slot],
                lambda: hopper.each_row(delta, (rows, size)),
                overlap=not edge and q_ids is None,
            )
            plgpu.barrier_arrive(v_free.at[slot])
            dq = hopper.add_product(dq, ds.astype(k_smem.dtype), k_smem.at[slot])
            plgpu.barrier_arrive(k_free.at[slot])
            return dq

        plgpu.barrier_wait(q_full.at[wg])
        low, high = plan.inner_key_blocks(mine, rows, size, limit, first, last)
        dq = _edges_and_inside(step, first, low, high, last, hopper.zeros((rows, H)))
        q_smem[wg] = (dq * plan.scale).astype(q_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem.at[wg], dq_ref.at[b, here, head])
        plgpu.wait_smem_to_gmem(0)

    hopper.specialise(producer, consumer)


def _dkv_kernel(
    plan, q_ref, k_ref, v_ref, ids_ref, lengths_ref, lse2_ref, delta_ref, d_out_ref, dk_ref, dv_ref,
    **scratch,
):  # fmt: skip
    """dk, dv of 2 x `rows` keys of one K/V head: over the query heads of its group, and for each
    over blocks of queries. Scores are transposed, [keys, queries], so that p and ds are left
    operands of their products as they come."""
    q_smem, k_smem, v_smem, d_out_smem = (scratch[x] for x in ("q", "k", "v", "d_out"))
    kv_full, q_full, d_out_full, free = (
        scratch[x] for x in ("kv_full", "q_full", "d_out_full", "free")
    )
    (stages, size, H), rows = q_smem.shape, k_smem.shape[1]
    b, kv_head = lax.axis_index("batch"), lax.axis_index("heads")
    key = lax.axis_index("tiles") * (CONSUMERS * rows)
    limit = plan.limit(lengths_ref, b)
    first, last = plan.query_blocks(key, CONSUMERS * rows, size, limit)
    num = last - first

    def producer():
        def copies(t, slot):
            head = kv_head * plan.group + lax.div(t, num)
            here = pl.ds((first + lax.rem(t, num)) * size, size)
            q_full, d_out_full = (scratch[x].at[slot] for x in ("q_full", "d_out_full"))

            def copy():
                plgpu.copy_gmem_to_smem(q_ref.at[b, here, head], q_smem.at[slot], q_full)
                plgpu.copy_gmem_to_smem(
                    lse2_ref.at[b, head, here], scratch["lse2"].at[slot], q_full
                )
                if ids_ref is not None:
                    plgpu.copy_gmem_to_smem(ids_ref.q.at[b, here], scratch["ids"].at[slot], q_full)
                plgpu.copy_gmem_to_smem(
                    d_out_ref.at[b, here, head], d_out_smem.at[slot], d_out_full
                )
                plgpu.copy_gmem_to_smem(
                    delta_ref.at[b, head, here], scratch["delta"].at[slot], d_out_full
                )

            return (copy,)

        hopper.stream(jnp.int32(0), plan.group * num, copies, (free,))

    def consumer(wg):
        mine = key + wg * rows
        here = pl.ds(mine, rows)
        plgpu.copy_gmem_to_smem(k_ref.at[b, here, kv_head], k_smem.at[wg], kv_full.at[wg])
        plgpu.copy_gmem_to_smem(v_ref.at[b, here, kv_head], v_smem.at[wg], kv_full.at[wg])
        kv_ids = None if ids_ref is None else hopper.load_rows(ids_ref.kv.at[b, here])
        low, high = plan.inner_query_blocks(mine, rows, size, limit, first, last)

        def step(g, i, carry, edge):
            dk, dv = carry
            slot = lax.rem(g * num + i - first, stages)

            own = hopper.anew(wg)

            def probabilities(s):
                seen = plan.seen(i * size, mine, limit, s.shape, 1) if edge else None
                if kv_ids is not None:
                    q_ids = hopper.load_columns(scratch["ids"].at[slot])
                    seen = hopper.both(
                        seen, hopper.each_row(kv_ids, s.shape) == hopper.each_column(q_ids, s.shape)
                    )
                lse2 = hopper.load_columns(scratch["lse2"].at[slot])
                return hopper.probabilities(s, plan.scale2, seen, hopper.each_column(lse2, s.shape))

            plgpu.barrier_wait(q_full.at[slot])
            p, ds = hopper.p_and_ds(
                k_smem.at[own],
                q_smem.at[slot],
                probabilities,
                lambda: plgpu.barrier_wait(d_out_full.at[slot]),
                v_smem.at[own],
                d_out_smem.at[slot],
                lambda: hopper.each_column(
                    hopper.load_columns(scratch["delta"].at[slot]), (rows, size)
                ),
                overlap=not edge and kv_ids is None,
            )
            p, ds = p.astype(q_smem.dtype), ds.astype(q_smem.dtype)
            dv, dk = hopper.add_two_products(dv, p, d_out_smem.at[slot], dk, ds, q_smem.at[slot])
            plgpu.barrier_arrive(free.at[slot])
            return dk, dv

        def query_head(g, carry):
            return _edges_and_inside(functools.partial(step, g), first, low, high, last, carry)

        plgpu.barrier_wait(kv_full.at[wg])
        carry = hopper.zeros((rows, H)), hopper.zeros((rows, H))
        dk, dv = lax.fori_loop(0, plan.group, query_head, carry)
        results = ((dk * plan.scale, dk_ref, k_smem), (dv, dv_ref, v_smem))
        for x, ref, smem in results:
            if ref.dtype == smem.dtype:
                smem[wg] = x.astype(smem.dtype)
            else:  # float32 beside bf16 operands, which would not fit
                ref[b, here, kv_head] = x
        if dk_ref.dtype == k_smem.dtype:
            plgpu.commit_smem()
            for _, ref, smem in results:
                plgpu.copy_smem_to_gmem(smem.at[wg], ref.at[b, here, kv_head])
            plgpu.wait_smem_to_gmem(0)

    hopper.specialise(producer, consumer)


def _prepare(spec: Spec, q, k, v, mask: masks.Mask):
    """The plan, the block sizes, and the operands padded to whole blocks."""
    _, N, Q, H = q.shape
    S, K = k.shape[1:3]
    blocks = gpu_blocks(H)
    tile = CONSUMERS * blocks.rows
    N_pad = round_up(N, math.lcm(tile, blocks.dkv_q))
    S_pad = round_up(S, math.lcm(tile, blocks.kv, blocks.dq_kv))
    segments, lengths = mask.segments, mask.lengths
    bounded = lengths is not None or S_pad > S
    plan = _Plan(N, S, Q // K, mask.window, mask.q_offset, spec.scale, bounded)
    if segments is not None:
        q_ids, kv_ids = (x.astype(jnp.int32) for x in segments)
        segments = masks.SegmentIds(padded(q_ids, 1, N_pad), padded(kv_ids, 1, S_pad))
    if lengths is not None:
        lengths = lengths.astype(jnp.int32)
    q, k, v = padded(q, 1, N_pad), padded(k, 1, S_pad), padded(v, 1, S_pad)
    return plan, blocks, (q, k, v, segments, lengths)


def _cost(plan: _Plan, B: int, Q: int, H: int, products: int) -> tuple[int, int]:
    """flops and exponentials of `products` products over the pairs that causality and the window
    let see each other."""
    pairs = B * Q * masks.Mask(plan.window, plan.q_offset).pairs(plan.N, plan.S)
    return 2 * products * pairs * H, pairs


def forward(spec: Spec, q, k, v, mask: masks.Mask):
    """See flash.Kernels."""
    B, N, Q, H = q.shape
    plan, blocks, operands = _prepare(spec, q, k, v, mask)
    segments = mask.segments
    q = operands[0]
    rows, stages = blocks.rows, blocks.stages
    kv = plgpu.SMEM((stages, blocks.kv, H), k.dtype)
    scratch = {
        "q": plgpu.SMEM((CONSUMERS, rows, H), q.dtype),
        "k": kv,
        "v": kv,
        "lse": plgpu.SMEM((CONSUMERS, rows), jnp.float32),
        "ids": None if segments is None else plgpu.SMEM((stages, blocks.kv), jnp.int32),
        "q_full": hopper.barriers(CONSUMERS),
        "k_full": hopper.barriers(stages, 1 if segments is None else 2),
        "v_full": hopper.barriers(stages),
        "k_free": hopper.barriers(stages, CONSUMERS),
        "v_free": hopper.barriers(stages, CONSUMERS),
        "turn": plgpu.Barrier(num_arrivals=CONSUMERS),
    }
    out, lse = hopper.run(
        functools.partial(_forward_kernel, plan),
        kernel_name("forward", "pallas_gpu", plan.window),
        *operands,
        grid=(B, q.shape[1] // (CONSUMERS * rows), Q),
        out_type=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((B, Q, q.shape[1]), jnp.float32),
        ],
        scratch=scratch,
        cost=_cost(plan, B, Q, H, 2),
    )
    return out[:, :N], lse[:, :, :N]


def backward(spec: Spec, q, k, v, mask: masks.Mask, lse2, delta, d_out):
    """See flash.Kernels."""
    B, N, Q, H = q.shape
    S, K = k.shape[1:3]
    plan, blocks, operands = _prepare(spec, q, k, v, mask)
    segments = mask.segments
    q, k = operands[:2]
    lse2, delta = (padded(x, 2, q.shape[1]) for x in (lse2, delta))
    operands += lse2, delta, padded(d_out, 1, q.shape[1])
    rows = blocks.rows
    own = plgpu.SMEM((CONSUMERS, rows, H), q.dtype)

    stages = blocks.dq_stages
    kv = plgpu.SMEM((stages, blocks.dq_kv, H), k.dtype)
    scratch = {
        "q": own,
        "d_out": own,
        "k": kv,
        "v": kv,
        "ids": None if segments is None else plgpu.SMEM((stages, blocks.dq_kv), jnp.int32),
        "q_full": hopper.barriers(CONSUMERS, 2),
        "k_full": hopper.barriers(stages, 1 if segments is None else 2),
        "v_full": hopper.barriers(stages),
        "k_free": hopper.barriers(stages, CONSUMERS),
        "v_free": hopper.barriers(stages, CONSUMERS),
    }
    dq = hopper.run(
        functools.partial(_dq_kernel, plan),
        kernel_name("dq", "pallas_gpu", plan.window),
        *operands,
        grid=(B, q.shape[1] // (CONSUMERS * rows), Q),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch=scratch,
        cost=_cost(plan, B, Q, H, 3),
    )

    stages, size = blocks.dkv_stages, blocks.dkv_q
    queries = plgpu.SMEM((stages, size, H), q.dtype)
    per_query = plgpu.SMEM((stages, size), jnp.float32)
    scratch = {
        "k": own,
        "v": own,
        "q": queries,
        "d_out": queries,
        "lse2": per_query,
        "delta": per_query,
        "ids": None if segments is None else plgpu.SMEM((stages, size), jnp.int32),
        "kv_full": hopper.barriers(CONSUMERS, 2),
        "q_full": hopper.barriers(stages, 2 if segments is None else 3),
        "d_out_full": hopper.barriers(stages, 2),
        "free": hopper.barriers(stages, CONSUMERS),
    }
    dk, dv = hopper.run(
        functools.partial(_dkv_kernel, plan),
        kernel_name("dkv", "pallas_gpu", plan.window),
        *operands,
        grid=(B, k.shape[1] // (CONSUMERS * rows), K),
        out_type=[jax.ShapeDtypeStruct(k.shape, spec.kv_grad_dtype)] * 2,
        scratch=scratch,
        cost=_cost(plan, B, Q, H, 4),
    )
    return dq[:, :N], dk[:, :S], dv[:, :S]
