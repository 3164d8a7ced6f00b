import pytest

from pallas_kernels.attention import xla
from pallas_kernels.attention.blocks import Blocks


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 8, so that a handful of positions runs through many blocks and both edges."""

    def blocks(batch, heads, N, S, window):
        q = min(8, N)
        return Blocks(q, min(S, 8 if window is None else q + window + 1))

    monkeypatch.setattr(xla, "xla_blocks", blocks)
