"""Decode for NVIDIA Hopper (sm_90a) in Pallas's Mosaic GPU dialect: one query per row over a cache.

Why it exists: a decode step reads each valid key and value once and does little else, so it should
run at the speed of device memory. XLA reads the whole cache, valid or not.

How: the valid keys of a row are split over so many thread blocks that every multiprocessor reads
all the time (flash decoding). How many keys each gets depends on `valid` at run time. So a short
row is split as evenly as a long one, and no block after the valid length is loaded. A producer
warpgroup always has the copies of `decode_stages` blocks of keys and values under way (160 KB for
heads of 128). The two consumer warpgroups take the blocks in turn. The query heads of a group are
rows of one product. wgmma needs 64 rows, so most of its arithmetic is wasted; but it should take
only a third of the time that the copies take. Each thread block writes its average in fp32 with the
log of its sum, and XLA joins them. The ring of the window uses the same kernel: the order of the
keys does not change a softmax.

How it rounds and what it runs on: as gpu.py. Expected limit on an H200: 85% of 4.3 TB/s over a long
cache. Over a ring of 512 keys, to start the two kernels (this one and that of the join) takes
longer than to copy the bytes.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention import hopper
from pallas_kernels.attention import mask as masks
from pallas_kernels.attention.blocks import gpu_blocks
from pallas_kernels.attention.flash import LOG2E, kernel_name, padded, round_up
from pallas_kernels.attention.hopper import CONSUMERS, KeyStream, Softmax, pl, plgpu
from pallas_kernels.attention.join import join_splits

MULTIPROCESSORS = 132  # H100 SXM, H200
STARTUP = 4  # blocks of keys that are read in the time that a thread block needs to start (a guess)


def _splits(rows: int, S: int, size: int) -> int:
    """How many thread blocks share one of the `rows` pairs of batch row and K/V head: the number
    that takes the least time, the smallest one if there are several."""

    def time(splits):
        waves = -(-rows * splits // MULTIPROCESSORS)
        return waves * (-(-S // (size * splits)) + STARTUP)

    return min(range(1, max(1, S // (CONSUMERS * size)) + 1), key=time)


def _kernel(
    splits, scale2, q_ref, k_ref, v_ref, valid_ref, out_ref, lse2_ref,
    *, q_smem, out_smem, top_smem, total_smem, q_full, merge, **stream,
):  # fmt: skip
    """The average of one share of the values, and the log of its sum in base 2.

    q [B K R H]: R query heads of a group, padded to a multiple of 8. out [B K splits R H],
    lse2 [B K splits R]. Rows of the tile after the first R are not initialized and not used.
    """
    keys, rows = KeyStream(**stream), q_smem.shape[0]
    stages, size, H = keys.k_smem.shape
    S, heads = k_ref.shape[1], pl.ds(0, q_ref.shape[2])
    b, split, kv_head = (lax.axis_index(x) for x in ("batch", "tiles", "heads"))
    valid = valid_ref[b]
    first, last = _share(hopper.ceil_div(valid, size), split, splits)

    def start(j):
        """The last block of the cache is moved back inside it."""
        return jnp.minimum(j * size, S - size)

    def consumer(wg):
        def step(i, softmax):
            j = first + i * CONSUMERS + wg
            block = keys.at(lax.rem(j - first, stages))
            plgpu.barrier_wait(block.k_full)
            s = hopper.scores(q_smem, block.k_smem)
            plgpu.barrier_arrive(block.k_free)
            slots = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA)
            slots += start(j)
            p, softmax = softmax.add_scores(s, scale2, (slots >= j * size) & (slots < valid))
            plgpu.barrier_wait(block.v_full)
            acc = hopper.add_product(softmax.acc, p.astype(q_smem.dtype), block.v_smem)
            plgpu.barrier_arrive(block.v_free)
            return softmax._replace(acc=acc)

        @pl.when(wg == 0)
        def _():
            plgpu.copy_gmem_to_smem(q_ref.at[b, kv_head], q_smem.at[heads], q_full)

        plgpu.barrier_wait(q_full)
        softmax = Softmax.start(rows, H)
        steps = hopper.ceil_div(jnp.maximum(last - first - wg, 0), CONSUMERS)
        softmax = lax.fori_loop(0, steps, step, softmax)

        @pl.when(wg == 1)
        def _():
            out_smem[...], top_smem[...], total_smem[...] = softmax
            plgpu.barrier_arrive(merge)

        @pl.when(wg == 0)
        def _():
            plgpu.barrier_wait(merge)
            _merge(softmax, out_smem, top_smem, total_smem)
            hopper.copy_out(
                (out_smem.at[heads], out_ref.at[b, kv_head, split]),
                (top_smem.at[heads], lse2_ref.at[b, kv_head, split]),
            )

    produce = functools.partial(keys.fill, first, last, start, k_ref, v_ref, None, b, kv_head)
    hopper.specialize(produce, consumer)


def _share(num, split, splits: int):
    """first, last: which of `num` blocks of keys the thread block `split` of `splits` reads."""
    share = hopper.ceil_div(num, splits)
    first = jnp.minimum(split * share, num)
    return first, jnp.minimum(first + share, num)


def _merge(mine: Softmax, out_smem, top_smem, total_smem):
    """Joins what this consumer summed with what the other one wrote to shared memory. Then it
    writes the average to out_smem and the log of the sum to top_smem."""
    acc = plgpu.load(out_smem, layout=plgpu.Layout.WGMMA, optimized=False)
    other = Softmax(acc, hopper.load_rows(top_smem), hopper.load_rows(total_smem))
    top = jnp.maximum(mine.top, other.top)
    my_weight, its_weight = jnp.exp2(mine.top - top), jnp.exp2(other.top - top)
    total = mine.total * my_weight + other.total * its_weight
    empty = total == 0.0
    total = jnp.where(empty, 1.0, total)
    my_weight, its_weight = my_weight / total, its_weight / total
    average = mine.acc * hopper.each_row(my_weight, acc.shape)
    out_smem[...] = average + other.acc * hopper.each_row(its_weight, acc.shape)
    top_smem[...] = jnp.where(empty, masks.MASKED, top + jnp.log(total) * LOG2E)


def decode(q, k, v, valid, *, scale):
    """As `reference.decode`: q [B Q H], k and v [B S K H], valid [B] -> [B Q H], [B Q]."""
    B, Q, H = q.shape
    K = k.shape[2]
    G = Q // K
    blocks = gpu_blocks(H)
    size = blocks.decode_kv
    # A length that is not a multiple of 8 does not compile, so such a cache is copied in each call.
    # The copy has more slots, but none of them is valid: api.py limits `valid` to S.
    S, R = max(round_up(k.shape[1], 8), size), round_up(G, 8)
    k, v = (padded(x, 1, S).astype(q.dtype) for x in (k, v))
    q_rows = padded(q.reshape(B, K, G, H), 2, R)
    splits = _splits(B * K, S, size)
    per_row = plgpu.SMEM((blocks.rows,), jnp.float32)
    out, lse2 = hopper.run(
        functools.partial(_kernel, splits, scale * LOG2E),
        kernel_name("decode", "pallas_gpu"),
        q_rows,
        k,
        v,
        valid.astype(jnp.int32),
        grid=(B, splits, K),
        out_type=[
            jax.ShapeDtypeStruct((B, K, splits, R, H), jnp.float32),
            jax.ShapeDtypeStruct((B, K, splits, R), jnp.float32),
        ],
        scratch={
            "q_smem": plgpu.SMEM((blocks.rows, H), q.dtype),
            "out_smem": plgpu.SMEM((blocks.rows, H), jnp.float32),
            "top_smem": per_row,
            "total_smem": per_row,
            "q_full": plgpu.Barrier(),
            "merge": plgpu.Barrier(),
            **KeyStream.scratch(blocks.decode_stages, size, H, q.dtype, readers=1),
        },
        cost=(4 * B * Q * S * H, B * Q * S),
    )
    out, lse = join_splits(out[:, :, :, :G], lse2[:, :, :, :G], axis=2)
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(B, Q)
