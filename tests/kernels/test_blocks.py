"""The table of block sizes: what no shape may break."""

import itertools

from pallas_kernels.attention.blocks import xla_blocks


def test_a_band_holds_every_key_that_a_block_of_queries_sees():
    """Queries i .. i+q-1 of a window W see the keys i-W+1 .. i+q-1: q + W - 1 of them."""
    for window, N, batch in itertools.product(range(1, 300), (1, 31, 32, 33, 64, 700), (1, 64)):
        blocks = xla_blocks(batch, 4, N, N, window)
        assert 1 <= blocks.q <= N
        assert min(N, blocks.q + window - 1) <= blocks.kv <= N
