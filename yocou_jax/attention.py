"""Projections around the attention kernels: window, full, the global K/V writer, cross.

The maths (masks, softmax, backward) lives in pallas_kernels; here is what has parameters.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from pallas_kernels import api
from yocou_jax.config import ModelConfig
from yocou_jax.layers import Linear, RMSNorm, rope
from yocou_jax.sharding import attention_partition, constrain
from yocou_jax.typing import Array, Float, Int


@flax.struct.dataclass
class KeyValue:
    """Keys and values as attention reads them: k, v [B, S, K, H], rotated and normed if at all."""

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]


@flax.struct.dataclass
class Context:
    """What every layer of a forward pass sees besides the residual stream.

    positions [B or 1, N] for RoPE, restarting at each document when documents are packed;
    segment_ids [B, N] then keep attention inside a document (None: one document a row);
    global_kv is set from the moment it is written, and read by cross layers only.
    """

    positions: Int[Array, "B N"]
    segment_ids: Int[Array, "B N"] | None = None
    global_kv: KeyValue | None = None


class Query(nn.Module):
    """W_q x [B, N, Q, H], RMS-normed per head with qk_norm."""

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


class KeyValueWriter(nn.Module):
    """W_k x and W_v x; keys RMS-normed per head with qk_norm."""

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
        layout = ("batch", "length", "kv_heads", "head_dim")
        return KeyValue(constrain(k, *layout), constrain(v, *layout))


class Output(nn.Module):
    """W_o: [B, N, Q, H] back to the model width."""

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B N Q H"]) -> Float[Array, "B N D"]:
        c = self.config
        axes = ("heads", "head_dim", "embed")
        y = Linear((c.d_model,), axes, self.dtype, c.residual_scale, name="project")(x)
        return constrain(y, "batch", "length", "activation")


def attention_options(config: ModelConfig, context: Context) -> dict:
    return {
        "segment_ids": context.segment_ids,
        "implementation": config.attention,
        "partition": attention_partition(),
    }


class SelfAttention(nn.Module):
    """Causal self-attention with RoPE: over the last `window` keys, or over all of them.

    mixer "window": y_i attends to keys i-W+1 .. i. mixer "full": to keys 0 .. i, and with parallel
    streams also to the stream's own learned K/V prefix (ParScale, arXiv 2505.10475).
    """

    config: ModelConfig
    mixer: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], context: Context) -> Float[Array, "B N D"]:
        c = self.config
        q = rope(Query(c, self.dtype, name="query")(x), context.positions, c.rope_theta)
        kv = KeyValueWriter(c, self.dtype, name="key_value")(x)
        k, v = rope(kv.k, context.positions, c.rope_theta), kv.v
        options = attention_options(c, context)
        if self.mixer == "window":
            y = api.window_attention(q, k, v, window=c.window, **options)
        else:
            prefix = 0
            if c.program.streams > 1 and c.prefix_length:
                prefix = c.prefix_length
                k, v = self._prepend_prefix(k, v)
            # Queries stand behind the prefix, so that all of it is visible to each of them.
            y = api.cross_attention(q, k, v, q_offset=prefix, **options)
        return Output(c, self.dtype, name="output")(y)

    def _prepend_prefix(self, k: Array, v: Array) -> tuple[Array, Array]:
        """Puts each stream's learned keys and values before the sequence's; B is stream-major."""
        c = self.config
        shape = (2, c.program.streams, c.prefix_length, c.num_kv_heads, c.head_dim)
        axes = (None, "streams", "prefix", "kv_heads", "head_dim")  # keys, then values
        # Unit variance, as W_k x and W_v x have for a normed x.
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), axes)
        prefix = self.param("prefix", init, shape, jnp.float32).astype(self.dtype)
        prefix = jnp.repeat(prefix, k.shape[0] // c.program.streams, axis=1)
        return tuple(
            jnp.concatenate([one, own], axis=1) for one, own in zip(prefix, (k, v), strict=True)
        )


class GlobalKeyValue(nn.Module):
    """K, V = RMSNorm(x) W_k, RMSNorm(x) W_v: written once, for every cross layer (YOCO, eq. 2).

    Returned in float32: the kernels read it in their own dtype and return its gradients in
    float32, so that those of all cross layers are summed in float32.
    """

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], context: Context) -> KeyValue:
        c = self.config
        x = RMSNorm(c.norm_eps, name="norm")(x)
        kv = KeyValueWriter(c, self.dtype, name="key_value")(x)
        if c.cross_rope:
            kv = kv.replace(k=rope(kv.k, context.positions, c.rope_theta))
        return jax.tree.map(lambda x: x.astype(jnp.float32), kv)


class CrossAttention(nn.Module):
    """Causal attention on the global K, V, without position encoding unless cross_rope."""

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], context: Context) -> Float[Array, "B N D"]:
        c = self.config
        q = Query(c, self.dtype, name="query")(x)
        if c.cross_rope:
            q = rope(q, context.positions, c.rope_theta)
        kv = context.global_kv
        y = api.cross_attention(q, kv.k, kv.v, **attention_options(c, context))
        return Output(c, self.dtype, name="output")(y)
