"""Which calls of attention are measured on which kind of device, and their inputs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import Mask
from pallas_kernels.call import decodes

WINDOW = 512


class Sizes(NamedTuple):
    """What is measured on a kind of device. lengths: N and S of the calls, the most important one
    first, because the time may end before the others. tokens: B * N of a call; B is at least 1."""

    dtype: Any
    lengths: tuple[int, ...]
    tokens: int
    heads: tuple[int, int]  # query heads, key/value heads
    head_widths: tuple[int, ...]
    decode: tuple[tuple[int, int], ...]  # (B, S) of each measured call of decode_cross
    decode_ring: tuple[int, ...]  # B of each measured call of decode_window
    sample_s: float  # a sample repeats a call so often that it takes about this long
    rounds: int  # samples per measurement
    slowest_call_s: float  # a call is left out if it is expected to take longer
    dense_bytes: int  # an implementation is left out if it would store more bytes of scores
    copy_bytes: int  # size of the array with which the device's own copy is timed
    matmul: int  # the matrix product that is timed is [matmul, matmul] x [matmul, matmul]
    error_length: int  # N and S of the calls that are tested for accuracy
    budget_s: float  # when so much time is spent, no further group of calls begins


ACCELERATOR = Sizes(
    dtype=jnp.bfloat16,
    lengths=(8192, 2048, 32_768, 16_384, 4096, 65_536),
    tokens=16_384,
    heads=(16, 4),
    head_widths=(128, 64),
    decode=((1, 131_072), (8, 131_072), (1, 32_768), (8, 32_768), (8, 8192)),
    decode_ring=(1, 8),
    sample_s=0.02,
    rounds=5,
    slowest_call_s=1.0,
    dense_bytes=8 << 30,
    copy_bytes=2 << 30,
    matmul=8192,
    error_length=2048,
    budget_s=420,
)
CPU = Sizes(
    dtype=jnp.float32,
    lengths=(1024, 2048, 4096),
    tokens=1,
    heads=(4, 2),
    head_widths=(64,),
    decode=((1, 4096), (4, 16_384)),
    decode_ring=(1, 8),
    sample_s=0.0,
    rounds=3,
    slowest_call_s=4.0,
    dense_bytes=1 << 30,
    copy_bytes=256 << 20,
    matmul=1024,
    error_length=512,
    budget_s=75,
)


class Case(NamedTuple):
    """One call, with the letters of pallas_kernels/attention/api.py. For decode N is 1, and nothing
    is differentiated. backward: forward and backward are measured together."""

    operation: str
    B: int
    N: int
    S: int
    Q: int
    K: int
    H: int
    window: int | None
    backward: bool = False

    @property
    def decodes(self) -> bool:
        return decodes(self.operation)

    @property
    def pairs(self) -> int:
        """How many pairs of a query and a key that it sees one batch row and head has."""
        if self.decodes:
            return self.S
        return Mask(self.window).pairs(self.N, self.S)

    @property
    def flops(self) -> int:
        return (14 if self.backward else 4) * self.H * self.pairs * self.Q * self.B

    def bytes(self, itemsize: int) -> int:
        return 2 * self.B * self.S * self.K * self.H * itemsize

    @property
    def label(self) -> str:
        what = "forward + backward" if self.backward else "forward"
        return f"{self.operation}, B = {self.B}, S = {self.S}, H = {self.H}, {what}"


def grouped(sizes: Sizes) -> list[list[Case]]:
    """The cases in groups, the most important ones first. A group is compiled together."""
    Q, K = sizes.heads
    groups = []
    for N in sizes.lengths:
        B = max(1, sizes.tokens // N)
        for H in sizes.head_widths:
            for operation, window in (("window_attention", WINDOW), ("cross_attention", None)):
                case = Case(operation, B, N, N, Q, K, H, window)
                groups.append([case, case._replace(backward=True)])
        if len(groups) == 2 * len(sizes.head_widths):  # right after the first length
            H = sizes.head_widths[0]
            rings = [Case("decode_window", B, 1, WINDOW, Q, K, H, None) for B in sizes.decode_ring]
            caches = [Case("decode_cross", B, 1, S, Q, K, H, None) for B, S in sizes.decode]
            groups += [group for group in (rings, caches) if group]
    return groups


def inputs(case: Case, dtype, seed: int) -> list[jax.Array]:
    """Random q [B, N, Q, H], k and v [B, S, K, H], and the gradient of the output, as q. For
    decode: q [B, Q, H], both caches [B, S, K, H], and lengths [B] that are all S."""
    keys = jax.random.split(jax.random.key(seed), 4)
    q_shape = (case.B, case.Q, case.H) if case.decodes else (case.B, case.N, case.Q, case.H)
    kv_shape = (case.B, case.S, case.K, case.H)
    shapes = [q_shape, kv_shape, kv_shape, q_shape]
    arrays = [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]
    if case.decodes:
        arrays[3] = jnp.full((case.B,), case.S, jnp.int32)
    return arrays
