"""The memory of inference: typed dataclasses that store what layers need from past positions.

`Memory` holds all memories of a model. Those of attention store keys and values, and have two
kinds: a `Ring` stores the newest W positions, and a `Cache` stores all positions. Together they are
what papers call the KV cache. A window layer has a ring for each loop, because each loop has keys
and values of its own. A full layer has a cache for each loop. The global K, V are one cache. Each
(loop, layer) has arrays of its own, so that a step writes one position in place, and kernels read
the arrays where they are. From a stacked array, XLA would give a kernel a copy.

A layer never changes the memory of the model. It reads its part and the new positions, and returns
what is new. To attend to both, it may commit to a copy of its own (the arrays are immutable), or
join them with `Ring.peek`. Then the forward pass (`_layer` in inference/forward.py) calls `commit`,
which writes the positions that count. The memory of a new kind of layer is a flax dataclass with
`commit`, `constrained` and `capacity`, as here. The first axis of its arrays is the rows.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels.device import target_device
from yocou_jax.config import ModelConfig
from yocou_jax.sharding import constrain, keys_ways, spec_for, take
from yocou_jax.typing import Array, Float, Int

# The logical axes of arrays of keys or values (sharding.LOGICAL_AXES maps them to a mesh): of new
# positions, of all positions of a cache, and of positions that every device needs.
KV_AXES = ("batch", "length", "kv_heads", "head_dim")
CACHE_AXES = ("batch", "keys", "kv_heads", "head_dim")
WHOLE_AXES = ("batch", None, "kv_heads", "head_dim")


@flax.struct.dataclass
class NewPositions:
    """N new positions for every row. Row b has `start[b]` positions already, and the first
    `count[b]` of the new ones exist. A scalar `start` is the same for all rows.

    fits: all N new positions fit into every row. Then those after `count` may be written too,
    because nobody reads them.
    """

    start: Int[Array, " B"] | Int[Array, ""]
    count: Int[Array, " B"]
    fits: bool = flax.struct.field(pytree_node=False, default=False)

    def positions(self, N: int) -> Int[Array, "B N"]:
        """The position of each of N new tokens in its row."""
        return jnp.broadcast_to(self.start, self.count.shape)[:, None] + jnp.arange(N)[None]

    @property
    def end(self) -> Int[Array, " B"]:
        """Number of positions of each row after the new ones."""
        return self.start + self.count

    def for_streams(self, streams: int) -> "NewPositions":
        """The same positions in each parallel stream. The rows are stream-major."""
        if streams == 1:
            return self
        start = jnp.tile(self.start, streams) if jnp.ndim(self.start) else self.start
        return self.replace(start=start, count=jnp.tile(self.count, streams))


def _scatter_copies(x: Float[Array, "B S K H"]) -> bool:
    """Whether XLA would copy x before and after a scatter. On a TPU it stores arrays with heads of
    less than 128 so that S is the last axis, which its scatter does not support. A decode step then
    accesses 10 times the bytes of its cache, and 1.00 times with `_row_by_row` (compiled for v6e).
    On several devices, a loop over rows would make the devices communicate, except in a
    shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = all(kind == AxisType.Manual for kind in mesh.axis_types)
    return (mesh.size == 1 or manual) and x.shape[-1] < 128 and target_device(x).platform == "tpu"


def _put(
    x: Float[Array, "B S K H"], new: Float[Array, "B N K H"], start: Int[Array, ""]
) -> Float[Array, "B S K H"]:
    """x with new[:, i] in slot start + i, which may be outside of x: then it is dropped. N <= S."""
    S, N = x.shape[1], new.shape[1]
    at = jnp.clip(start, 0, S - N)
    index = jnp.arange(N) + at - start
    inside = ((index >= 0) & (index < N))[:, None, None]
    old = jax.lax.dynamic_slice_in_dim(x, at, N, 1)
    new = jnp.where(inside, jnp.roll(new, start - at, axis=1), old)
    return jax.lax.dynamic_update_slice_in_dim(x, new, at, 1)


