"""What the Hopper (sm_90a) kernels are made of: products, arrays in registers, producer and
consumer warpgroups, and the start of a kernel, in Pallas's Mosaic GPU dialect.

The interpreter on the host runs the same kernels; all that differs for it is in this file (`_dot`
and its users). Registers are scarce. Comments say where the compiler needed help, so that it spills
no register to memory; its report (MOSAIC_GPU_DUMP_PTXAS) shows this.
"""

import functools
import inspect
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention import mask as masks
from pallas_kernels.device import interpretation

try:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu
except ImportError as error:  # a jaxlib without it
    pl = plgpu = None
    IMPORT_ERROR = str(error)

CONSUMERS = 2
PRODUCER = CONSUMERS  # warpgroups 0 and 1 multiply, 2 copies
# Registers per thread; the three warpgroups together have 504.
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24


# Products. What a warpgroup multiplies is in shared memory or in its registers.


def _dot(a, b):
    """Replaces wgmma in the interpreter. The interpreter has wgmma only with both operands in
    shared memory and an accumulator that starts at 0. With commit_smem, the operands are read
    before copies overwrite them; wgmma does not need that."""
    plgpu.commit_smem()
    return jnp.dot(a.astype(jnp.float32), b.astype(jnp.float32))


def scores(a, b, meanwhile=lambda: None):
    """a @ b.T in fp32, of a [rows H] and b [columns H] in shared memory. `meanwhile` runs after the
    product starts and before it ends."""
    if interpretation() is not None:
        meanwhile()
        return _dot(a[...], b[...].T)

    def body(acc):
        plgpu.wgmma(acc, a, b.transpose((1, 0)))
        meanwhile()
        return acc[...]

    return pl.run_scoped(body, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))


def p_and_ds(for_p, for_dp, dp_full, probabilities, delta, overlap: bool):
    """p = probabilities(a @ b.T) and ds = p * (c @ d.T - delta()), where a, b = for_p and c, d =
    for_dp. The barrier dp_full says that d has come.

    With `overlap` the second product runs during the exponentials; only blocks without a mask have
    enough registers for that. Without it, the accumulator of the second product starts at -delta,
    so that delta needs no registers of its own.
    """
    (a, b), (c, d) = for_p, for_dp
    if interpretation() is not None:
        p = probabilities(scores(a, b))
        plgpu.barrier_wait(dp_full)
        return p, p * (scores(c, d) - delta())
    if overlap:
        plgpu.barrier_wait(dp_full)

        def body(s, dp):
            plgpu.wgmma(s, a, b.transpose((1, 0)))
            plgpu.wgmma(dp, c, d.transpose((1, 0)))
            return probabilities(plgpu.wgmma_accumulator_load(s, wait_n=1)), dp[...]

        acc = plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32)
        p, dp = pl.run_scoped(body, acc, acc)
        return p, p * (dp - delta())
    p = probabilities(scores(a, b))
    plgpu.barrier_wait(dp_full)
    product = pl.run_state(lambda dp: plgpu.wgmma(dp, c, d.transpose((1, 0))))
    return p, p * product(plgpu.ACC.init(-delta()))


def add_product(acc, a, b):
    """acc + a @ b, of a [rows columns] in registers and b [columns H] in shared memory."""
    if interpretation() is not None:
        return acc + _dot(a, b[...])
    return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(acc))


def add_two_products(first, a, b, second, c, d):
    """first + a @ b, second + c @ d, computed at the same time."""
    if interpretation() is not None:
        return add_product(first, a, b), add_product(second, c, d)

    def body(refs):
        plgpu.wgmma(refs[0], a, b)
        plgpu.wgmma(refs[1], c, d)

    return pl.run_state(body)((plgpu.ACC.init(first), plgpu.ACC.init(second)))


def anew(wg):
    """wg, to index an operand that does not change in a loop. Without this the compiler computes
    the descriptors of the operand's 8 slices before the loop and keeps them in 16 registers."""
    return lax.optimization_barrier(wg)


# Arrays in registers: [rows columns] in the layout of wgmma's results, and vectors with one value
# per row [rows] or per column [columns].


