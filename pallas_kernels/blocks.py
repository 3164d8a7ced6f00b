"""The one table of block sizes, one row for each implementation and operation.

q: query positions handled at a time (times G heads = rows of a matrix product).
kv: keys handled at a time; unused by window kernels that take the whole band of q + W - 1 keys.
unroll: with at most this many query blocks the loop is written out, so that every slice is static
and the blocks at the edges are trimmed to the keys they can see.
"""

from typing import NamedTuple


class Blocks(NamedTuple):
    q: int
    kv: int
    unroll: int


BLOCKS = {
    ("xla", "window"): Blocks(q=128, kv=0, unroll=8),
    ("xla", "full"): Blocks(q=256, kv=512, unroll=4),
}


def blocks(implementation: str, window: int | None) -> Blocks:
    return BLOCKS[implementation, "full" if window is None else "window"]
