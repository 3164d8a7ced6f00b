"""What must be true of the block sizes for every shape."""

import itertools

import pytest

from pallas_kernels import block_sizes
from pallas_kernels.attention.blocks import gpu_blocks, tpu_decode_rows, xla_blocks


def test_a_band_holds_every_key_that_a_block_of_queries_sees():
    """Queries i .. i+q-1 of a window W see the keys i-W+1 .. i+q-1: q + W - 1 of them."""
    for window, N, batch in itertools.product(range(1, 300), (1, 31, 32, 33, 64, 700), (1, 64)):
        blocks = xla_blocks(batch, 4, N, N, window)
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
    with pytest.raises(ValueError, match=r"replaces gpu_blocks, .*xla_blocks; got blocks\."):
        block_sizes(blocks=print)