def _row_by_row(
    x: Float[Array, "B S K H"], new: Float[Array, "B 1 K H"], slots: Int[Array, " B"]
) -> Float[Array, "B S K H"]:
    """x with new[b] in slots[b] of each row b. Drops slots beyond the array."""

    def write(b, x):
        at = (b, slots[b], 0, 0)
        here = jax.lax.dynamic_slice(x, at, (1, 1, *x.shape[2:]))
        here = jnp.where(slots[b] < x.shape[1], jax.lax.dynamic_slice_in_dim(new, b, 1), here)
        return jax.lax.dynamic_update_slice(x, here, at)

    return jax.lax.fori_loop(0, x.shape[0], write, x)


class KeyValue(flax.struct.PyTreeNode):
    """Keys and values that attention reads: k, v [B, S, K, H], after RoPE and norm, if any."""

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]

    @classmethod
    def zeros(cls, config: ModelConfig, rows: int, positions: int, dtype, **fields):
        shape = (rows, positions, config.num_kv_heads, config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), **fields)

    def constrained(self):
        """Tells the compiler how to split the arrays over the mesh. Each program must return them
        as the next one takes them, or the next one is compiled twice."""
        return self.replace(k=constrain(self.k, *WHOLE_AXES), v=constrain(self.v, *WHOLE_AXES))

    def updated(self, put, new: "KeyValue"):
        """put(array, new array) for k and for v. The new array gets the type of the old one."""
        k, v = put(self.k, new.k.astype(self.k.dtype)), put(self.v, new.v.astype(self.v.dtype))
        return self.replace(k=k, v=v)

    def _scatter(self, new: "KeyValue", slots: Int[Array, "B N"]):
        """Writes position n of row b to slots[b, n]. Drops slots beyond the array."""
        if slots.shape[1] == 1 and _scatter_copies(self.k):
            return self.updated(lambda x, n: _row_by_row(x, n, slots[:, 0]), new)
        rows = jnp.arange(slots.shape[0])[:, None]
        return self.updated(lambda x, n: x.at[rows, slots].set(n, mode="drop"), new)


class Cache(KeyValue):
    """Stores every position: position p is in slot prefix + p. The first `prefix` slots store
    ParScale's learned keys and values, and every position sees them."""

    prefix: int = flax.struct.field(pytree_node=False, default=0)

    @property
    def capacity(self) -> int:
        """Number of positions that fit into each row."""
        return self.k.shape[1] - self.prefix

    def slots(self, at: NewPositions) -> NewPositions:
        """The slots of the new positions."""
        return at.replace(start=at.start + self.prefix)

    def constrained(self) -> "Cache":
        """If the mesh splits the positions, each device stores a part of the slots."""
        return self.replace(k=constrain(self.k, *CACHE_AXES), v=constrain(self.v, *CACHE_AXES))

    def commit(self, new: KeyValue, at: NewPositions) -> "Cache":
        """The cache with `new` [B, N, K, H] after the positions that each row has."""
        at = self.slots(at)
        if keys_ways(self.k.shape[1]) == 1:
            return self._commit(new, at)
        # Every device gets the new positions, and writes those whose slots it has.
        mesh = jax.sharding.get_abstract_mesh()
        parts = spec_for(CACHE_AXES, self.k.shape, mesh)
        rows, axis, *_ = parts
        each = at.replace(
            start=PartitionSpec(*[rows] * jnp.ndim(at.start)), count=PartitionSpec(rows)
        )

        def local(cache, new, at):
            first = jax.lax.axis_index(axis) * cache.k.shape[1]
            return cache._commit(new, at.replace(start=at.start - first))

        return jax.shard_map(
            local,
            in_specs=(parts, spec_for(WHOLE_AXES, new.k.shape, mesh), each),
            out_specs=parts,
            check_vma=False,
        )(self, new, at)

    def _commit(self, new: KeyValue, slots: NewPositions) -> "Cache":
        """Writes `new` to these slots, and drops those outside of the cache."""
        (S, N), start = (self.k.shape[1], new.k.shape[1]), slots.start
        if jnp.ndim(start) == 0 and slots.fits and N <= S:
            return self.updated(lambda x, n: _put(x, n, start), new)
        here, exists = slots.positions(N), jnp.arange(N)[None] < slots.count[:, None]
        return self._scatter(new, jnp.where(exists & (here >= 0), here, S))


