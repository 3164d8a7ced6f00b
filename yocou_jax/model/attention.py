"""The mixers as modules: window, full and cross attention, and the module of the global K, V.

The modules have the parameters. pallas_kernels has the mathematics: masks, softmax, backward.
`MODULES` has the same keys as `MIXERS`, which has the facts of each mixer.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from pallas_kernels import SegmentIds, api, join
from yocou_jax.config import ModelConfig
from yocou_jax.model import context_parallel
from yocou_jax.model.compute import Compute
from yocou_jax.model.context_parallel import SharedKeyValue
from yocou_jax.model.layers import Linear, RMSNorm, Rotation, rope, rotation
from yocou_jax.model.memory import KV_AXES, Cache, KeyValue, NewPositions, Ring
from yocou_jax.sharding import attention_partition, constrain, keys_ways, length_ways
from yocou_jax.typing import AnyArray, Array, Float, Int


@flax.struct.dataclass
class Context:
    """What every layer of a forward pass sees in addition to the residual stream.

    positions [B or 1, N]: they start again at 0 in each packed document.
    rotation: their angles, for RoPE.
    segment_ids [B, N]: keep attention inside each packed document. None: one document per row.
    global_kv: the global K, V of these positions, which cross layers read. None before they are
        computed, and for one position in inference, which reads only the cache. In training, if
        the mesh splits the positions, the rows of the cross-decoder are in another order, and this
        is what model/context_parallel.py makes of the global K, V.
    at: in inference, the positions that this pass is about: the new ones of each row. None in
        training.
    global_cache: in inference, the global K, V of all positions, with the new ones.
    """

    positions: Int[AnyArray, "#B N"]
    rotation: Rotation
    segment_ids: Int[Array, "B N"] | None = None
    global_kv: KeyValue | SharedKeyValue | None = None
    at: NewPositions | None = None
    global_cache: Cache | None = None

    @classmethod
    def of(cls, config: ModelConfig, positions: Int[AnyArray, "#B N"], **fields) -> "Context":
        """The context of tokens at these positions."""
        return cls(positions, rotation(positions, config.head_dim, config.rope_theta), **fields)


class Query(nn.Module):
    """W_q x [B, N, Q, H]; with qk_norm, RMSNorm on each head."""

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N Q H"]:
        c = self.config
        axes = ("embed", "heads", "head_dim")
        q = Linear((c.num_heads, c.head_dim), axes, self.dtype, name="project")(x)
        if c.qk_norm:
            q = RMSNorm(c.norm_eps, name="norm")(q)
        return constrain(q, "batch", "length", "heads", "head_dim")


class KeyValueProjection(nn.Module):
    """W_k x and W_v x; with qk_norm, RMSNorm on the keys of each head."""

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> KeyValue:
        c = self.config
        shape, axes = (c.num_kv_heads, c.head_dim), ("embed", "kv_heads", "head_dim")
        k = Linear(shape, axes, self.dtype, name="key")(x)
        v = Linear(shape, axes, self.dtype, name="value")(x)
        if c.qk_norm:
            k = RMSNorm(c.norm_eps, name="norm")(k)
        return KeyValue(constrain(k, *KV_AXES), constrain(v, *KV_AXES))


class Output(nn.Module):
    """W_o: from [B, N, Q, H] to the model width."""

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B N Q H"]) -> Float[Array, "B N D"]:
        c = self.config
        axes = ("heads", "head_dim", "embed")
        y = Linear((c.d_model,), axes, self.dtype, c.residual_scale, name="project")(x)
        return constrain(y, "batch", "length", "activation")


def attention_options(compute: Compute) -> dict:
    return {"implementation": compute.attention, "partition": attention_partition()}


def attend_to_ring(
    q: Float[Array, "B N Q H"], new: KeyValue, ring: Ring, at: NewPositions, **options
) -> Float[Array, "B N Q H"]:
    """Attention of N new positions to the ring, which does not have them yet, and to each other."""
    W = ring.k.shape[1]
    if q.shape[1] == 1:
        # A local copy, for this call only. `_layer` in inference/forward.py commits to the memory.
        ring = ring.commit(new, at)
        return api.decode_window(q[:, 0], ring.k, ring.v, at.end, **options)[:, None]
    if length_ways(q.shape[1]) > 1:
        before = ring.before(at)
        return context_parallel.window_attention(q, new, window=W, before=before, **options)
    seen, exists = ring.peek(new, at)
    segments = SegmentIds(jnp.ones(q.shape[:2], jnp.int32), exists)
    return api.window_attention(
        q, seen.k, seen.v, window=W, q_offset=W, segment_ids=segments, **options
    )


def attend_to_cache(
    q: Float[Array, "B N Q H"], new: KeyValue | None, cache: Cache, at: NewPositions, **options
) -> Float[Array, "B N Q H"]:
    """Attention of N new positions to a cache that has them already.

    new: keys and values of the new positions (not used for N = 1). For N > 1, one call attends to
    the earlier positions, which all new ones see. A second call attends to the new ones. `join`
    combines the two results. So a chunk needs no static offset, and rows may have different
    lengths.
    """
    at, (B, S) = cache.slots(at), cache.k.shape[:2]
    split = keys_ways(S) > 1
    if q.shape[1] == 1:
        if split:
            return context_parallel.attend_to_cache(q, cache, at.end, **options)[0]
        return api.decode_cross(q[:, 0], cache.k, cache.v, at.end, **options)[:, None]
    before = jnp.broadcast_to(at.start, (B,))
    if split:
        old = context_parallel.attend_to_cache(q, cache, before, **options)
    else:
        old = api.cross_attention(
            q, cache.k, cache.v, q_offset=S, kv_lengths=before, return_lse=True, **options
        )
    new = jax.tree.map(lambda x: x.astype(cache.k.dtype), new)
    if length_ways(q.shape[1]) > 1:
        own = context_parallel.full_attention(q, new, None, **options)
    else:
        own = api.cross_attention(q, new.k, new.v, return_lse=True, **options)
    return join(old, own)[0]


class MixerModule(nn.Module):
    """What all mixers have in common: the call and the memory.

    __call__(x [B, N, D], context, memory) returns y [B, N, D] and what is new for the memory. In
    training, both `memory` and what is new are None. In inference, `empty` has made the memory of
    the layer, and the forward pass calls its `commit` with what is new. The module must not let
    information pass between the documents of a row: context.segment_ids says which are together.
    """

    config: ModelConfig
    compute: Compute

    @property
    def dtype(self) -> jnp.dtype:
        return self.compute.dtype

    @staticmethod
    def empty(config: ModelConfig, rows: int, capacity: int, dtype):
        """A memory with `rows` rows, each for at most `capacity` positions: one row for each
        sequence in each parallel stream. None for a mixer without a memory."""
        return None

    @staticmethod
    def begin(memory, params):
        """The memory before the first position. A mixer with learned keys and values overrides
        this, and writes them into the empty `memory`. params: those of the mixer."""
        return memory


class SelfAttention(MixerModule):
    """Causal self-attention with RoPE. `_attend` decides which keys a query sees."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], context: Context, memory: Ring | Cache | None = None
    ) -> tuple[Float[Array, "B N D"], KeyValue | None]:
        c = self.config
        q = rope(Query(c, self.dtype, name="query")(x), context.rotation)
        kv = KeyValueProjection(c, self.dtype, name="key_value")(x)
        kv = kv.replace(k=rope(kv.k, context.rotation))
        y = self._attend(q, kv, context, memory)
        return Output(c, self.dtype, name="output")(y), None if memory is None else kv


