"""The one table of block sizes.

q: query positions handled at a time (times G heads = rows of one matrix product).
kv: keys handled at a time; for a window the whole band of q + W - 1 keys, rounded up.

xla, measured in CPU time on XLA's CPU backend (2 cores, 2 MB of L2 each), forward + backward:
* full: 128 x 128 beat 256 x 256 by 1.2-1.8x and 128 x 512 by 2-3x from N = 512 to 4096: scores that
  stay in cache and little waste above the diagonal count for more than long products; 64 x 64 is
  1.2x better still at N = 256.
* window: the largest block whose scores fit in about 2 MB. B = 16, 4 heads, W = 128: 32 or 64 beat
  128 by 1.6x; B = 1, 4 heads, W = 512: 128 beats 32 by 1.15x.
"""

from typing import NamedTuple

SCORES_IN_CACHE = 2**19  # fp32 elements: 2 MB
BAND_MULTIPLE = 32  # keys; a band of 159 instead of 160 made exp2 and the copies twice as slow


class Blocks(NamedTuple):
    q: int
    kv: int


def xla_blocks(batch: int, heads: int, N: int, S: int, window: int | None) -> Blocks:
    if window is None:
        size = 64 if N <= 256 else 128
        return Blocks(min(size, N), min(size, S))
    for q in (128, 64, 32):
        q = min(q, N)
        band = min(S, -(-(q + window - 1) // BAND_MULTIPLE) * BAND_MULTIPLE)
        if batch * heads * q * band <= SCORES_IN_CACHE:
            break
    return Blocks(q, band)


TPU_LANES = 128  # blocks of positions are multiples of it


class TpuBlocks(NamedTuple):
    """q, kv: positions per grid step (of the inner axis only where there is no window: a window's
    band is one step). compute: positions of the inner axis per tile of scores."""

    q: int
    kv: int
    compute: int


def tpu_blocks(kind: str, outer: str, H: int, G: int, window: int | None) -> TpuBlocks:
    if outer == "queries":
        rows = 1024 // G if window is None else 512 // G
        q = min(512, max(128, rows // 128 * 128))
        return TpuBlocks(q, 1024, 512)
    return TpuBlocks(1024, 512, 512)


def tpu_decode_block(kind: str, H: int) -> int:
    return 2048