class Ring(KeyValue):
    """Stores the newest W positions: position p is in slot p mod W. Attention does not depend on
    their order, because RoPE is applied before."""

    @property
    def capacity(self) -> None:
        """None: a ring is never full."""
        return None

    def before(self, at: NewPositions) -> tuple[KeyValue, Int[Array, "B W"]]:
        """The W positions before the new ones, in order; and 1 for each that exists, else 0."""
        B, W = self.k.shape[:2]

        def in_order(x):
            if jnp.ndim(at.start) == 0:
                return jnp.roll(x, -at.start, axis=1)
            return jax.vmap(lambda row, start: jnp.roll(row, -start, axis=0))(x, at.start)

        start = jnp.broadcast_to(at.start, (B,))[:, None]
        exists = start - W + jnp.arange(W)[None] >= 0
        return KeyValue(in_order(self.k), in_order(self.v)), exists.astype(jnp.int32)

    def peek(self, new: KeyValue, at: NewPositions) -> tuple[KeyValue, Int[Array, "B S"]]:
        """What N new positions see: `before` and then `new`. New positions after `count` have a 1
        too: no earlier query sees them."""
        earlier, exists = self.before(at)
        joined = earlier.updated(lambda x, n: jnp.concatenate([x, n], axis=1), new)
        return joined, jnp.pad(exists, ((0, 0), (0, new.k.shape[1])), constant_values=1)

    def commit(self, new: KeyValue, at: NewPositions) -> "Ring":
        """The ring, in which `new` [B, N, K, H] replaces the oldest positions."""
        W = self.k.shape[1]
        if new.k.shape[1] == 1:
            slots = jnp.where(at.count > 0, at.start % W, W)
            return self._scatter(new, slots[:, None])
        # Slot s gets the newest position p with p mod W = s. An earlier one is there already.
        newest = at.end[:, None] - 1
        position = newest - (newest - jnp.arange(W)[None]) % W
        index = position - jnp.broadcast_to(at.start, at.count.shape)[:, None]
        is_new = (index >= 0)[..., None, None]
        index = jnp.maximum(index, 0)
        return self.updated(lambda old, x: jnp.where(is_new, take(x, index, *KV_AXES), old), new)


@flax.struct.dataclass
class Memory:
    """All memories of a model, for B sequences.

    stages: for each stage of the self-decoder, under the name of its parameters, a tuple with one
        Ring or Cache for each (loop, layer), loop by loop. With parallel streams, every stream has
        rows of its own (stream-major).
    global_kv: the one global cache. Its size does not depend on the depth or the loops.
    lengths [B]: number of positions written to each row, without a prefix.
    """

    stages: dict[str, tuple]
    global_kv: Cache | None
    lengths: Int[Array, " B"]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays except `lengths`, even if `jax.eval_shape` only describes them."""
        leaves = jax.tree.leaves((self.stages, self.global_kv))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    @property
    def capacity(self) -> int | None:
        """Number of positions that fit into each row. None if no part is ever full."""
        parts = [part for stage in self.stages.values() for part in stage] + [self.global_kv]
        return min(
            (p.capacity for p in parts if p is not None and p.capacity is not None), default=None
        )

    def constrained(self) -> "Memory":
        """`KeyValue.constrained` for every part."""
        return Memory(
            {
                name: tuple(None if m is None else m.constrained() for m in stage)
                for name, stage in self.stages.items()
            },
            None if self.global_kv is None else self.global_kv.constrained(),
            constrain(self.lengths, None),  # the host reads them
        )
