"""The caches that inference keeps, as typed dataclasses, and how positions enter them.

A window layer keeps a ring buffer of W entries for each loop, because each loop writes keys and
values of its own; a full layer keeps every position for each loop; the global K, V exist once.
Each (loop, layer) has arrays of its own, so that a step writes one position in place and kernels
read the rest where it lies: of a stacked array XLA hands a kernel a copy. Position p lies in slot
p of a cache and in slot p mod W of a ring, whose order does not matter to softmax: RoPE is applied
before caching.
"""

import flax.struct
import jax
import jax.numpy as jnp

from yocou_jax.config import ModelConfig
from yocou_jax.typing import Array, Float, Int

# The logical axes of every array of keys or values (sharding.LOGICAL_AXES lays them on a mesh).
AXES = ("batch", "length", "kv_heads", "head_dim")


@flax.struct.dataclass
class KeyValue:
    """Keys and values as attention reads them: k, v [B, S, K, H], rotated and normed if at all."""

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]


@flax.struct.dataclass
class KVCache:
    """stages: for each window or full stage, in program order, one KeyValue per (loop, layer), loop
    by loop. S is W for a window stage (a ring) and the capacity else; with parallel streams B
    counts each of them (stream-major) and their learned prefix lies in the first slots.

    global_kv: S is the capacity; the one cache that grows with the text, free of depth and loops.
    lengths [B]: positions written to each row, a prefix not counted.
    """

    stages: tuple[tuple[KeyValue, ...], ...]
    global_kv: KeyValue | None
    lengths: Int[Array, " B"]

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values, real or described by `jax.eval_shape`."""
        leaves = jax.tree.leaves((self.stages, self.global_kv))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def kv_cache(config: ModelConfig, batch: int, capacity: int, dtype=jnp.bfloat16) -> KVCache:
    """An empty cache for `batch` sequences of at most `capacity` positions, prefixes left at zero.

    Under `jax.eval_shape` it allocates nothing and describes shapes and types.
    """
    program = config.program

    def empty(rows, slots):
        shape = (rows, slots, config.num_kv_heads, config.head_dim)
        return KeyValue(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    slots = {"window": config.window, "full": capacity + config.kv_prefix}
    stages = tuple(
        tuple(empty(batch * program.streams, slots[stage.mixer]) for _ in range(stage.depth))
        for stage in program.stages
        if stage.mixer != "cross"
    )
    global_kv = empty(batch, capacity) if program.has_cross else None
    return KVCache(stages, global_kv, jnp.zeros((batch,), jnp.int32))


def capacity(config: ModelConfig, cache: KVCache) -> int | None:
    """Positions that each row can hold; None if nothing but rings is kept, which never fill."""
    if cache.global_kv is not None:
        return cache.global_kv.k.shape[1]
    mixers = [stage.mixer for stage in config.program.stages]
    if "full" not in mixers:
        return None
    return cache.stages[mixers.index("full")][0].k.shape[1] - config.kv_prefix


@flax.struct.dataclass
class Append:
    """N new positions for every row: row b has `start[b]` already, and the first `count[b]` of the
    new ones exist. A scalar start is the same for all rows.

    whole: no row would be written beyond its capacity even if all N new positions existed; what
    lies behind count then may be written too, as nobody reads it.
    """

    start: Int[Array, " B"] | Int[Array, ""]
    count: Int[Array, " B"]
    whole: bool = flax.struct.field(pytree_node=False, default=False)

    def positions(self, N: int) -> Int[Array, "B N"]:
        return jnp.broadcast_to(self.start, self.count.shape)[:, None] + jnp.arange(N)

    @property
    def end(self) -> Int[Array, " B"]:
        return self.start + self.count


def append(cache: KeyValue, new: KeyValue, at: Append) -> KeyValue:
    """`new` [B, N, K, H] written behind what each row of `cache` [B, S, K, H] has."""
    N = new.k.shape[1]
    if jnp.ndim(at.start) == 0 and at.whole:
        return jax.tree.map(
            lambda x, n: jax.lax.dynamic_update_slice_in_dim(x, n.astype(x.dtype), at.start, 1),
            cache,
            new,
        )
    exists = jnp.arange(N) < at.count[:, None]
    return _scatter(cache, new, jnp.where(exists, at.positions(N), cache.k.shape[1]))


def _scatter(cache: KeyValue, new: KeyValue, slots: Int[Array, "B N"]) -> KeyValue:
    """Slots beyond the array are dropped."""
    rows = jnp.arange(slots.shape[0])[:, None]

    def put(x, n):
        return x.at[rows, slots].set(n.astype(x.dtype), mode="drop")

    return jax.tree.map(put, cache, new)


def ring_append_one(ring: KeyValue, new: KeyValue, at: Append) -> KeyValue:
    """One new position [B, 1, K, H] into a ring [B, W, K, H], over the oldest."""
    W = ring.k.shape[1]
    slots = jnp.where(at.count > 0, at.start % W, W)
    return _scatter(ring, new, slots[:, None])


def ring_and_new(
    ring: KeyValue, new: KeyValue, at: Append
) -> tuple[KeyValue, Int[Array, "B W+N"], KeyValue]:
    """The last W positions before `new` and then `new`, in order; which of them exist (1 or 0);
    and the ring as it is afterwards. New positions behind count exist for the order's sake: no
    earlier query sees them."""
    W, (B, N) = ring.k.shape[1], new.k.shape[:2]

    def in_order(x):
        if jnp.ndim(at.start) == 0:
            return jnp.roll(x, -at.start, axis=1)
        return jax.vmap(lambda row, start: jnp.roll(row, -start, axis=0))(x, at.start)

    joined = jax.tree.map(
        lambda old, n: jnp.concatenate([in_order(old), n.astype(old.dtype)], axis=1), ring, new
    )
    start = jnp.broadcast_to(at.start, (B,))[:, None]
    exists = jnp.concatenate([start - W + jnp.arange(W) >= 0, jnp.ones((B, N), bool)], axis=1)
    # Slot s keeps the newest position p with p mod W = s, which stands at p - start + W in joined.
    newest = at.end[:, None] - 1
    position = newest - (newest - jnp.arange(W)) % W
    picked = (position - start + W)[..., None, None]
    after = jax.tree.map(lambda x: jnp.take_along_axis(x, picked, axis=1), joined)
    return joined, exists.astype(jnp.int32), after