def zeros(shape):
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def per_row(value: float, size: int):
    return plgpu.layout_cast(jnp.full((size,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def load_rows(ref):
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def load_columns(ref):
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)


def each_row(x, shape):
    """x [rows] as [rows columns]."""
    return lax.broadcast_in_dim(x, shape, [0])


def each_column(x, shape):
    """x [columns] as [rows columns]."""
    return lax.broadcast_in_dim(x, shape, [1])


class Softmax(NamedTuple):
    """A running softmax over blocks of keys. top [rows]: the largest score so far, in base 2. acc
    [rows H]: the sum of p v; total [rows]: the sum of p; both for p = exp2(score - top)."""

    acc: Any
    top: Any
    total: Any

    @classmethod
    def start(cls, rows: int, H: int):
        return cls(zeros((rows, H)), per_row(masks.MASKED, rows), per_row(0.0, rows))

    def add_scores(self, s, scale2, seen):
        """p of a block of scores, and the softmax with these scores. The caller adds p v to acc."""
        p, keep, top = exponentials(s, scale2, seen, self.top)
        total = self.total * keep + p.sum(axis=1)
        return p, Softmax(self.acc * each_row(keep, self.acc.shape), top, total)


def exponentials(s, scale2, seen, top):
    """One step of the running softmax over scores s [rows columns], before the scale.

    Returns p, the factor for the sums over earlier keys, and the new maximum. Scores are scaled
    first and then masked with a finite number. In the other order, one multiply-add would scale and
    shift a masked score, and in a row without any key its exponential could be infinite. Here such
    a row is shifted by 0, so that its exponentials are 0.
    """
    if seen is None:
        highest = s.max(axis=1) if scale2 >= 0 else s.min(axis=1)
        new = shift = jnp.maximum(top, highest * scale2)
        p = jnp.exp2(s * scale2 - each_row(shift, s.shape))
    else:
        s = jnp.where(seen, s * scale2, masks.MASKED)
        new = jnp.maximum(top, s.max(axis=1))
        shift = jnp.where(new < masks.MASKED / 2, 0.0, new)
        p = jnp.exp2(s - each_row(shift, s.shape))
    return p, jnp.exp2(top - shift), new


def probabilities(s, scale2, seen, lse2):
    """p [rows columns] of scores before the scale; lse2 has their shape."""
    s = s * scale2 - lse2
    return jnp.exp2(s if seen is None else jnp.where(seen, s, masks.MASKED))


# Threads: how warpgroups share the stages of a stream, what a producer does, how a kernel starts. A
# stage is a place for one block in shared memory; the producer fills the stages in turn.


def at_slot(stream, slot):
    """One stage of all arrays and barriers of a stream."""
    return type(stream)(*(None if x is None else x.at[slot] for x in stream))


class KeyStream(NamedTuple):
    """Blocks of keys, of their segment ids (or None) and of values in shared memory. Barriers:
    k_full says that keys and ids have come, k_free that they were read."""

    k_smem: Any  # [stages, size, H]
    v_smem: Any
    ids_smem: Any  # [stages, size]
    k_full: Any
    v_full: Any
    k_free: Any
    v_free: Any

    @staticmethod
    def scratch(stages: int, size: int, H: int, dtype, segments=False, readers=CONSUMERS) -> dict:
        """readers: how many warpgroups read each block."""
        kv = plgpu.SMEM((stages, size, H), dtype)
        return {
            "k_smem": kv,
            "v_smem": kv,
            "ids_smem": plgpu.SMEM((stages, size), jnp.int32) if segments else None,
            "k_full": barriers(stages, 2 if segments else 1),
            "v_full": barriers(stages),
            "k_free": barriers(stages, readers),
            "v_free": barriers(stages, readers),
        }

    at = at_slot

    def fill(self, first, last, start, k_ref, v_ref, ids_ref, b, head):
        """What the producer does: copies blocks first..last of row b and a K/V head. Block j begins
        at key start(j)."""
        size = self.k_smem.shape[1]

        def copies(j, slot):
            keys, block = pl.ds(start(j), size), self.at(slot)

            def copy_k():
                plgpu.copy_gmem_to_smem(k_ref.at[b, keys, head], block.k_smem, block.k_full)
                if ids_ref is not None:
                    plgpu.copy_gmem_to_smem(ids_ref.at[b, keys], block.ids_smem, block.k_full)

            def copy_v():
                plgpu.copy_gmem_to_smem(v_ref.at[b, keys, head], block.v_smem, block.v_full)

            return copy_k, copy_v

        stream(first, last, copies, (self.k_free, self.v_free))


def copy_out(*pairs):
    """Copies smem, which this warpgroup wrote, to ref, for each pair (smem, ref), and waits until
    the copies have ended."""
    plgpu.commit_smem()
    for smem, ref in pairs:
        plgpu.copy_smem_to_gmem(smem, ref)
    plgpu.wait_smem_to_gmem(0)


def stream(first, last, copies, free):
    """The producer's loop: fills the stages in turn with blocks first..last, then waits until the
    consumers have read the last ones (a thread block must not end while barriers still expect
    arrivals). copies(j, slot) are the functions that start the copies of block j. `free` has an
    array of barriers for each of these functions, with one barrier per stage: the consumers arrive
    there when they have read the stage."""
    stages = free[0].shape[0]

    @pl.loop(first, last)
    def _(j):
        slot = lax.rem(j - first, stages)
        for copy, barrier in zip(copies(j, slot), free, strict=True):
            pl.when(j - first >= stages)(functools.partial(plgpu.barrier_wait, barrier.at[slot]))
            copy()

    @pl.loop(jnp.maximum(last - stages, first), last)
    def _(j):
        for barrier in free:
            plgpu.barrier_wait(barrier.at[lax.rem(j - first, stages)])


def specialize(producer, consumer):
    """Gives each warpgroup its work and its registers."""
    wg = lax.axis_index("wg")

    @pl.when(wg < CONSUMERS)
    def _():
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        consumer(wg)

    @pl.when(wg == PRODUCER)
    def _():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        producer()


def run(body, name: str, *operands, grid, out_type, scratch, cost):
    """Starts a kernel over grid (batch, tiles, heads); the last axis changes fastest. cost is
    (FLOPs, exponentials). In jax 0.11 a Mosaic GPU kernel does not take it."""
    options = {}
    if "cost_estimate" in inspect.signature(plgpu.kernel).parameters:
        arrays = jax.tree.leaves((operands, out_type))
        options["cost_estimate"] = pl.CostEstimate(
            flops=cost[0],
            transcendentals=cost[1],
            bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays),
        )
    if (how := interpretation()) is not None:
        options["interpret"] = plgpu.InterpretGPUParams(detect_races=how.detect_races)
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=grid,
        grid_names=("batch", "tiles", "heads"),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=name,
        **options,
    )(*operands)


def barriers(count: int, arrivals: int = 1):
    return plgpu.Barrier(num_barriers=count, num_arrivals=arrivals)


def ceil_div(x, n):
    return lax.div(x + (n - 1), n)
