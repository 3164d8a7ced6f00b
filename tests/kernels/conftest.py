import pytest

from pallas_kernels import block_sizes
from pallas_kernels.attention.blocks import Blocks


@pytest.fixture
def small_blocks():
    """Blocks of 8, so that few positions are enough for many blocks and both edges of a window."""

    def blocks(batch, heads, N, S, window):
        q = min(8, N)
        return Blocks(q, min(S, 8 if window is None else q + window + 1))

    with block_sizes(xla_blocks=blocks):
        yield