class WindowAttention(SelfAttention):
    """y_i attends to keys i-W+1 .. i."""

    @staticmethod
    def empty(config: ModelConfig, rows: int, capacity: int, dtype) -> Ring:
        return Ring.zeros(config, rows, config.window, dtype)

    def _attend(self, q, kv: KeyValue, context: Context, ring: Ring | None):
        options = attention_options(self.compute)
        if ring is not None:
            return attend_to_ring(q, kv, ring, context.at, **options)
        options |= {"window": self.config.window, "segment_ids": context.segment_ids}
        if length_ways(q.shape[1]) > 1:
            return context_parallel.window_attention(q, kv, **options)
        return api.window_attention(q, kv.k, kv.v, **options)


class FullAttention(SelfAttention):
    """y_i attends to keys 0 .. i. With parallel streams it also attends to the learned keys of its
    stream (ParScale, arXiv 2505.10475), which are in the first slots of the cache."""

    @staticmethod
    def empty(config: ModelConfig, rows: int, capacity: int, dtype) -> Cache:
        prefix = config.kv_prefix
        return Cache.zeros(config, rows, capacity + prefix, dtype, prefix=prefix)

    @staticmethod
    def begin(memory: Cache, params) -> Cache:
        if not memory.prefix:
            return memory
        first = stream_prefix(params["prefix"], memory.k.shape[0], memory.k.dtype)
        return memory.updated(lambda x, n: jax.lax.dynamic_update_slice_in_dim(x, n, 0, 1), first)

    def _attend(self, q, kv: KeyValue, context: Context, cache: Cache | None):
        options, prefix = attention_options(self.compute), self.config.kv_prefix
        if cache is not None:
            local = cache.commit(kv, context.at)  # `_layer` of inference commits to the memory
            return attend_to_cache(q, kv, local, context.at, **options)
        options["segment_ids"] = context.segment_ids
        first = self._prefix(kv.k.shape[0]) if prefix else None
        if length_ways(q.shape[1]) > 1:
            return context_parallel.full_attention(q, kv, first, **options)[0]
        if first is not None:
            kv = jax.tree.map(lambda p, x: jnp.concatenate([p, x], axis=1), first, kv)
        # Queries come after the prefix, so each query sees all of it.
        return api.cross_attention(q, kv.k, kv.v, q_offset=prefix, **options)

    def _prefix(self, rows: int) -> KeyValue:
        """The learned keys and values of each stream. The rows are stream-major."""
        c = self.config
        shape = (2, c.program.streams, c.prefix_length, c.num_kv_heads, c.head_dim)
        axes = (None, "streams", "prefix", "kv_heads", "head_dim")  # keys, then values
        # Unit variance: for a normed x, W_k x and W_v x have it too.
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), axes)
        prefix = self.param("prefix", init, shape, jnp.float32)
        return stream_prefix(prefix, rows, self.dtype)


