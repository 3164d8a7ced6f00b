"""What inference keeps of the past, as typed dataclasses, and how new positions enter it.

A window layer keeps a ring buffer of W positions for each loop, because each loop has keys and
values of its own; a full layer keeps every position for each loop; the global K, V exist once.
Each (loop, layer) has arrays of its own, so that a step writes one position in place and kernels
read the rest where it is stored: of a stacked array XLA hands a kernel a copy.

A layer never writes. It reads its memory and the new positions (`Ring.peek`, for one), and returns
what is new; the forward pass then calls `commit`, which writes the positions that count. The memory
of another kind of layer is a flax dataclass with `commit`, `constrained` and `capacity` like these,
whose arrays begin with an axis of rows.
"""

import flax.struct
import jax
import jax.numpy as jnp

from yocou_jax.config import ModelConfig
from yocou_jax.sharding import constrain
from yocou_jax.typing import Array, Float, Int

# The logical axes of every array of keys or values (sharding.LOGICAL_AXES lays them on a mesh).
KV_AXES = ("batch", "length", "kv_heads", "head_dim")


@flax.struct.dataclass
class NewPositions:
    """N new positions for every row: row b has `start[b]` already, and the first `count[b]` of the
    new ones exist. A scalar start is the same for all rows.

    whole: no row would be written beyond its capacity even if all N new positions existed; what
    comes after count then may be written too, as nobody reads it.
    """

    start: Int[Array, " B"] | Int[Array, ""]
    count: Int[Array, " B"]
    whole: bool = flax.struct.field(pytree_node=False, default=False)

    def positions(self, N: int) -> Int[Array, "B N"]:
        return jnp.broadcast_to(self.start, self.count.shape)[:, None] + jnp.arange(N)[None]

    @property
    def end(self) -> Int[Array, " B"]:
        return self.start + self.count

    def for_streams(self, streams: int) -> "NewPositions":
        """The same positions in each of the parallel streams, whose rows are stream-major."""
        if streams == 1:
            return self
        start = jnp.tile(self.start, streams) if jnp.ndim(self.start) else self.start
        return self.replace(start=start, count=jnp.tile(self.count, streams))


class KeyValue(flax.struct.PyTreeNode):
    """Keys and values as attention reads them: k, v [B, S, K, H], rotated and normed if at all."""

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]

    @classmethod
    def zeros(cls, config: ModelConfig, rows: int, positions: int, dtype, **fields):
        shape = (rows, positions, config.num_kv_heads, config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), **fields)

    def constrained(self):
        """Tells the compiler how it lies on the mesh: what one program returns must lie as the next
        one takes it, or that is compiled twice."""
        return self.replace(k=constrain(self.k, *KV_AXES), v=constrain(self.v, *KV_AXES))

    def updated(self, put, new: "KeyValue"):
        """put(array, new array) for both, the new one in the array's type."""
        k, v = put(self.k, new.k.astype(self.k.dtype)), put(self.v, new.v.astype(self.v.dtype))
        return self.replace(k=k, v=v)

    def _scatter(self, new: "KeyValue", slots: Int[Array, "B N"]):
        """Slots beyond the array are dropped."""
        rows = jnp.arange(slots.shape[0])[:, None]
        return self.updated(lambda x, n: x.at[rows, slots].set(n, mode="drop"), new)


class Cache(KeyValue):
    """Every position: p is stored in slot prefix + p. The slots before it hold what was learned
    (ParScale's prefix) and are visible to every position."""

    prefix: int = flax.struct.field(pytree_node=False, default=0)

    @property
    def capacity(self) -> int:
        """Positions that each row can hold."""
        return self.k.shape[1] - self.prefix

    def slots(self, at: NewPositions) -> NewPositions:
        """The new positions, counted in slots."""
        return at.replace(start=at.start + self.prefix)

    def commit(self, new: KeyValue, at: NewPositions) -> "Cache":
        """`new` [B, N, K, H] written after what each row has."""
        at, N = self.slots(at), new.k.shape[1]
        if jnp.ndim(at.start) == 0 and at.whole:
            return self.updated(
                lambda x, n: jax.lax.dynamic_update_slice_in_dim(x, n, at.start, 1), new
            )
        exists = jnp.arange(N)[None] < at.count[:, None]
        return self._scatter(new, jnp.where(exists, at.positions(N), self.k.shape[1]))


