"""A matrix product in which each group of rows has a matrix of its own: the products of experts.

XLA has it for TPUs (`jax.lax.ragged_dot`). For other devices it multiplies every row with the
matrices of all groups, with masks: with 64 experts, 64 times the work. So there, a loop multiplies
one block of rows after the other, each with the matrix of its group.
"""

import functools
import math

import jax
import jax.numpy as jnp

from yocou_jax.typing import Array, Float, Int

MOST_ROWS = 512  # of a block


@jax.custom_vjp
def grouped_matmul(
    x: Float[Array, "M D"], w: Float[Array, "G D F"], sizes: Int[Array, " G"]
) -> Float[Array, "M F"]:
    """The first sizes[0] rows of x times w[0], the next sizes[1] rows times w[1], and so on. If the
    sum of sizes is less than M, the rows that are left have undefined results and gradients."""
    return jax.lax.platform_dependent(
        x, w, sizes, tpu=jax.lax.ragged_dot, default=functools.partial(_in_blocks, transpose=False)
    )


def _forward(x, w, sizes):
    return grouped_matmul(x, w, sizes), (x, w, sizes)


def _backward(kept, g):
    def ragged(x, w, sizes, g):
        (dx,) = jax.linear_transpose(lambda x: jax.lax.ragged_dot(x, w, sizes), x)(g)
        (dw,) = jax.linear_transpose(lambda w: jax.lax.ragged_dot(x, w, sizes), w)(g)
        return dx, dw

    def blocks(x, w, sizes, g):
        return _in_blocks(g, w, sizes, transpose=True), _sums_of_groups(x, g, sizes)

    return *jax.lax.platform_dependent(*kept, g, tpu=ragged, default=blocks), None


grouped_matmul.defvjp(_forward, _backward)


def block_rows(rows: int, groups: int) -> int:
    """A power of 2, so that a group has 4 to 8 blocks on average. The last one of each group is
    partly in vain; but smaller blocks make the single products less efficient."""
    return min(MOST_ROWS, 2 ** math.floor(math.log2(max(rows / groups / 4, 1))))


def _blocks(
    sizes: Int[Array, " G"], rows: int, block: int
) -> tuple[Int[Array, " S"], Int[Array, " S"], Int[Array, " S"]]:
    """(group, first row, number of rows) of each block. There are as many as any sizes may need,
    because XLA has to know it before; those that are left over have 0 rows after the last row."""
    groups = len(sizes)
    most = (rows + min(groups, rows) * (block - 1)) // block
    needed = -(-sizes // block)  # of each group, rounded up
    last = jnp.cumsum(needed)
    number = jnp.arange(most)
    group = jnp.searchsorted(last, number, side="right")
    exists, group = group < groups, jnp.minimum(group, groups - 1)
    done = block * (number - (last - needed)[group])  # rows of the group in earlier blocks
    begin = (jnp.cumsum(sizes) - sizes)[group] + done
    count = jnp.minimum(sizes[group] - done, block)
    return group, jnp.where(exists, begin, rows), jnp.where(exists, count, 0)


def _in_blocks(x, w, sizes, transpose: bool):
    """`grouped_matmul`, also with the transposed matrices. Rows after the last group give 0."""
    rows, block = len(x), block_rows(len(x), len(sizes))
    x = jnp.pad(x, ((0, block), (0, 0)))  # the last block may end after the last row

    def one(y, of_block):
        group, begin, count = of_block
        part = jax.lax.dynamic_slice_in_dim(x, begin, block)
        part = part @ (w[group].T if transpose else w[group])
        # The rows of the next group, which its own blocks will write.
        part = jnp.where(jnp.arange(block)[:, None] < count, part, 0)
        return jax.lax.dynamic_update_slice_in_dim(y, part, begin, 0), None

    y = jnp.zeros((rows + block, w.shape[1 if transpose else 2]), x.dtype)
    return jax.lax.scan(one, y, _blocks(sizes, rows, block))[0][:rows]


def _sums_of_groups(x, g, sizes):
    """The gradient of w: x^T g of the rows of each group, summed in float32."""
    block = block_rows(len(x), len(sizes))
    blocks = _blocks(sizes, len(x), block)
    x, g = (jnp.pad(array, ((0, block), (0, 0))) for array in (x, g))

    def one(sums, of_block):
        group, begin, count = of_block
        a, b = (jax.lax.dynamic_slice_in_dim(array, begin, block) for array in (x, g))
        b = jnp.where(jnp.arange(block)[:, None] < count, b, 0)
        return sums.at[group].add(jnp.dot(a.T, b, preferred_element_type=jnp.float32)), None

    sums = jnp.zeros((len(sizes), x.shape[1], g.shape[1]), jnp.float32)
    return jax.lax.scan(one, sums, blocks)[0].astype(x.dtype)
