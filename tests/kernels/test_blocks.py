"""What must be true of the block sizes for every shape."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import api, block_sizes
from pallas_kernels.attention.blocks import (
    BAND_MULTIPLE,
    gpu_blocks,
    tpu_decode_rows,
    xla_blocks,
    xla_decode_keys,
)


def test_a_band_holds_every_key_that_a_block_of_queries_sees():
    """Queries i .. i+q-1 of a window W see the keys i-W+1 .. i+q-1: q + W - 1 of them."""
    for window, N, batch in itertools.product(range(1, 300), (1, 31, 32, 33, 64, 700), (1, 64)):
        blocks = xla_blocks(batch, 4, N, N, window, False)
        assert 1 <= blocks.q <= N
        assert min(N, blocks.q + window - 1) <= blocks.kv <= N


def test_other_block_sizes_hold_inside_the_context_only():
    usual, other = tpu_decode_rows(128), tpu_decode_rows(128) // 2
    with block_sizes(tpu_decode_rows=lambda H: tpu_decode_rows(H) // 2):  # asks the usual one
        assert tpu_decode_rows(128) == other
        with block_sizes(gpu_blocks=lambda H: "mine"):
            assert (tpu_decode_rows(128), gpu_blocks(64)) == (other, "mine")
        assert gpu_blocks(64) != "mine"
    assert tpu_decode_rows(128) == usual


def test_a_table_that_does_not_exist_cannot_be_replaced():
    with pytest.raises(ValueError, match=r"replaces gpu_blocks, .*xla_decode_keys; got blocks\."):
        block_sizes(blocks=print)


@pytest.mark.parametrize("sees_all", [False, True])
def test_blocks_of_full_attention_add_few_positions(sees_all):
    """A length just above a block would otherwise be rounded up to two of them."""
    for N, rows in itertools.product((1, 31, 513, 1025, 1100, 2049, 5000), (1, 8, 64)):
        blocks = xla_blocks(1, rows, N, 4096, None, sees_all)
        assert 1 <= blocks.q <= N
        assert -(-N // blocks.q) * blocks.q - N < BAND_MULTIPLE * -(-N // blocks.q)


def test_decode_reads_chunks_of_one_size_in_bytes():
    assert xla_decode_keys("cpu", 4, 128, 4) == xla_decode_keys("cpu", 4, 128, 2) // 2 == 64
    assert xla_decode_keys("cpu", 1, 512, 4) == 64
    assert xla_decode_keys("cpu", 1, 4, 4) == 512  # never more
    assert xla_decode_keys("cpu", 64, 1024, 4) == 128  # 128 KB would be less than 16 keys
    assert xla_decode_keys("gpu", 4, 128, 4) == 512


@pytest.mark.parametrize(
    ("shape", "blocks"),
    [
        ((8, 4, 256, 256, None, False), (64, 64)),
        ((2, 1, 1024, 1024, None, False), (128, 128)),
        ((16, 4, 512, 512, None, False), (256, 256)),
        ((1, 2, 2048, 2048, None, False), (512, 512)),
        ((1, 8, 1536, 1536, None, False), (256, 256)),
        ((1, 8, 2048, 2048, None, False), (512, 512)),
        ((4, 8, 2048, 2048, None, False), (256, 256)),
        ((4, 8, 4096, 4096, None, False), (512, 256)),
        ((1, 2, 2048, 8192, None, True), (2048, 512)),
        ((1, 8, 2048, 8192, None, True), (1024, 512)),
        ((4, 8, 2048, 8192, None, True), (512, 256)),
        ((1, 2, 512, 1024, None, True), (64, 64)),
    ],
)
def test_blocks_of_some_shapes(shape, blocks):
    assert xla_blocks(*shape) == blocks


def test_attention_says_if_every_query_sees_every_key():
    asked = []

    def noted(*shape):
        asked.append(shape)
        return xla_blocks(*shape)

    q, k = jnp.zeros((2, 3, 4, 8)), jnp.zeros((2, 5, 2, 8))
    with block_sizes(xla_blocks=noted):
        for offset in (0, 3, 4):
            attend = functools.partial(api.cross_attention, q_offset=offset)
            jax.eval_shape(functools.partial(attend, implementation="xla"), q, k, k)
    assert asked == [(2, 4, 3, 5, None, sees_all) for sees_all in (False, False, True)]


@pytest.mark.parametrize(("N", "S", "q_offset"), [(1057, 1057, 0), (2100, 2200, 2200)])
def test_long_attention_with_its_usual_blocks_is_right(N, S, q_offset):
    """Lengths that no block divides, with queries among the keys and after all keys."""
    keys = jax.random.split(jax.random.key(N + S), 3)
    q = jax.random.normal(keys[0], (1, N, 2, 8))
    k, v = (jax.random.normal(key, (1, S, 1, 8)) for key in keys[1:])
    how = {"q_offset": q_offset, "kv_lengths": jnp.array([S - 5])}

    def attend(*arrays, implementation):
        return (api.cross_attention(*arrays, **how, implementation=implementation) ** 2).sum()

    run = jax.jit(jax.grad(attend, (0, 1, 2)), static_argnames="implementation")
    expected = run(q, k, v, implementation="reference")
    found = run(q, k, v, implementation="xla")
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)
