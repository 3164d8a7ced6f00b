"""The caches that inference keeps, as typed dataclasses; `kv_cache` describes or makes them.

A window layer keeps a ring buffer of W entries for each loop, because each loop writes keys and
values of its own; a full layer keeps every position for each loop; the global K, V exist once.
Slot order in a ring does not matter to softmax: RoPE is applied before caching.
"""

import flax.struct
import jax
import jax.numpy as jnp

from yocou_jax.config import ModelConfig
from yocou_jax.typing import Array, Float, Int, PyTree


@flax.struct.dataclass
class StageCache:
    """k, v [loops, layers, B, S, K, H]; S is W for a window stage (a ring), else the capacity.

    With parallel streams B counts every stream of a sequence.
    """

    k: Float[Array, "loops L B S K H"]
    v: Float[Array, "loops L B S K H"]


@flax.struct.dataclass
class GlobalCache:
    """k, v [B, S, K, H]: the one cache whose size grows with the text, free of depth and loops."""

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]


@flax.struct.dataclass
class KVCache:
    """stages: one per window or full stage, in program order; lengths [B]: positions written."""

    stages: tuple[StageCache, ...]
    global_kv: GlobalCache | None
    lengths: Int[Array, " B"]


def kv_cache(config: ModelConfig, batch: int, capacity: int, dtype=jnp.bfloat16) -> KVCache:
    """An empty cache for `batch` sequences of at most `capacity` positions.

    Under `jax.eval_shape` it allocates nothing and describes shapes and types.
    """
    heads = (config.num_kv_heads, config.head_dim)
    program = config.program

    def pair(kind, *shape):
        return kind(jnp.zeros((*shape, *heads), dtype), jnp.zeros((*shape, *heads), dtype))

    stages = tuple(
        pair(
            StageCache,
            stage.num_loops,
            stage.layers,
            batch * program.streams,
            config.window if stage.mixer == "window" else capacity,
        )
        for stage in program.stages
        if stage.mixer != "cross"
    )
    global_kv = pair(GlobalCache, batch, capacity) if program.has_cross else None
    return KVCache(stages, global_kv, jnp.zeros((batch,), jnp.int32))


def kv_cache_bytes(cache: PyTree) -> int:
    """Bytes of the keys and values of a cache, real or described (lengths not counted)."""
    leaves = jax.tree.leaves((cache.stages, cache.global_kv))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
