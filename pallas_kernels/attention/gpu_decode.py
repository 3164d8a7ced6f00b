"""Decode for NVIDIA Hopper (sm_90a) in Pallas's Mosaic GPU dialect: one query a row over a cache.

Why it exists: a decode step reads each valid key and value once and does little else, so it should
run at the speed of device memory. XLA reads the whole cache, valid or not.

How: the valid keys of a row are split over enough thread blocks to keep every multiprocessor
reading (flash decoding). How many keys each gets follows from `valid` at run time, so a short row
is split as evenly as a long one, and no block beyond the valid length is loaded. A producer
warpgroup keeps `decode_stages` blocks of keys and values in flight (160 KB for heads of 128); two
consumer warpgroups take every other block. The query heads of a group are rows of one product,
which wgmma wants 64 of: wasted arithmetic, a third of the time that the bytes take. Each thread
block leaves its average in fp32 with the log of its sum, and XLA combines them. The ring buffer of
the window needs no kernel of its own: softmax does not care in which order the keys lie.

How it rounds and what it runs on: as gpu.py. Expected limit on an H200: 85% of 4.3 TB/s over
a long cache; over a ring of 512 keys the two launches (kernel, combination) outweigh the bytes.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention import hopper
from pallas_kernels.attention import mask as masks
from pallas_kernels.attention.blocks import gpu_blocks
from pallas_kernels.attention.flash import LOG2E, kernel_name, padded, round_up
from pallas_kernels.attention.hopper import CONSUMERS, pl, plgpu
from pallas_kernels.attention.join import join_splits

MULTIPROCESSORS = 132  # H100 SXM, H200
STARTUP = 4  # what a thread block costs beside its keys, in blocks of keys (a guess)


def _splits(rows: int, S: int, size: int) -> int:
    """Thread blocks per (row, K/V head) of which there are `rows`: the fewest that finish first."""

    def time(splits):
        waves = -(-rows * splits // MULTIPROCESSORS)
        return waves * (-(-S // (size * splits)) + STARTUP)

    return min(range(1, max(1, S // (CONSUMERS * size)) + 1), key=time)


def _kernel(splits, scale2, q_ref, k_ref, v_ref, valid_ref, out_ref, lse2_ref, **scratch):
    """The average of one share of the values, and the log of its sum in base 2.

    q [B K R H] with R query heads of a group, padded to a multiple of 8; out [B K P R H] and lse2
    [B K P R] with P splits. What lies in rows R.. of the tile is not initialised and not used.
    """
    q_smem, k_smem, v_smem, out_smem = (scratch[x] for x in ("q", "k", "v", "out"))
    top_smem, total_smem = scratch["top"], scratch["total"]
    k_full, v_full, k_free, v_free = (scratch[x] for x in ("k_full", "v_full", "k_free", "v_free"))
    q_full, merge = scratch["q_full"], scratch["merge"]
    (stages, size, H), rows = k_smem.shape, q_smem.shape[0]
    S, heads = k_ref.shape[1], pl.ds(0, q_ref.shape[2])
    b, split, kv_head = (lax.axis_index(x) for x in ("batch", "tiles", "heads"))
    valid = jnp.minimum(valid_ref[b], S)
    num = hopper.ceil_div(valid, size)
    share = hopper.ceil_div(num, splits)
    first = jnp.minimum(split * share, num)
    last = jnp.minimum(first + share, num)

    def start(j):
        """The last block of the cache is moved back inside it."""
        return jnp.minimum(j * size, S - size)

    def producer():
        def copies(j, slot):
            keys = pl.ds(start(j), size)
            triples = ((k_ref, k_smem, k_full), (v_ref, v_smem, v_full))
            return [
                functools.partial(
                    plgpu.copy_gmem_to_smem,
                    ref.at[b, keys, kv_head],
                    smem.at[slot],
                    full.at[slot],
                )
                for ref, smem, full in triples
            ]

        hopper.stream(first, last, copies, (k_free, v_free))

    def consumer(wg):
        def step(i, carry):
            acc, top, total = carry
            j = first + i * CONSUMERS + wg
            slot = lax.rem(j - first, stages)
            plgpu.barrier_wait(k_full.at[slot])
            s = hopper.scores(q_smem, k_smem.at[slot])
            plgpu.barrier_arrive(k_free.at[slot])
            slots = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA)
            slots += start(j)
            seen = (slots >= j * size) & (slots < valid)
            p, keep, top = hopper.exponentials(s, scale2, seen, top)
            total = total * keep + p.sum(axis=1)
            acc = acc * hopper.each_row(keep, acc.shape)
            plgpu.barrier_wait(v_full.at[slot])
            acc = hopper.add_product(acc, p.astype(v_smem.dtype), v_smem.at[slot])
            plgpu.barrier_arrive(v_free.at[slot])
            return acc, top, total

        @pl.when(wg == 0)
        def _():
            plgpu.copy_gmem_to_smem(q_ref.at[b, kv_head], q_smem.at[heads], q_full)

        plgpu.barrier_wait(q_full)
        carry = (
            hopper.zeros((rows, H)),
            hopper.per_row(masks.MASKED, rows),
            hopper.per_row(0.0, rows),
        )
        steps = hopper.ceil_div(jnp.maximum(last - first - wg, 0), CONSUMERS)
        acc, top, total = lax.fori_loop(0, steps, step, carry)

        @pl.when(wg == 1)
        def _():
            out_smem[...] = acc
            top_smem[...] = top
            total_smem[...] = total
            plgpu.barrier_arrive(merge)

        @pl.when(wg == 0)
        def _():
            plgpu.barrier_wait(merge)
            other = plgpu.load(out_smem, layout=plgpu.Layout.WGMMA, optimized=False)
            other_top, other_total = hopper.load_rows(top_smem), hopper.load_rows(total_smem)
            highest = jnp.maximum(top, other_top)
            mine, its = jnp.exp2(top - highest), jnp.exp2(other_top - highest)
            sums = total * mine + other_total * its
            empty = sums == 0.0
            sums = jnp.where(empty, 1.0, sums)
            mine, its = mine / sums, its / sums
            average = acc * hopper.each_row(mine, acc.shape)
            out_smem[...] = average + other * hopper.each_row(its, acc.shape)
            top_smem[...] = jnp.where(empty, masks.MASKED, highest + jnp.log(sums) * LOG2E)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[heads], out_ref.at[b, kv_head, split])
            plgpu.copy_smem_to_gmem(top_smem.at[heads], lse2_ref.at[b, kv_head, split])
            plgpu.wait_smem_to_gmem(0)

    hopper.specialise(producer, consumer)


def decode(q, k, v, valid, *, scale):
    """Same contract as `reference.decode`."""
    B, Q, H = q.shape
    K = k.shape[2]
    G = Q // K
    blocks = gpu_blocks(H)
    size, stages = blocks.decode_kv, blocks.decode_stages
    S, R = max(k.shape[1], size), round_up(G, 8)
    k, v = (padded(x, 1, S).astype(q.dtype) for x in (k, v))
    q_rows = padded(q.reshape(B, K, G, H), 2, R)
    splits = _splits(B * K, S, size)
    kv = plgpu.SMEM((stages, size, H), k.dtype)
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
            "q": plgpu.SMEM((blocks.rows, H), q.dtype),
            "k": kv,
            "v": kv,
            "out": plgpu.SMEM((blocks.rows, H), jnp.float32),
            "top": per_row,
            "total": per_row,
            "q_full": plgpu.Barrier(),
            "merge": plgpu.Barrier(),
            "k_full": hopper.barriers(stages),
            "v_full": hopper.barriers(stages),
            "k_free": hopper.barriers(stages),
            "v_free": hopper.barriers(stages),
        },
        cost=(4 * B * Q * S * H, B * Q * S),
    )
    out = join_splits(out[:, :, :, :G], lse2[:, :, :, :G], axis=2)
    return out.reshape(q.shape).astype(q.dtype)
