"""Compares the product of groups of rows with one product for each group."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from yocou_jax.model.grouped_matmul import Blocks, block_rows, grouped_matmul

D, F = 6, 10

SIZES = [
    [5],
    [0],
    [3, 0, 4, 1],
    [0, 0, 40, 0],
    [40, 0, 0, 0],
    [0, 0, 0, 40],
    [1] * 9,
    [0, 7, 64, 33, 0, 65, 1, 30],
]


@pytest.mark.parametrize("block", [1, 4, 16, 64])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_each_group_is_one_product(sizes, block):
    """Of 200 rows. After the last group, blocks of any size may end after the last row."""
    rng = np.random.default_rng(0)
    rows = 200
    x, g = rng.normal(size=(rows, D)), rng.normal(size=(rows, F))
    w = rng.normal(size=(len(sizes), D, F))
    ends = np.cumsum(sizes)
    groups = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    y, dx, dw = np.zeros((rows, F)), np.zeros((rows, D)), np.zeros(w.shape)
    for number, group in enumerate(groups):
        y[group] = x[group] @ w[number]
        dx[group] = g[group] @ w[number].T
        dw[number] = x[group].T @ g[group]
    got = gradients(block)(*(a.astype("f4") for a in (x, w)), np.asarray(sizes), g.astype("f4"))
    tiny.assert_close(list(got), [y, dx, dw], 1e-6)


@functools.cache
def gradients(block):
    @jax.jit
    def run(x, w, sizes, g):
        y, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, block), x, w)
        return y, *vjp(g)

    return run


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_group_that_is_not_finite_leaves_the_others_alone(value):
    """A block of the first group ends in the second one, and rows after the last group are in a
    block of the third one."""
    sizes, block = np.array([3, 4, 2]), 4
    x, g = np.ones((12, D), np.float32), np.ones((12, F), np.float32)
    x[3], x[9:] = value, value
    w = np.ones((3, D, F), np.float32)
    y, dx, dw = gradients(block)(x, w, sizes, g)
    assert np.isfinite(np.delete(y[:9], 3, axis=0)).all()
    assert np.isfinite(dx[:9]).all()
    assert np.isfinite(dw[jnp.array([0, 2])]).all()
    assert not np.isfinite(dw[1]).any()


def test_no_row_may_be_left():
    """The last block then ends after the last row."""
    x, w = jnp.ones((7, 1)), jnp.arange(1.0, 4).reshape(3, 1, 1)
    y = grouped_matmul(x, w, jnp.array([1, 5, 1]), 4)
    np.testing.assert_array_equal(y[:, 0], [1, 2, 2, 2, 2, 2, 3])


@pytest.mark.parametrize(("rows", "groups"), [(4096, 8), (16384, 64), (100_000, 64), (1000, 7)])
def test_the_blocks_are_little_more_than_the_rows(rows, groups):
    """The dense product that replaces ragged_dot on CPUs and GPUs has `groups` times the rows. Here
    most of the rows of the array are of no group, and no block."""
    sizes = np.bincount(np.random.default_rng(1).integers(0, groups, rows), minlength=groups)
    block = block_rows(rows / groups)
    blocks = Blocks.of(jnp.asarray(sizes), 8 * rows, block)
    group, begin, count = (np.asarray(array)[: blocks.number] for array in blocks[1:])
    covered = np.concatenate([np.arange(b, b + n) for b, n in zip(begin, count, strict=True)])
    np.testing.assert_array_equal(covered, np.arange(rows))
    np.testing.assert_array_equal(np.repeat(group, count), np.repeat(np.arange(groups), sizes))
    assert blocks.number * block <= 1.25 * rows


@pytest.mark.parametrize(
    ("size", "rows"), [(1 / 8, 1), (1, 2), (4, 8), (16, 32), (128, 32), (256, 64), (4096, 1024)]
)
def test_small_groups_have_one_block(size, rows):
    assert block_rows(size) == rows


def test_one_token_needs_one_block_for_each_of_its_experts():
    assert block_rows(3 / 64) == 1
    number, group, begin, count = Blocks.of(
        jnp.zeros(64, int).at[jnp.array([3, 9, 60])].set(1), 3, 1
    )
    assert (number, group.tolist(), begin.tolist()) == (3, [3, 9, 60], [0, 1, 2])
    assert count.tolist() == [1, 1, 1]


def test_gradients_of_matrices_are_summed_in_float32():
    """In bfloat16, each of the 40 sums would lose what is below its 8 digits."""
    rows, one = 40 * 512, 1 + 2**-7
    x, g = jnp.ones((rows, 1), jnp.bfloat16), jnp.full((rows, 1), one, jnp.bfloat16)
    w, sizes = jnp.ones((1, 1, 1), jnp.bfloat16), jnp.array([rows])
    dw = jax.jit(lambda: jax.vjp(lambda w: grouped_matmul(x, w, sizes, 512), w)[1](g)[0])()
    assert dw.dtype == jnp.bfloat16
    assert dw == jnp.asarray(rows * one, jnp.bfloat16)


def test_only_tpus_get_ragged_dot():
    def both(x, w, sizes):
        y, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, 4), x, w)
        return y, vjp(y)

    traced = jax.jit(both).trace(jnp.ones((8, D)), jnp.ones((2, D, F)), jnp.array([4, 4]))

    def count(platform):
        return traced.lower(lowering_platforms=(platform,)).as_text().count('"chlo.ragged_dot"')

    # The product, and the gradients of x and w.
    assert [count(platform) for platform in ("tpu", "cuda", "cpu")] == [3, 0, 0]
