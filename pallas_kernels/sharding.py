"""Kernels under a mesh: each device runs them on its own batch rows and heads (shard_map).

XLA cannot look into a kernel, so without this it would gather the kernel's operands. Attention
never mixes rows or groups of heads, so no collective is needed, with one exception: K/V heads that
the mesh axes do not divide are replicated, and their gradients are summed (in fp32) over the axes.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P


class Partition(NamedTuple):
    """The mesh axes over which batch rows and heads are split. Axes that the mesh in use does not
    have, or that a surrounding shard_map already handles, are ignored."""

    batch: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()


class Layout(NamedTuple):
    """A Partition made concrete for one call: what is split, and over what."""

    batch: tuple[str, ...]
    heads: tuple[str, ...]
    kv_heads: tuple[str, ...]  # equal to heads, or () if K/V heads are replicated
    group: int  # query heads per K/V head
    axes: tuple[str, ...]  # all axes of the mesh that no surrounding shard_map handles

    def specs(self, *axes: str) -> tuple[P, ...]:
        """One spec per string of letters: b batch, q query heads, k K/V heads, . anything else."""
        table = {"b": self.batch or None, "q": self.heads or None, "k": self.kv_heads or None}
        return tuple(P(*(table.get(letter) for letter in letters)) for letters in axes)

    def my_kv_heads(self, x: jax.Array, num_query_heads: int) -> jax.Array:
        """Inside shard_map: of replicated K/V heads x [B S K H], those that this device's query
        heads read, in their order."""
        if self.kv_heads == self.heads:
            return x
        first = lax.axis_index(self.heads) * num_query_heads
        if self.group % num_query_heads == 0:  # all of them read one head
            return lax.dynamic_slice_in_dim(x, first // self.group, 1, 2)
        return jnp.take(x, (first + jnp.arange(num_query_heads)) // self.group, axis=2)


def layout(partition: Partition | None, B: int, Q: int, K: int) -> Layout | None:
    """How a call with B rows, Q query and K key/value heads is split over the mesh of the context;
    None if the mesh has one device. Axes at the end that do not divide the rows or heads are left
    out: their devices do the same work.

    Raises:
      ValueError: an axis of the mesh is of type Explicit.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if partition is None or mesh.empty:
        return None
    free = {
        name: mesh.shape[name]
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind != AxisType.Manual
    }
    explicit = [
        a
        for a, k in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if a in free and k == AxisType.Explicit
    ]
    if explicit:
        raise ValueError(
            f"partition= needs a mesh with axes of type Auto; {', '.join(explicit)} of it "
            "is of type Explicit."
        )

    def split(axes, size):
        axes = tuple(axis for axis in axes if free.get(axis, 1) > 1)
        while size % math.prod(free[axis] for axis in axes):
            axes = axes[:-1]
        return axes

    if math.prod(free.values()) == 1:
        return None
    batch, heads = split(partition.batch, B), split(partition.heads, Q)
    kv_heads = heads if split(heads, K) == heads else ()
    return Layout(batch, heads, kv_heads, Q // K, tuple(free))


def on_each_device(body: Callable, where: Layout, in_specs, out_specs) -> Callable:
    """body as a shard_map over all axes of the mesh, since XLA's partitioner must not split a TPU
    kernel along any axis. The replication check is off: a pallas_call does not say over which axes
    its results vary."""
    return jax.shard_map(
        body, in_specs=in_specs, out_specs=out_specs, axis_names=set(where.axes), check_vma=False
    )
