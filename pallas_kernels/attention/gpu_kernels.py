"""The three attention kernels for NVIDIA Hopper that gpu.py starts: forward, dq, and dk with dv.

A thread block has a producer warpgroup and two consumer warpgroups (`hopper.specialize`). Each
consumer has `rows` rows in shared memory: queries in the forward and for dq, keys for dk and dv.
The producer copies blocks of the other axis to shared memory, one after the other, and both
consumers read them. The function before each kernel (`*_scratch`) says what the kernel stores in
shared memory; its names are the keyword arguments of the kernel. `*_ref` are arrays in device
memory, `*_smem` in shared memory. With the barriers `*_full` and `*_free` the warpgroups tell each
other that data has come, or that it was read.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention import hopper
from pallas_kernels.attention import mask as masks
from pallas_kernels.attention.blocks import GpuBlocks
from pallas_kernels.attention.flash import LOG2E
from pallas_kernels.attention.gpu_plan import KeyVisits, Plan, QueryVisits, Visits, edges_and_inside
from pallas_kernels.attention.hopper import CONSUMERS, KeyStream, Softmax, pl, plgpu


class _Tile(NamedTuple):
    """What one thread block handles: CONSUMERS x `rows` positions from `start` on, of batch row b
    and of one head (a K/V head if they are keys), and the blocks first..last of the other axis. The
    row has `limit` keys. table: see Documents; None without segments."""

    visits: Visits
    number: Any
    b: Any
    head: Any
    start: Any
    limit: Any
    table: Any
    first: Any
    last: Any

    @classmethod
    def at(cls, visits: Visits, number, documents, lengths_ref):
        """The tile with this number in its batch row."""
        b, head = lax.axis_index("batch"), lax.axis_index("heads")
        start, limit = number * (CONSUMERS * visits.rows), visits.plan.limit(lengths_ref, b)
        if documents is None:
            table, (first, last) = None, visits.tile(start, limit)
        else:
            table = documents.table
            first, last = table[b, number * CONSUMERS, 0], table[b, number * CONSUMERS, 3]
        return cls(visits, number, b, head, start, limit, table, first, last)

    @classmethod
    def of_queries(cls, visits: Visits, q_ref, documents, lengths_ref):
        """The tiles that see the most keys start first, so that no long one is left for the end."""
        tiles = q_ref.shape[1] // (CONSUMERS * visits.rows)
        return cls.at(visits, tiles - 1 - lax.axis_index("tiles"), documents, lengths_ref)

    def begin(self, wg):
        """The first position of a consumer."""
        return self.start + wg * self.visits.rows

    def positions(self, wg):
        return pl.ds(self.begin(wg), self.visits.rows)

    def blocks(self, wg):
        """first, low, high, last: the blocks first..last, of which low..high need no mask."""
        if self.table is None:
            inside = self.visits.inside(self.begin(wg), self.limit, self.first, self.last)
        else:
            consumer = self.number * CONSUMERS + wg
            inside = self.table[self.b, consumer, 1], self.table[self.b, consumer, 2]
        return self.first, *inside, self.last

    def mask(self, wg, j, ids, block_ids):
        """Who sees whom among the consumer's positions (the rows) and block j (the columns). ids
        are in registers, block_ids in shared memory; both are None without segments."""
        seen = self.visits.seen(self.begin(wg), j, self.limit)
        if ids is None:
            return seen
        block_ids = hopper.each_column(hopper.load_columns(block_ids), seen.shape)
        return seen & (hopper.each_row(ids, seen.shape) == block_ids)


def _produce_keys(plan: Plan, tile: _Tile, keys: KeyStream, k_ref, v_ref, documents):
    """What the producer does in the forward and for dq."""
    kv_head = lax.div(tile.head, plan.group)
    ids = None if documents is None else documents.kv
    size = keys.k_smem.shape[1]
    keys.fill(tile.first, tile.last, lambda j: j * size, k_ref, v_ref, ids, tile.b, kv_head)


# --- Forward --------------------------------------------------------------------------------------


def forward_scratch(blocks: GpuBlocks, H: int, dtype, segments: bool) -> dict:
    return {
        "q_smem": plgpu.SMEM((CONSUMERS, blocks.rows, H), dtype),  # in the end: out
        "lse_smem": plgpu.SMEM((CONSUMERS, blocks.rows), jnp.float32),
        "q_full": hopper.barriers(CONSUMERS),
        "turn": plgpu.Barrier(num_arrivals=CONSUMERS),
        **KeyStream.scratch(blocks.stages, blocks.kv, H, dtype, segments),
    }


def forward_kernel(
    plan: Plan, q_ref, k_ref, v_ref, documents, lengths_ref, out_ref, lse_ref,
    *, q_smem, lse_smem, q_full, turn, **stream,
):  # fmt: skip
    """out, lse of 2 x `rows` queries of one head: a running softmax over blocks of keys."""
    keys, (_, rows, H) = KeyStream(**stream), q_smem.shape
    stages, size, _ = keys.k_smem.shape
    tile = _Tile.of_queries(KeyVisits(plan, rows, size), q_ref, documents, lengths_ref)

    def consumer(wg):
        here = tile.positions(wg)
        plgpu.copy_gmem_to_smem(q_ref.at[tile.b, here, tile.head], q_smem.at[wg], q_full.at[wg])
        q_ids = None if documents is None else hopper.load_rows(documents.q.at[tile.b, here])

        def take_turn():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def step(j, softmax, edge):
            block = keys.at(lax.rem(j - tile.first, stages))
            plgpu.barrier_wait(block.k_full)
            s = hopper.scores(q_smem.at[wg], block.k_smem, take_turn)
            seen = tile.mask(wg, j, q_ids, block.ids_smem) if edge else None
            plgpu.barrier_arrive(block.k_free)
            p, softmax = softmax.add_scores(s, plan.scale2, seen)
            p = p.astype(q_smem.dtype)
            # The softmax must end before the other warpgroup gets the tensor cores.
            softmax, p = lax.optimization_barrier((softmax, p))
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(block.v_full)
            plgpu.barrier_wait(turn)
            acc = hopper.add_product(softmax.acc, p, block.v_smem)
            plgpu.barrier_arrive(block.v_free)
            return softmax._replace(acc=acc)

        plgpu.barrier_wait(q_full.at[wg])
        pl.when(wg == 1)(take_turn)  # half a step after the other
        softmax = edges_and_inside(step, tile.blocks(wg), Softmax.start(rows, H))
        pl.when(wg == 0)(take_turn)
        _put_results(softmax, q_smem.at[wg], lse_smem.at[wg])
        hopper.copy_out(
            (q_smem.at[wg], out_ref.at[tile.b, here, tile.head]),
            (lse_smem.at[wg], lse_ref.at[tile.b, tile.head, here]),
        )

    produce = functools.partial(_produce_keys, plan, tile, keys, k_ref, v_ref, documents)
    hopper.specialize(produce, consumer)


def _put_results(softmax: Softmax, out_smem, lse_smem):
    """out and the natural log of the sums; 0 and MASKED for rows that have seen nothing."""
    empty = softmax.total == 0.0
    total = jnp.where(empty, 1.0, softmax.total)
    lse_smem[...] = jnp.where(empty, masks.MASKED, softmax.top / LOG2E + jnp.log(total))
    out = softmax.acc * hopper.each_row(1.0 / total, softmax.acc.shape)
    out_smem[...] = out.astype(out_smem.dtype)


# --- Gradients ------------------------------------------------------------------------------------


def _put_gradients(wg, place, *gradients):
    """Writes each array to ref[place] through smem[wg]; gradients are (array in registers, smem,
    ref). An fp32 array does not fit into the smem of bf16 operands, so it is written directly from
    the registers. All gradients have the same dtype."""
    through = [(smem, ref) for _, smem, ref in gradients if ref.dtype == smem.dtype]
    for x, smem, ref in gradients:
        if through:
            smem[wg] = x.astype(smem.dtype)
        else:
            ref[place] = x
    if through:
        hopper.copy_out(*((smem.at[wg], ref.at[place]) for smem, ref in through))


def dq_scratch(blocks: GpuBlocks, H: int, dtype, segments: bool) -> dict:
    own = plgpu.SMEM((CONSUMERS, blocks.rows, H), dtype)
    return {
        "q_smem": own,  # in the end: dq
        "d_out_smem": own,
        "q_full": hopper.barriers(CONSUMERS, 2),
        **KeyStream.scratch(blocks.dq_stages, blocks.dq_kv, H, dtype, segments),
    }


def dq_kernel(
    plan: Plan, q_ref, k_ref, v_ref, documents, lengths_ref, lse2_ref, delta_ref, d_out_ref, dq_ref,
    *, q_smem, d_out_smem, q_full, **stream,
):  # fmt: skip
    """dq of 2 x `rows` queries of one head: p and ds are computed again, block by block of keys."""
    keys, (_, rows, H) = KeyStream(**stream), q_smem.shape
    stages, size, _ = keys.k_smem.shape
    tile = _Tile.of_queries(KeyVisits(plan, rows, size), q_ref, documents, lengths_ref)

    def consumer(wg):
        here = tile.positions(wg)
        place = tile.b, here, tile.head
        plgpu.copy_gmem_to_smem(q_ref.at[place], q_smem.at[wg], q_full.at[wg])
        plgpu.copy_gmem_to_smem(d_out_ref.at[place], d_out_smem.at[wg], q_full.at[wg])
        q_ids = None if documents is None else hopper.load_rows(documents.q.at[tile.b, here])
        lse2 = hopper.load_rows(lse2_ref.at[tile.b, tile.head, here])
        delta = hopper.load_rows(delta_ref.at[tile.b, tile.head, here])

        def step(j, dq, edge):
            block = keys.at(lax.rem(j - tile.first, stages))

            def probabilities(s):
                seen = tile.mask(wg, j, q_ids, block.ids_smem) if edge else None
                return hopper.probabilities(s, plan.scale2, seen, hopper.each_row(lse2, s.shape))

            plgpu.barrier_wait(block.k_full)
            own = hopper.anew(wg)
            _, ds = hopper.p_and_ds(
                (q_smem.at[own], block.k_smem),
                (d_out_smem.at[own], block.v_smem),
                block.v_full,
                probabilities,
                lambda: hopper.each_row(delta, (rows, size)),
                overlap=not edge,
            )
            plgpu.barrier_arrive(block.v_free)
            dq = hopper.add_product(dq, ds.astype(q_smem.dtype), block.k_smem)
            plgpu.barrier_arrive(block.k_free)
            return dq

        plgpu.barrier_wait(q_full.at[wg])
        dq = edges_and_inside(step, tile.blocks(wg), hopper.zeros((rows, H)))
        _put_gradients(wg, place, (dq * plan.scale, q_smem, dq_ref))

    produce = functools.partial(_produce_keys, plan, tile, keys, k_ref, v_ref, documents)
    hopper.specialize(produce, consumer)


class _QueryStream(NamedTuple):
    """Blocks of queries in shared memory, with the arrays that belong to them. Barriers: q_full
    says that q, lse2 and the segment ids (if there are any) have come, d_out_full that d_out and
    delta have come, and free that the block was read."""

    q_smem: Any  # [stages, size, H]
    d_out_smem: Any
    lse2_smem: Any  # [stages, size]
    delta_smem: Any
    ids_smem: Any
    q_full: Any
    d_out_full: Any
    free: Any

    @staticmethod
    def scratch(stages: int, size: int, H: int, dtype, segments: bool) -> dict:
        queries = plgpu.SMEM((stages, size, H), dtype)
        per_query = plgpu.SMEM((stages, size), jnp.float32)
        return {
            "q_smem": queries,
            "d_out_smem": queries,
            "lse2_smem": per_query,
            "delta_smem": per_query,
            "ids_smem": plgpu.SMEM((stages, size), jnp.int32) if segments else None,
            "q_full": hopper.barriers(stages, 3 if segments else 2),
            "d_out_full": hopper.barriers(stages, 2),
            "free": hopper.barriers(stages, CONSUMERS),
        }

    at = hopper.at_slot

    def fill(self, plan: Plan, tile: _Tile, q_ref, documents, lse2_ref, delta_ref, d_out_ref):
        """What the producer does: copies the tile's blocks of queries, for one head after the other
        of the group."""
        num, size = tile.last - tile.first, self.q_smem.shape[1]

        def copies(t, slot):
            head = tile.head * plan.group + lax.div(t, num)
            here = pl.ds((tile.first + lax.rem(t, num)) * size, size)
            b, block, copy_in = tile.b, self.at(slot), plgpu.copy_gmem_to_smem

            def copy():
                copy_in(q_ref.at[b, here, head], block.q_smem, block.q_full)
                copy_in(lse2_ref.at[b, head, here], block.lse2_smem, block.q_full)
                if documents is not None:
                    copy_in(documents.q.at[b, here], block.ids_smem, block.q_full)
                copy_in(d_out_ref.at[b, here, head], block.d_out_smem, block.d_out_full)
                copy_in(delta_ref.at[b, head, here], block.delta_smem, block.d_out_full)

            return (copy,)

        hopper.stream(jnp.int32(0), plan.group * num, copies, (self.free,))


def dkv_scratch(blocks: GpuBlocks, H: int, dtype, segments: bool) -> dict:
    own = plgpu.SMEM((CONSUMERS, blocks.rows, H), dtype)
    return {
        "k_smem": own,  # in the end: dk
        "v_smem": own,  # in the end: dv
        "kv_full": hopper.barriers(CONSUMERS, 2),
        **_QueryStream.scratch(blocks.dkv_stages, blocks.dkv_q, H, dtype, segments),
    }


def dkv_kernel(
    plan: Plan, q_ref, k_ref, v_ref, documents, lengths_ref, lse2_ref, delta_ref, d_out_ref,
    dk_ref, dv_ref, *, k_smem, v_smem, kv_full, **stream,
):  # fmt: skip
    """dk, dv of 2 x `rows` keys of one K/V head: sums over the query heads of its group, and for
    each head over blocks of queries. Scores are [keys, queries], so that p and ds are already the
    left operands of their products."""
    queries, (_, rows, H) = _QueryStream(**stream), k_smem.shape
    stages, size, _ = queries.q_smem.shape
    visits = QueryVisits(plan, rows, size)
    tile = _Tile.at(visits, lax.axis_index("tiles"), documents, lengths_ref)
    num = tile.last - tile.first

    def producer():
        queries.fill(plan, tile, q_ref, documents, lse2_ref, delta_ref, d_out_ref)

    def consumer(wg):
        here = tile.positions(wg)
        place = tile.b, here, tile.head
        plgpu.copy_gmem_to_smem(k_ref.at[place], k_smem.at[wg], kv_full.at[wg])
        plgpu.copy_gmem_to_smem(v_ref.at[place], v_smem.at[wg], kv_full.at[wg])
        kv_ids = None if documents is None else hopper.load_rows(documents.kv.at[tile.b, here])
        blocks = tile.blocks(wg)

        def step(g, i, carry, edge):
            dk, dv = carry
            block = queries.at(lax.rem(g * num + i - tile.first, stages))
            own = hopper.anew(wg)

            def probabilities(s):
                seen = tile.mask(wg, i, kv_ids, block.ids_smem) if edge else None
                lse2 = hopper.each_column(hopper.load_columns(block.lse2_smem), s.shape)
                return hopper.probabilities(s, plan.scale2, seen, lse2)

            plgpu.barrier_wait(block.q_full)
            p, ds = hopper.p_and_ds(
                (k_smem.at[own], block.q_smem),
                (v_smem.at[own], block.d_out_smem),
                block.d_out_full,
                probabilities,
                lambda: hopper.each_column(hopper.load_columns(block.delta_smem), (rows, size)),
                overlap=not edge,
            )
            p, ds = p.astype(k_smem.dtype), ds.astype(k_smem.dtype)
            dv, dk = hopper.add_two_products(dv, p, block.d_out_smem, dk, ds, block.q_smem)
            plgpu.barrier_arrive(block.free)
            return dk, dv

        def query_head(g, carry):
            return edges_and_inside(functools.partial(step, g), blocks, carry)

        plgpu.barrier_wait(kv_full.at[wg])
        carry = hopper.zeros((rows, H)), hopper.zeros((rows, H))
        dk, dv = lax.fori_loop(0, plan.group, query_head, carry)
        _put_gradients(wg, place, (dk * plan.scale, k_smem, dk_ref), (dv, v_smem, dv_ref))

    hopper.specialize(producer, consumer)
