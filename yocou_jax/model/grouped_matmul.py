"""A matrix product in which each group of rows has a matrix of its own: the products of experts.

XLA has it for TPUs (`jax.lax.ragged_dot`). For other devices it multiplies every row with the
matrices of all groups, with masks: with 64 experts, 64 times the work. So there, a loop multiplies
one block of rows after the other, each with the matrix of its group. It ends after the last row of
the last group: with experts on several devices, most rows may be those of other devices.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from yocou_jax.typing import Array, Float, Int


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(
    x: Float[Array, "M D"], w: Float[Array, "G D F"], sizes: Int[Array, " G"], block: int
) -> Float[Array, "M F"]:
    """The first sizes[0] rows of x times w[0], the next sizes[1] rows times w[1], and so on. If the
    sum of sizes is less than M, the rows that are left have undefined results and gradients.
    x and w have one type, and sizes are int32. It has a gradient, but no second one and no jvp.
    block: rows that a device other than a TPU multiplies at once (`block_rows`)."""
    products = functools.partial(_in_blocks, block=block, transpose=False)
    return jax.lax.platform_dependent(x, w, sizes, tpu=jax.lax.ragged_dot, default=products)


def _forward(x, w, sizes, block):
    return grouped_matmul(x, w, sizes, block), (x, w, sizes)


def _backward(block, kept, g):
    def ragged(x, w, sizes, g):
        (dx,) = jax.linear_transpose(lambda x: jax.lax.ragged_dot(x, w, sizes), x)(g)
        (dw,) = jax.linear_transpose(lambda w: jax.lax.ragged_dot(x, w, sizes), w)(g)
        return dx, dw

    def blocks(x, w, sizes, g):
        dx = _in_blocks(g, w, sizes, block, transpose=True)
        return dx, _sums_of_groups(x, g, sizes, block).astype(w.dtype)

    return *jax.lax.platform_dependent(*kept, g, tpu=ragged, default=blocks), None


grouped_matmul.defvjp(_forward, _backward)


def block_rows(size: float) -> int:
    """A power of 2, for groups with `size` rows on average. The last block of a group is partly in
    vain, so a large group has 4 to 8 of them. A small group has one, because each block reads the
    whole matrix."""
    return 2 ** math.floor(math.log2(max(size / 4, min(2 * size, 32), 1)))


class Blocks(NamedTuple):
    """Where each block is. There are as many as any sizes may need; the first `number` count."""

    number: Int[Array, ""]
    group: Int[Array, " S"]
    begin: Int[Array, " S"]  # the first row
    count: Int[Array, " S"]  # of rows

    @classmethod
    def of(cls, sizes: Int[Array, " G"], rows: int, block: int) -> "Blocks":
        needed = -(-sizes // block)  # of each group, rounded up
        last = jnp.cumsum(needed)
        most = (rows + min(len(sizes), rows) * (block - 1)) // block
        index = jnp.arange(most)
        group = jnp.searchsorted(last, index, side="right").clip(max=len(sizes) - 1)
        done = block * (index - (last - needed)[group])  # rows of the group in earlier blocks
        begin = (jnp.cumsum(sizes) - sizes)[group] + done
        return cls(last[-1], group, begin, jnp.minimum(sizes[group] - done, block))


def _in_blocks(x, w, sizes, block: int, transpose: bool):
    """`grouped_matmul`, also with the transposed matrices. Rows after the last group give 0."""
    rows, blocks = len(x), Blocks.of(sizes, len(x), block)
    x = jnp.pad(x, ((0, block), (0, 0)))  # the last block may end after the last row

    def one(i, y):
        group, begin, count = blocks.group[i], blocks.begin[i], blocks.count[i]
        part = jax.lax.dynamic_slice_in_dim(x, begin, block)
        part = part @ (w[group].T if transpose else w[group])
        # The rows of the next group, which its own blocks will write.
        part = jnp.where(jnp.arange(block)[:, None] < count, part, 0)
        return jax.lax.dynamic_update_slice_in_dim(y, part, begin, 0)

    y = jnp.zeros((rows + block, w.shape[1 if transpose else 2]), x.dtype)
    return jax.lax.fori_loop(0, blocks.number, one, y)[:rows]


def _sums_of_groups(x, g, sizes, block: int):
    """The gradient of w: x^T g of the rows of each group, summed in float32."""
    blocks = Blocks.of(sizes, len(x), block)
    x, g = (jnp.pad(array, ((0, block), (0, 0))) for array in (x, g))

    def one(i, sums):
        own = jnp.arange(block)[:, None] < blocks.count[i]
        a, b = (jax.lax.dynamic_slice_in_dim(array, blocks.begin[i], block) for array in (x, g))
        a, b = (jnp.where(own, array, 0) for array in (a, b))  # both: 0 times inf is not 0
        part = jnp.dot(a.T, b, preferred_element_type=jnp.float32)
        return sums.at[blocks.group[i]].add(part)

    sums = jnp.zeros((len(sizes), x.shape[1], g.shape[1]), jnp.float32)
    return jax.lax.fori_loop(0, blocks.number, one, sums)
