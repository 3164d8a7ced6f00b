"""Kernels under a mesh: each device runs them on its own batch rows and heads (shard_map).

XLA cannot look inside a kernel. Without a shard_map it would copy all operands to each device.
Attention never mixes batch rows, and never mixes groups (the query heads that share a K/V head). So
the devices need not communicate, with one exception: if the mesh axes do not divide the K/V heads,
each device has all K/V heads, and their gradients are summed over these axes in fp32.
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
    """The mesh axes over which batch rows and heads are split. An axis is ignored if the mesh in
    use does not have it, or if a surrounding shard_map already splits over it."""

    batch: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()


class Layout(NamedTuple):
    """What a Partition means for one call: the mesh axes that split its rows and its heads."""

    batch: tuple[str, ...]
    heads: tuple[str, ...]
    kv_heads: tuple[str, ...]  # equal to heads, or () if each device has all K/V heads
    group: int  # query heads per K/V head
    axes: tuple[str, ...]  # all axes of the mesh, without those of a surrounding shard_map

    def specs(self, *axes: str) -> tuple[P, ...]:
        """One spec per string, one letter per axis of an array: b is the batch, q query heads,
        k K/V heads, and a dot an axis that is not split."""
        table = {"b": self.batch or None, "q": self.heads or None, "k": self.kv_heads or None}
        return tuple(P(*(table.get(letter) for letter in letters)) for letters in axes)

    def my_kv_heads(self, x: jax.Array, num_query_heads: int) -> jax.Array:
        """Inside shard_map: the K/V heads of x [B S K H] that this device's query heads read, in
        the order of the query heads. If the K/V heads are split too, that is x itself."""
        if self.kv_heads == self.heads:
            return x
        first = lax.axis_index(self.heads) * num_query_heads
        if self.group % num_query_heads == 0:  # all of them read one head
            return lax.dynamic_slice_in_dim(x, first // self.group, 1, 2)
        return jnp.take(x, (first + jnp.arange(num_query_heads)) // self.group, axis=2)


def layout(partition: Partition | None, B: int, Q: int, K: int) -> Layout | None:
    """How a call with B rows, Q query and K key/value heads is split over the mesh that is set.
    None without a partition or a mesh, and if the mesh has one device. Axes at the end that do not
    divide the rows or heads are left out: the devices along such an axis do the same work.

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
    """body as a shard_map over all axes of the mesh, because XLA must not split a TPU kernel along
    any axis. check_vma is off: jax would check the mesh axes along which each value differs,
    and a pallas_call does not declare them for its results."""
    return jax.shard_map(
        body, in_specs=in_specs, out_specs=out_specs, axis_names=set(where.axes), check_vma=False
    )
