"""All block sizes, and the head widths that they are for.

`with block_sizes(xla_blocks=...)` replaces one of these functions by another.

q: query positions that are handled at a time. Times the G heads of a group, these are the rows of
one matrix product. kv: keys that are handled at a time. With a window, a block of q queries sees a
band of q + W - 1 keys; for xla, kv is the whole band, rounded up.

xla, measured on XLA's CPU backend (2 cores; all but the window on a processor with AVX-512 and 2 MB
of L2 cache for each core; LOG.md, 2026-11-27):
* window: the largest block with scores of at most about 2 MB. B = 16, 4 heads, W = 128: 32 or 64
  beat 128 by 1.6x; B = 1, 4 heads, W = 512: 128 beats 32 by 1.15x.
* full, at most 1024 positions with few scores in all: the loop over blocks is unrolled, and a block
  takes the keys that it sees in one piece. Blocks of 64 or 128 queries were 1.1-1.6x as fast as
  those of 256; with more scores they are slower, and need much memory.
* full, longer: products must be long, although long blocks have more pairs above the diagonal. 256
  x 256; 512 x 512 for at most 2 heads in all rows, and for 3 to 8 from N = 2048 on; 512 x 256 for
  more heads from N = 4096 on. These took 0.5-0.85 of the time of 256 x 256; with 3 heads or more
  and shorter N they were slower.
* full, more than 1024 positions, if every query sees every key: blocks may be longer. Forward, 2048
  queries and 6144 keys: 2048 x 512 took 0.69 of the time of 512 x 512 (2 heads), 1024 x 512 0.86 (8
  heads). The backward pass takes the same blocks; it was not measured. They need more memory: 47
  instead of 15 MB for 4 heads.
* decode, on a CPU: 128 KB of keys took 0.63-0.85 of the time of 512 keys (6 sizes in fp32); 32, 64
  and 256 KB were slower. If that is less than 16 keys, 128 keys took 0.68-1.05 of it.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

_stand_ins: contextvars.ContextVar[Mapping[str, Callable]] = contextvars.ContextVar(
    "pallas_kernels_block_sizes", default=MappingProxyType({})
)
_REPLACEABLE = set()


@contextlib.contextmanager
def _set(stand_ins: Mapping[str, Callable], outer: bool = False):
    token = _stand_ins.set({**(_stand_ins.get() if outer else {}), **stand_ins})
    try:
        yield
    finally:
        _stand_ins.reset(token)


def block_sizes(**stand_ins: Callable):
    """Inside this context, kernels get their block sizes from the functions given. These have the
    names and the arguments of the functions in this file, and each may call the one that it
    replaces. They are called while a function is traced: a function that was compiled outside does
    not change, and one that is compiled inside keeps its blocks.

    Raises:
      ValueError: a name that is not one of these functions.
    """
    if unknown := sorted(stand_ins.keys() - _REPLACEABLE):
        known = ", ".join(sorted(_REPLACEABLE))
        raise ValueError(f"block_sizes() replaces {known}; got {', '.join(unknown)}.")
    return _set(stand_ins, outer=True)


def _replaceable(function: Callable) -> Callable:
    name = function.__name__
    _REPLACEABLE.add(name)

    @functools.wraps(function)
    def answer(*args, **kwargs):
        stand_in = _stand_ins.get().get(name)
        if stand_in is None:
            return function(*args, **kwargs)
        with _set({}):
            return stand_in(*args, **kwargs)

    return answer


SCORES_IN_CACHE = 2**19  # fp32 elements: 2 MB
LONG_BLOCK_SCORES = 2**22  # fp32 elements: 16 MB
XLA_DECODE_KEYS = 512
XLA_DECODE_BYTES = 2**17  # of the keys of all rows
XLA_UNROLLED_BLOCKS = 8  # more take long to compile
# Of all heads and rows, fp32 elements: XLA may keep those of several unrolled blocks at a time.
XLA_UNROLLED_SCORES = 2**23
BAND_MULTIPLE = 32  # keys; a band of 159 instead of 160 made exp2 and the copies twice as slow


class Blocks(NamedTuple):
    q: int
    kv: int


def _even(length: int, largest: int) -> int:
    """The size of equal blocks of `length` positions: at most `largest`, and a multiple of
    BAND_MULTIPLE if there are several."""
    each = -(-length // -(-length // largest))
    return min(length, -(-each // BAND_MULTIPLE) * BAND_MULTIPLE)


@_replaceable
def xla_blocks(
    batch: int, heads: int, N: int, S: int, window: int | None, sees_all: bool
) -> Blocks:
    """sees_all: without lengths and segments, every query would see every key."""
    heads_in_all = batch * heads
    if window is None:
        long = max(N, S) > 1024
        if not long and heads_in_all * N * S <= XLA_UNROLLED_SCORES:
            size = 64 if N <= 64 * XLA_UNROLLED_BLOCKS else 128
            return Blocks(min(size, N), min(size, S))
        if sees_all and long:
            kv = 512 if heads_in_all <= 8 else 256
            q = next((q for q in (2048, 1024) if heads_in_all * q * kv <= LONG_BLOCK_SCORES), 512)
        else:
            least = 0 if heads_in_all <= 2 else 2048 if heads_in_all <= 8 else 4096
            q = 512 if least <= N else 256
            kv = q if heads_in_all <= 8 else 256
        return Blocks(_even(N, q), _even(S, kv))
    for q in (128, 64, 32):
        q = min(q, N)
        band = min(S, -(-(q + window - 1) // BAND_MULTIPLE) * BAND_MULTIPLE)
        if heads_in_all * q * band <= SCORES_IN_CACHE:
            break
    return Blocks(q, band)


@_replaceable
def xla_decode_keys(platform: str, batch: int, width: int, itemsize: int) -> int:
    """How many keys of all rows decode reads at a time. width: K H numbers of `itemsize` bytes."""
    if platform != "cpu":
        return XLA_DECODE_KEYS
    keys = XLA_DECODE_BYTES // (batch * width * itemsize)
    return min(keys, XLA_DECODE_KEYS) if keys >= 16 else 128


def _next(H: int, widths: tuple[int, ...]) -> int:
    """The smallest of the widths that is at least H. If there is none, which happens only in an
    interpreter, the largest."""
    return next((width for width in widths if width >= H), widths[-1])


TPU_HEAD_WIDTHS = (64, 128, 256)
TPU_LANES = 128  # blocks of positions are multiples of it
# How many bytes of VMEM (the fast memory of a TPU core, 128 MB; tpu7x: 64) a kernel may take. XLA's
# default of 16 MB is too little for 8 heads of 256. The kernels were compiled for these devices.
TPU_VMEM = {
    "TPU v5 lite": 96 * 2**20,
    "TPU v5": 80 * 2**20,
    "TPU v6 lite": 96 * 2**20,
    "TPU7x": 48 * 2**20,
}


class TpuBlocks(NamedTuple):
    """q, kv: queries and keys per grid step. With a window, the size of the inner axis (keys, for
    dkv queries) is not used, because its whole band is one step. compute: the largest number of
    positions of the inner axis in a tile of scores."""

    q: int
    kv: int
    compute: int


@_replaceable
def tpu_blocks(kernel: str, G: int, window: int | None) -> TpuBlocks:
    """kernel "forward", "dq" or "dkv"; G query heads per K/V head.

    One set for all generations and head widths: with it and `tpu_form`, no tile of G = 1 and
    H = 128 takes more cycles than splash's on v5e, v5p, v6e and tpu7x. It was chosen before
    `tpu_form`, by static cycles on v6e (instructions of the compiled schedule, README.md; H = 128,
    bf16; never timed on a device), per 512 queries and a whole window of W = 512. The 512 x 512
    blocks of jax's splash attention need 1468, 1780 and 2334 for forward, dq and dkv:
    * forward: G = 5, 256 queries in tiles of 256 keys 1106, of 768 1217, of 384 1353; G = 3, H = 64
      256 x 384 1015, 256 x 256 1244; G = 1 512 x 512 1434, 256 x 256 1942.
    * dq: 256 queries and their band of 768 in one tile 1202, 256 x 256 1492, 512 x 512 1516.
    * dkv: 256 keys and their band in one tile 1514, 512 x 512 1924, 256 x 256 2800.
    Full attention, forward, per 512 x 512 pairs without a mask: 1280 rows x 512 keys 505, 640 x 512
    558, 512 x 512 604, 1280 x 256 710.
    """
    if kernel == "forward" and window is not None:
        return TpuBlocks(512 if G == 1 else 256, 0, 512 if G == 1 else 384 if G <= 3 else 256)
    if kernel == "forward":
        return TpuBlocks(512 if G <= 2 else 256 if G <= 5 else 128, 1024, 512)
    if kernel == "dq":
        return TpuBlocks(512, 1024, 512) if window is None else TpuBlocks(256, 0, 768)
    return TpuBlocks(512, 512, 512) if window is None else TpuBlocks(0, 256, 768)


class TpuForm(NamedTuple):
    """How the kernels work inside a tile.

    sums_on_mxu: the forward kernel sums p in the matrix unit (MXU).
    ceilings: the forward kernel masks with an array that it makes once (tpu_bands.Ceilings).
    transposed: dq, dk and dv are summed as [H, positions], so that the products have all columns
        that a matrix unit of 256 x 256 has. Else as [positions, H], so that a matrix unit of
        128 x 128 keeps each of its operands for more rows.
    """

    sums_on_mxu: bool
    ceilings: bool
    transposed: bool


@_replaceable
def tpu_form(kind: str, H: int) -> TpuForm:
    """By generation and head width H. Static cycles of the slowest tile, per 512 x 512 pairs of
    query and key, G = 1, W = 512, bf16 (libtpu 0.0.50.1; never timed on a device):

    * forward, with and without sums_on_mxu, both tiles together and without ceilings: v6e 1559 and
      1659, tpu7x 2182 and 1692, v5e 2927 and 2036, v5p 2973 and 2029. The matrix units of v5 are
      narrower, so the columns of ones cost time there.
    * forward, with and without ceilings: v6e 629 and 717, tpu7x 674 and 810. On v5 the matrix units
      have more to do than the vector units, so a cheaper mask gains nothing.
    * dq and dkv, transposed and not: v5p, H = 128, 1387 and 1360, 1967 and 1721; v5p, H = 64, 1184
      and 1369, 1485 and 1743: there, half of the columns of [positions, H] would be empty.
    """
    if "v5" in kind:
        return TpuForm(sums_on_mxu=False, ceilings=False, transposed=H < 128)
    return TpuForm(sums_on_mxu="v6" in kind, ceilings=True, transposed=True)


@_replaceable
def tpu_decode_rows(H: int) -> int:
    """How many rows (slots x K/V heads) one grid step reads: 1 MB of keys and 1 MB of values in
    bf16, so that the copies of a step take several times as long as the step's fixed cost (about
    0.35 us)."""
    return 4096 * 128 // H


class GpuBlocks(NamedTuple):
    """What one thread block of pallas_gpu handles. Its two consumer warpgroups have `rows` rows
    each (query positions; keys in the kernel of dk and dv; query heads of a group in decode).
    Blocks of the other axis stream through shared memory, `*_stages` of them at a time."""

    rows: int
    kv: int
    stages: int
    dq_kv: int
    dq_stages: int
    dkv_q: int
    dkv_stages: int
    decode_kv: int
    decode_stages: int


# By head width. None was measured on a device. They follow FlashAttention-3, compiled for an H200
# without a spilled register, and fill its 227 KB of shared memory.
_GPU_BLOCKS = {
    64: GpuBlocks(64, 128, 4, 128, 4, 64, 6, 64, 10),
    128: GpuBlocks(64, 128, 2, 128, 2, 64, 3, 64, 5),
}


GPU_HEAD_WIDTHS = tuple(_GPU_BLOCKS)


@_replaceable
def gpu_blocks(H: int) -> GpuBlocks:
    """Block sizes for head width H, up to the next width of the table."""
    return _GPU_BLOCKS[_next(H, GPU_HEAD_WIDTHS)]


class TritonBlocks(NamedTuple):
    """q, kv: queries and keys per step; warps of a program, stages of its pipeline of loads."""

    q: int
    kv: int
    warps: int
    stages: int


TRITON_DECODE_PROGRAMS = 256  # about two for each multiprocessor, for any batch

# By kernel and head width. None was measured on a device. They are the largest steps found that fit
# in the 99 KB of shared memory of sm_86 and sm_89, and that compiled without a spilled register for
# sm_80, sm_89 and sm_90, with and without segments, and for lengths that the steps do not divide.
_TRITON_BLOCKS = {
    ("forward", 64): TritonBlocks(128, 64, 8, 3),
    ("forward", 128): TritonBlocks(128, 64, 8, 3),
    ("forward", 256): TritonBlocks(64, 32, 8, 2),
    ("dq", 64): TritonBlocks(128, 64, 8, 3),
    ("dq", 128): TritonBlocks(128, 32, 8, 2),
    ("dq", 256): TritonBlocks(64, 16, 8, 2),
    ("dkv", 64): TritonBlocks(32, 128, 8, 2),
    ("dkv", 128): TritonBlocks(64, 64, 8, 2),
    ("dkv", 256): TritonBlocks(32, 32, 8, 2),
    ("decode", 64): TritonBlocks(1, 128, 4, 3),
    ("decode", 128): TritonBlocks(1, 64, 4, 3),
    ("decode", 256): TritonBlocks(1, 32, 4, 2),
}


TRITON_HEAD_WIDTHS = tuple(sorted({width for _, width in _TRITON_BLOCKS}))


@_replaceable
def triton_blocks(compute_capability: int, kernel: str, H: int, segments: bool) -> TritonBlocks:
    """kernel: forward, dq, dkv or decode; H up to the next width of the table."""
    width = _next(H, TRITON_HEAD_WIDTHS)
    if (kernel, width) == ("forward", 64) and compute_capability in (80, 90) and not segments:
        # 32 rows a warp halve the reads from shared memory; on other devices they would spill.
        return TritonBlocks(128, 64, 4, 3)
    if (kernel, width) == ("forward", 128) and compute_capability not in (80, 90):
        return TritonBlocks(128, 32, 8, 3)
    if (kernel, width) == ("dkv", 128) and compute_capability >= 90:
        return TritonBlocks(32, 64, 8, 2)  # wgmma's operands leave fewer registers
    return _TRITON_BLOCKS[kernel, width]