def stream_prefix(prefix: Float[Array, "2 P S K H"], rows: int, dtype) -> KeyValue:
    """ParScale's learned keys and values for `rows` = P B rows, stream-major: [P B, S, K, H]."""
    prefix = jnp.repeat(prefix.astype(dtype), rows // prefix.shape[1], axis=1)
    return KeyValue(*prefix)


class GlobalKeyValue(nn.Module):
    """K, V = RMSNorm(x) W_k, RMSNorm(x) W_v: computed once, for all cross layers (YOCO, eq. 2).

    The result is float32. The kernels cast it to their own dtype, but return its gradients in
    float32, so that the gradients of all cross layers are summed in float32.
    """

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], context: Context) -> KeyValue:
        c = self.config
        x = RMSNorm(c.norm_eps, name="norm")(x)
        kv = KeyValueProjection(c, self.dtype, name="key_value")(x)
        if c.cross_rope:
            kv = kv.replace(k=rope(kv.k, context.rotation))
        return jax.tree.map(lambda x: x.astype(jnp.float32), kv)


class CrossAttention(MixerModule):
    """Causal attention to the global K, V. It has position encoding only with cross_rope."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], context: Context, memory: None = None
    ) -> tuple[Float[Array, "B N D"], None]:
        c = self.config
        q = Query(c, self.dtype, name="query")(x)
        if c.cross_rope:
            q = rope(q, context.rotation)
        kv, options = context.global_kv, attention_options(self.compute)
        if context.at is not None:
            y = attend_to_cache(q, kv, context.global_cache, context.at, **options)
        elif isinstance(kv, SharedKeyValue):
            y = context_parallel.cross_attention(q, kv, segment_ids=context.segment_ids, **options)
        else:
            y = api.cross_attention(q, kv.k, kv.v, segment_ids=context.segment_ids, **options)
        return Output(c, self.dtype, name="output")(y), None


MODULES: dict[str, type[MixerModule]] = {
    "window": WindowAttention,
    "full": FullAttention,
    "cross": CrossAttention,
}