class Ring(KeyValue):
    """The newest W positions: p is stored in slot p mod W. Their order does not matter to softmax,
    because RoPE is applied before."""

    @property
    def capacity(self) -> None:
        """A ring never fills."""
        return None

    def peek(self, new: KeyValue, at: NewPositions) -> tuple[KeyValue, Int[Array, "B S"]]:
        """What N new positions see: the last W positions before them and then `new`, in order
        (S = W + N), and which of them exist (1 or 0). New positions after count exist for the
        order's sake: no earlier query sees them."""
        W, (B, N) = self.k.shape[1], new.k.shape[:2]

        def in_order(x):
            if jnp.ndim(at.start) == 0:
                return jnp.roll(x, -at.start, axis=1)
            return jax.vmap(lambda row, start: jnp.roll(row, -start, axis=0))(x, at.start)

        joined = self.updated(lambda x, n: jnp.concatenate([in_order(x), n], axis=1), new)
        start = jnp.broadcast_to(at.start, (B,))[:, None]
        before = start - W + jnp.arange(W)[None] >= 0
        exists = jnp.concatenate([before, jnp.ones((B, N), bool)], axis=1)
        return KeyValue(joined.k, joined.v), exists.astype(jnp.int32)

    def commit(self, new: KeyValue, at: NewPositions) -> "Ring":
        """The ring with `new` [B, N, K, H] over its oldest positions."""
        W = self.k.shape[1]
        if new.k.shape[1] == 1:
            slots = jnp.where(at.count > 0, at.start % W, W)
            return self._scatter(new, slots[:, None])
        joined, _ = self.peek(new, at)
        start = jnp.broadcast_to(at.start, at.count.shape)[:, None]
        # Slot s keeps the newest position p with p mod W = s, which is p - start + W in joined.
        newest = at.end[:, None] - 1
        position = newest - (newest - jnp.arange(W)[None]) % W
        picked = (position - start + W)[..., None, None]
        return self.updated(lambda _, x: jnp.take_along_axis(x, picked, axis=1), joined)


@flax.struct.dataclass
class Memory:
    """All that a model keeps of B sequences.

    stages: for each stage of the self-decoder, by the name that its parameters have, a tuple with
    one Ring or Cache for each (loop, layer), loop by loop. With parallel streams their rows count
    each of them (stream-major).

    global_kv: the one cache that grows with the text, whatever the depth and the loops.
    lengths [B]: positions written to each row, a prefix not counted.
    """

    stages: dict[str, tuple]
    global_kv: Cache | None
    lengths: Int[Array, " B"]

    @property
    def nbytes(self) -> int:
        """Bytes of all but the lengths, real or described by `jax.eval_shape`."""
        leaves = jax.tree.leaves((self.stages, self.global_kv))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    @property
    def capacity(self) -> int | None:
        """Positions that each row can hold; None if nothing that is kept ever fills."""
        parts = [part for stage in self.stages.values() for part in stage] + [self.global_kv]
        return min(
            (p.capacity for p in parts if p is not None and p.capacity is not None), default=None
        )

    def constrained(self) -> "Memory":
        """As `KeyValue.constrained`, for everything."""
        return Memory(
            {
                name: tuple(None if m is None else m.constrained() for m in stage)
                for name, stage in self.stages.items()
            },
            None if self.global_kv is None else self.global_kv.constrained(),
            constrain(self.lengths, None),  # the host reads them
        )
