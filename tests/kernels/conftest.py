import pytest

from pallas_kernels import block_sizes
from pallas_kernels.attention import xla
from pallas_kernels.attention.blocks import Blocks


@pytest.fixture
def few_blocks():
    """Blocks of 8, so that few positions are enough for several blocks and both edges of a window.
    They are so few that xla unrolls them, if no row has a length."""

    def blocks(batch, heads, N, S, window, sees_all):
        q = min(8, N)
        return Blocks(q, min(S, 8 if window is None else q + window + 1))

    with block_sizes(xla_blocks=blocks):
        yield


@pytest.fixture
def small_blocks(few_blocks, monkeypatch):
    """The same blocks, in the loops that xla has for many."""
    monkeypatch.setattr(xla, "XLA_UNROLLED_BLOCKS", 0)
