"""Which blocks of queries and keys the Hopper kernels visit, and who sees whom inside one."""

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention import hopper
from pallas_kernels.attention import mask as masks
from pallas_kernels.attention.flash import LOG2E
from pallas_kernels.attention.hopper import plgpu


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which blocks visit each other. Rows count from 0, positions of queries from q_offset. The
    blocks that the methods return are traced int32, and the last one is not included. bounded: the
    arrays have keys that must not be seen although causality allows it."""

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
        """How many keys row b has."""
        return jnp.int32(self.S) if lengths is None else jnp.minimum(lengths[b], self.S)

    def key_blocks(self, row, rows: int, size: int, limit):
        """first, last: the blocks of `size` keys that any of the queries row..row+rows sees."""
        position, oldest = self.q_offset + row, jnp.int32(0)
        if self.window is not None:
            oldest = jnp.maximum(position - (self.window - 1), 0)
        first = lax.div(oldest, size)
        last = hopper.ceil_div(jnp.minimum(position + rows, limit), size)
        return first, jnp.where(oldest < limit, last, first)

    def inner_key_blocks(self, row, rows: int, size: int, limit, first, last):
        """low, high: the blocks among first..last that each of these queries sees completely."""
        position = self.q_offset + row
        low = first
        if self.window is not None:
            low = hopper.ceil_div(jnp.maximum(position + rows - self.window, 0), size)
            low = jnp.minimum(jnp.maximum(low, first), last)
        high = lax.div(jnp.minimum(position + 1, limit), size)
        return low, jnp.minimum(jnp.maximum(high, low), last)

    def query_blocks(self, key, keys: int, size: int, limit):
        """first, last: the blocks of `size` queries that see any of the keys key..key+keys."""
        first = lax.div(jnp.maximum(key - self.q_offset, 0), size)
        end = jnp.int32(self.N)
        if self.window is not None:
            beyond = jnp.minimum(key + keys, limit) + (self.window - 1) - self.q_offset
            end = jnp.minimum(jnp.maximum(beyond, 0), self.N)
        last = jnp.where(key < limit, hopper.ceil_div(end, size), 0)
        return first, jnp.maximum(last, first)

    def inner_query_blocks(self, key, keys: int, size: int, limit, first, last):
        """low, high: the blocks among first..last in which each query sees all of these keys."""
        low = hopper.ceil_div(jnp.maximum(key + (keys - 1) - self.q_offset, 0), size)
        low = jnp.minimum(jnp.maximum(low, first), last)
        high = last
        if self.window is not None:
            high = lax.div(jnp.maximum(key + self.window - self.q_offset, 0), size)
        if self.bounded:
            high = jnp.where(key + keys <= limit, high, 0)
        return low, jnp.minimum(jnp.maximum(high, low), last)

    def seen(self, row, key, limit, shape, query_axis: int):
        """The mask of one block of scores [M N]; query_axis is the axis of the queries. What
        changes from block to block is added to the positions of the rows, before an optimisation
        barrier. Otherwise the compiler computes M N differences before the loop and keeps them in
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


def edges_and_inside(step, first, low, high, last, carry):
    """Three loops, so that only the blocks on an edge compute a mask."""
    carry = lax.fori_loop(first, low, functools.partial(step, edge=True), carry)
    carry = lax.fori_loop(low, high, functools.partial(step, edge=False), carry)
    return lax.fori_loop(high, last, functools.partial(step, edge=True), carry)
