"""Which tiles of queries and keys the TPU kernels visit, and who sees whom inside one.

A kernel handles one block of its outer axis at a time, and for each block reads positions of its
inner axis. The outer axis is that of the queries; for dk and dv it is that of the keys.

`Bands` says which positions of the inner axis a block reads. `Scalars` has what is copied to scalar
memory before a kernel starts. `Tiles` runs a tile without a mask, with one, or not at all.
`Ceilings` stores the masks of all tiles.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.attention import mask as masks
from pallas_kernels.attention.blocks import TPU_LANES
from pallas_kernels.attention.flash import round_up


def _clip(x, low, high):
    return jnp.maximum(jnp.minimum(x, high), low)


def column(row, width=TPU_LANES):
    """[1, n] -> [n, width], each value repeated along the lanes."""
    return jnp.broadcast_to(row, (width, row.shape[1])).T


@dataclasses.dataclass(frozen=True)
class Bands:
    """Which positions of the inner axis a block of `block` positions reads, in `steps` grid steps
    of `size` positions each. A window needs one step. Full attention reads every block up to the
    diagonal, or from there on. Starts are multiples of 128 and stay inside the array. So a step may
    have the same start as the step before it. That costs no copy, but kernels must skip such a
    step; they compare its start with the one that it should have.

    shift: where element 0 of the outer axis is on the inner axis (q_offset if queries read keys,
    -q_offset if keys are read by queries). back, ahead: how far a block reads before its first and
    after its last position; None: to the end of the array.
    """

    block: int
    size: int
    steps: int
    length: int  # of the inner axis
    shift: int
    back: int | None
    ahead: int | None

    @classmethod
    def plan(cls, block, size, length, shift, back, ahead):
        if back is None or ahead is None:
            return cls(block, size, length // size, length, shift, back, ahead)
        reach = block + back + ahead + (shift - back) % TPU_LANES
        size = min(length, round_up(reach, TPU_LANES))
        return cls(block, size, 1, length, shift, back, ahead)

    def start(self, i, j, limit=None):
        """First inner position of step j for outer block i, of a row that has `limit` positions."""
        first = self.shift + i * self.block
        last_start = self.length - self.size
        if self.back is None:  # keys of a causal query block: 0 .. its last position
            last = first + self.block - 1
            last = last if limit is None else jnp.minimum(last, jnp.maximum(limit, 1) - 1)
            start = jnp.minimum(j * self.size, last // self.size * self.size)
        elif self.ahead is None:  # queries of a causal key block: its first position .. the end
            start = jnp.maximum(j * self.size, first // self.size * self.size)
        else:
            start = (first - self.back) // TPU_LANES * TPU_LANES
        return pl.multiple_of(_clip(start, 0, last_start), TPU_LANES)


class Scalars(NamedTuple):
    """What is in scalar memory, and the batch row b of this grid step. lengths [B]; q_ids, k_ids
    [2 B, blocks of 128]: for each row, the lowest and then the highest segment id of each block."""

    lengths: Any
    q_ids: Any
    k_ids: Any
    b: Any

    def ids(self, ref, first, size: int):
        """Lowest and highest id of elements first .. first + size, both multiples of 128."""
        blocks = [first // TPU_LANES + n for n in range(size // TPU_LANES)]
        low = functools.reduce(jnp.minimum, [ref[2 * self.b, n] for n in blocks])
        high = functools.reduce(jnp.maximum, [ref[2 * self.b + 1, n] for n in blocks])
        return low, high


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Who sees whom in a tile of queries x keys."""

    window: int | None
    q_offset: int
    scale: float
    S: int  # keys that exist; the array may be longer
    padded: bool  # whether causality lets a query see a key after those
    segments: bool
    lengths: bool

    def limit(self, scalars):
        return scalars.lengths[scalars.b] if self.lengths else self.S

    def apply(self, scalars, q_first, k_first, bq, bk, limit, body):
        """Runs body(masked: bool) for the tile of bq queries from position q_first and bk keys from
        k_first: not at all if no query sees a key, without a mask if all see all. With segments a
        tile is skipped if the ranges of ids do not overlap, and needs no mask if all ids are equal.
        """
        window = self.window
        youngest, oldest = q_first - (k_first + bk - 1), q_first + bq - 1 - k_first
        some, every = oldest >= 0, youngest >= 0
        if window is not None:
            some, every = some & (youngest < window), every & (oldest < window)
        if self.padded or self.lengths:
            some, every = some & (k_first < limit), every & (k_first + bk <= limit)
        if self.segments:
            q_low, q_high = scalars.ids(scalars.q_ids, q_first - self.q_offset, bq)
            k_low, k_high = scalars.ids(scalars.k_ids, k_first, bk)
            some = some & (q_low <= k_high) & (k_low <= q_high)
            every = every & (q_low == k_high) & (k_low == q_high)
        pl.when(some & every)(functools.partial(body, False))
        pl.when(some & ~every)(functools.partial(body, True))

    def seen(self, q_first, k_first, shape, q_axis, limit, q_ids, k_ids, by_position=True):
        """The mask of a tile [bq bk] (q_axis 0) or [bk bq] (q_axis 1); ids broadcast to it.
        by_position: causality and the window are a part of it. Without them, None if every key
        exists and there are no segments."""
        q_pos = lax.broadcasted_iota(jnp.int32, shape, q_axis)
        k_pos = lax.broadcasted_iota(jnp.int32, shape, 1 - q_axis)
        # Only the difference of the two starts matters. It is added to the positions that change
        # along the lanes (the 128 columns of a register), because these take fewer registers.
        if q_axis == 0:
            zero, k_pos = q_first, k_pos + (k_first - q_first)
        else:
            zero, q_pos = k_first, q_pos + (q_first - k_first)
        conditions = [masks.visible_int32(q_pos, k_pos, self.window)] if by_position else []
        if self.padded or self.lengths:
            conditions.append(k_pos < limit - zero)
        if self.segments:
            conditions.append(q_ids == k_ids)
        return functools.reduce(jnp.logical_and, conditions) if conditions else None

    def ids(self, q_axis, q_ref, q_here, k_ref, k_here):
        """Ids of the queries and of the keys, for `seen`: those of axis 0 as a column, those of
        axis 1 as a row. Two Nones without segments."""
        if not self.segments:
            return None, None
        ids = [q_ref[:, q_here], k_ref[:, k_here]]
        ids[q_axis] = column(ids[q_axis])[:, :1]
        return tuple(ids)


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """The masks by position (causality and window) of all tiles of bq queries and bc keys, as one
    array [bq, width] of fp32: infinity where the query sees the key, else MASKED. A kernel makes it
    once, in VMEM. The smaller one of a score and its ceiling is the masked score. This takes one
    operation of the vector unit, and to compare positions takes three.

    A mask depends only on the distance of the tile: its first query minus its first key. The masks
    of two distances are the same diagonals, moved. So each is a part of the array, which starts at
    a multiple of 128, because all distances have the same remainder.
    """

    window: int | None
    bq: int
    bc: int
    remainder: int  # of all distances, divided by 128

    @property
    def skipped(self) -> int:
        """Between the two edges of a long window, the tiles need no mask. The array leaves out so
        many of these distances."""
        if self.window is None:
            return 0
        spare = self.window - self.bq - self.bc - TPU_LANES
        return max(spare // TPU_LANES * TPU_LANES, 0)

    @property
    def farthest(self) -> int:
        """The largest distance in the array."""
        far = self.bc if self.window is None else self.window - self.skipped + self.bc
        return round_up(far, TPU_LANES) + self.remainder

    @property
    def shape(self) -> tuple[int, int]:
        return self.bq, round_up(self.farthest + self.bq, TPU_LANES) + self.bc

    def fill(self, ref):
        window = None if self.window is None else self.window - self.skipped
        shape = (self.bq, TPU_LANES)
        q_pos = lax.broadcasted_iota(jnp.int32, shape, 0) + self.farthest
        k_pos = lax.broadcasted_iota(jnp.int32, shape, 1)

        def columns(n, _):
            first = pl.multiple_of(n * TPU_LANES, TPU_LANES)
            seen = masks.visible_int32(q_pos, k_pos + first, window)
            ref[:, pl.ds(first, TPU_LANES)] = jnp.where(seen, jnp.inf, masks.MASKED)
            return 0

        lax.fori_loop(0, self.shape[1] // TPU_LANES, columns, 0)

    def of(self, ref, distance):
        """[bq, bc], for a tile that is not too far away to see anything."""
        beyond = jnp.maximum(distance - self.skipped, self.bc)
        distance = jnp.where(distance < self.bc, distance, beyond)
        start = jnp.maximum(self.farthest - distance, 0) // TPU_LANES * TPU_LANES
        return ref[:, pl.ds(pl.multiple_of(start, TPU_LANES), self.bc)]
