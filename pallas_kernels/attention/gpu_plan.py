"""Which blocks of queries and keys the Hopper kernels visit, and who sees whom inside one."""

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention import hopper
from pallas_kernels.attention import mask as masks
from pallas_kernels.attention.flash import LOG2E
from pallas_kernels.attention.hopper import CONSUMERS, plgpu


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static facts of a call. Rows count from 0, positions of queries from
    q_offset. bounded: the arrays have keys that must not be seen although causality allows it."""

    N: int
    S: int
    group: int
    window: int | None
    q_offset: int
    scale: float
    bounded: bool

    @property
    def scale2(self) -> float:
        return self.scale * LOG2E

    def limit(self, lengths, b):
        """How many keys row b has; b may be a slice."""
        return jnp.int32(self.S) if lengths is None else jnp.minimum(lengths[b], self.S)

    def seen(self, row, key, limit, shape, query_axis: int):
        """The mask of a block of scores [rows columns]; query_axis is the axis of the queries. What
        changes from block to block is added to the positions of the rows, before an optimization
        barrier. Otherwise the compiler computes all differences before the loop and keeps them in
        registers."""
        ahead = self.q_offset + row - key
        rows = plgpu.broadcasted_iota(jnp.int32, shape[:1], 0, layout=plgpu.Layout.WGMMA.reduce(1))
        rows = rows + ahead if query_axis == 0 else rows - ahead
        rows = hopper.each_row(lax.optimization_barrier(rows), shape)
        columns = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
        if query_axis == 0:
            seen, beyond = masks.visible(rows, columns, self.window), limit - key
            return seen & (columns < beyond) if self.bounded else seen
        seen, beyond = masks.visible(columns, rows, self.window), limit - key - ahead
        return seen & (rows < beyond) if self.bounded else seen


class Documents(NamedTuple):
    """Segment ids q [B N] and kv [B S]. table [B consumers 4] int32: which blocks each consumer's
    rows visit: first, low, high, last, as in Visits."""

    q: Any
    kv: Any
    table: Any


@dataclasses.dataclass(frozen=True)
class Visits:
    """Which blocks of `size` positions of one axis a tile visits. A tile has `rows` positions of
    the other axis for each of the CONSUMERS. Blocks are int32 numbers, and the last one is not
    included. A kernel calls `tile` and `inside` for its own tile. If there are segments,
    `documents` calls them for all tiles before the kernel starts."""

    query_axis: ClassVar[int]  # of a block of scores: 0 if the tiles are queries

    plan: Plan
    rows: int
    size: int

    def tile(self, start, limit):
        """first, last: the blocks that the tile from position `start` on visits, of a batch row
        that has `limit` keys."""
        raise NotImplementedError

    def inside(self, start, limit, first, last):
        """low, high: the blocks among first..last in which a consumer's `rows` positions from
        `start` on need no mask."""
        raise NotImplementedError

    def seen(self, start, j, limit):
        """The mask of the `rows` positions from `start` on, and of block j: [rows size]."""
        places = start, j * self.size
        query, key = places[self.query_axis], places[1 - self.query_axis]
        return self.plan.seen(query, key, limit, (self.rows, self.size), self.query_axis)

    def documents(self, segments: masks.SegmentIds, lengths):
        """What the kernel gets if there are segments. Both axes have whole tiles and blocks."""
        ids, others = segments[self.query_axis], segments[1 - self.query_axis]
        some, every = _shared(ids, others, self.rows, self.size)
        tiles = some.reshape(len(ids), -1, CONSUMERS, some.shape[2]).any(2)
        some = jnp.repeat(tiles, CONSUMERS, axis=1)
        starts = jnp.arange(0, ids.shape[1], self.rows, dtype=jnp.int32)
        limits = jnp.broadcast_to(self.plan.limit(lengths, slice(None)), ids.shape[:1])
        consumers = jax.vmap(self._blocks, (0, None, 0, 0))
        table = jax.vmap(consumers, (None, 0, 0, 0))(starts, limits, some, every)
        return Documents(*segments, table)

    def _blocks(self, start, limit, some, every):
        """first, low, high, last for the consumer whose rows begin at `start`. some, every
        [blocks]: what `_shared` says of its tile and of its rows.

        first..last are the blocks from the first to the last that may share a document with the
        tile. If ids do not increase along the row, some between them may share none; their pairs
        are masked. low..high are without a mask. They are empty if a block that needs one is
        between two that do not.
        """
        block = jnp.arange(len(some), dtype=jnp.int32)
        first, last = self.tile(start - lax.rem(start, CONSUMERS * self.rows), limit)
        low, high = self.inside(start, limit, first, last)
        free = every & (low <= block) & (block < high)
        first, last = _ends(some & (first <= block) & (block < last))
        low, high = (jnp.clip(x, first, last) for x in _ends(free))
        return jnp.stack([first, low, jnp.where(high - low == free.sum(), high, low), last])


class KeyVisits(Visits):
    """The tiles are queries, the blocks keys: for the forward and for dq."""

    query_axis = 0

    def tile(self, start, limit):
        plan = self.plan
        position, oldest = plan.q_offset + start, jnp.int32(0)
        if plan.window is not None:
            oldest = jnp.maximum(position - (plan.window - 1), 0)
        first = lax.div(oldest, self.size)
        end = jnp.minimum(position + CONSUMERS * self.rows, limit)
        return first, jnp.where(oldest < limit, hopper.ceil_div(end, self.size), first)

    def inside(self, start, limit, first, last):
        plan = self.plan
        position = plan.q_offset + start
        low = first
        if plan.window is not None:
            low = jnp.maximum(position + self.rows - plan.window, 0)
            low = jnp.clip(hopper.ceil_div(low, self.size), first, last)
        high = lax.div(jnp.minimum(position + 1, limit), self.size)
        return low, jnp.clip(high, low, last)


class QueryVisits(Visits):
    """The tiles are keys, the blocks queries: for dk and dv."""

    query_axis = 1

    def tile(self, start, limit):
        plan = self.plan
        first = lax.div(jnp.maximum(start - plan.q_offset, 0), self.size)
        end = jnp.int32(plan.N)
        if plan.window is not None:
            beyond = jnp.minimum(start + CONSUMERS * self.rows, limit) + (plan.window - 1)
            end = jnp.clip(beyond - plan.q_offset, 0, plan.N)
        last = jnp.where(start < limit, hopper.ceil_div(end, self.size), 0)
        return first, jnp.maximum(last, first)

    def inside(self, start, limit, first, last):
        plan = self.plan
        low = jnp.maximum(start + (self.rows - 1) - plan.q_offset, 0)
        low = jnp.clip(hopper.ceil_div(low, self.size), first, last)
        high = last
        if plan.window is not None:
            high = lax.div(jnp.maximum(start + plan.window - plan.q_offset, 0), self.size)
        if plan.bounded:
            high = jnp.where(start + self.rows <= limit, high, 0)
        return low, jnp.clip(high, low, last)


def _shared(ids, others, rows: int, size: int):
    """For each pair of a block of `rows` ids and a block of `size` others: whether they may have an
    id in common, and whether they have one id only, the same. Two arrays of booleans, [B, blocks of
    ids, blocks of others]. For the first, some id of each must be in the range of the other's ids.
    So it is exact if ids increase along the row, even if the row ends with padding of another id.
    """
    B = ids.shape[0]
    ids, others = ids.reshape(B, -1, 1, rows), others.reshape(B, 1, -1, size)
    low, high = ids.min(3, keepdims=True), ids.max(3, keepdims=True)
    lowest, highest = others.min(3, keepdims=True), others.max(3, keepdims=True)
    some = ((lowest <= ids) & (ids <= highest)).any(3) & ((low <= others) & (others <= high)).any(3)
    every = (low == high) & (lowest == highest) & (low == lowest)
    return some, every[..., 0]


def _ends(flags):
    """first, last: the shortest range of blocks that has all the true ones; 0, 0 if none is."""
    block = jnp.arange(len(flags), dtype=jnp.int32)
    last = jnp.where(flags, block + 1, 0).max()
    return jnp.minimum(jnp.where(flags, block, len(flags)).min(), last), last


def edges_and_inside(step, blocks, carry):
    """Three loops, so that only the blocks on an edge compute a mask."""
    first, low, high, last = blocks
    carry = lax.fori_loop(first, low, functools.partial(step, edge=True), carry)
    carry = lax.fori_loop(low, high, functools.partial(step, edge=False), carry)
    return lax.fori_loop(high, last, functools.partial(step, edge=True), carry)
