"""Mixture-of-experts feed-forward: SwiGLU experts, the top k of them per token, and shared ones.

Tokens are sorted by expert. `jax.lax.ragged_dot` is one matrix product with one group per expert,
so no token is dropped, and no expert is padded to a capacity. Experts are not split over devices:
each device computes with a slice of the width of every expert (mesh.tensor), or with all of it.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from yocou_jax.config import ModelConfig
from yocou_jax.model.layers import Linear, SwiGLU, fan_in_init, gated_silu
from yocou_jax.sharding import spec_for
from yocou_jax.typing import Array, Float, Int


@flax.struct.dataclass
class RouterStats:
    """Routing statistics of one run of a layer: each loop has its own.

    load_balance is 1 for a uniform load, and at most E / k. All three are means over every token of
    this run, in every stream. A token with loss weight 0 (in the rows that fill the last validation
    batch) counts too.

    load_balance  E sum_e f_e P_e, with the share of assignments f and the mean probability P
                  (Switch Transformer, eq. 4)
    router_z      mean of logsumexp(router logits)^2 (ST-MoE, eq. 5)
    load [E]      E times the share of the assignments that each expert gets (uniform: 1)
    """

    load_balance: Float[Array, ""]
    router_z: Float[Array, ""]
    load: Float[Array, " E"]


def _experts(
    x: Float[Array, "M D"],
    weights: Float[Array, "M k"],
    chosen: Int[Array, "M k"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
) -> Float[Array, "M D"]:
    """Sends each token through its `chosen` experts, and returns the sum of their results, times
    `weights`. gate, up, down: the SwiGLU matrices of all experts; F is the width of one expert."""
    num_experts, (tokens, per_token) = gate.shape[0], chosen.shape
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    group_sizes = jnp.bincount(chosen.reshape(-1), length=num_experts).astype(jnp.int32)
    # unique_indices: this is a permutation, so its gradient is a scatter without collisions. It is
    # the same in every run, also on a GPU.
    x_sorted = jnp.repeat(x, per_token, axis=0).at[order].get(unique_indices=True)
    hidden = gated_silu(
        jax.lax.ragged_dot(x_sorted, gate, group_sizes),
        jax.lax.ragged_dot(x_sorted, up, group_sizes),
    )
    y = jax.lax.ragged_dot(hidden, down, group_sizes)
    y = y.at[jnp.argsort(order)].get(unique_indices=True).reshape(tokens, per_token, -1)
    return jnp.einsum("mkd,mk->md", y, weights, preferred_element_type=jnp.float32).astype(x.dtype)


class MixtureOfExperts(nn.Module):
    """sum over the top-k experts of p_e SwiGLU_e(x), plus the shared experts: [B, N, D] as x.

    The probabilities are a float32 softmax over all experts. Those of the k chosen experts are
    scaled, so that their sum is 1. The shared experts are one SwiGLU, as wide as all of them.
    """

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> tuple[Float[Array, "B N D"], RouterStats]:
        c, d, scale = self.config, x.shape[-1], self.config.residual_scale
        axes = ("embed", "experts")
        router = Linear((c.num_experts,), axes, jnp.float32, exact=True, name="router")
        logits = router(x.astype(jnp.float32))
        probabilities = jax.nn.softmax(logits, axis=-1)
        weights, chosen = jax.lax.top_k(probabilities, c.experts_per_token)
        weights = (weights / weights.sum(axis=-1, keepdims=True)).astype(self.dtype)

        def kernel(name, fan_in, shape, axes, init_scale=1.0):
            init = nn.with_logical_partitioning(fan_in_init(fan_in, init_scale), axes)
            return self.param(name, init, shape, jnp.float32).astype(self.dtype)

        width = c.expert_width
        into, out = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")
        kernels = (
            kernel("gate", d, (c.num_experts, d, width), into),
            kernel("up", d, (c.num_experts, d, width), into),
            kernel("down", width, (c.num_experts, width, d), out, scale),
        )
        y = _sharded_experts(x, weights, chosen, *kernels)
        if c.num_shared_experts:
            y = y + SwiGLU(c.num_shared_experts * width, self.dtype, scale, name="shared")(x)

        counts = jnp.bincount(chosen.reshape(-1), length=c.num_experts)
        load = counts / chosen.size * c.num_experts
        return y, RouterStats(
            load_balance=jnp.sum(load * probabilities.mean(axis=(0, 1))),
            router_z=jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2),
            load=load,
        )


def _sharded_experts(x, weights, chosen, *kernels):
    """Runs `_experts` on each device with its own tokens. A sort across devices would gather all
    tokens.

    Each tensor shard has a slice of the width of every expert, so the results are summed over the
    shards.

    Raises NotImplementedError if LOGICAL_AXES splits the experts themselves: `_experts` counts the
    tokens of all experts, and would send them to wrong experts of a slice.
    """

    def flat(x, weights, chosen, *kernels):
        rows = (array.reshape(-1, array.shape[-1]) for array in (x, weights, chosen))
        return _experts(*rows, *kernels).reshape(x.shape)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return flat(x, weights, chosen, *kernels)
    # From LOGICAL_AXES, except "embed": every device needs all rows of its experts' matrices.
    batch = spec_for(("batch", "length", None), x.shape, mesh)
    into = spec_for(("experts", None, "mlp"), kernels[0].shape, mesh)
    out = spec_for(("experts", "mlp", None), kernels[-1].shape, mesh)
    if into[0] is not None:
        raise NotImplementedError(
            f"LOGICAL_AXES splits 'experts' over {into[0]}, but no token can be sent to an expert "
            "on another device yet."
        )

    def local(*args):
        y = flat(*args)
        return jax.lax.psum(y, out[1]) if out[1] else y

    return jax.shard_map(local, in_specs=(batch, batch, batch, into, into, out), out_specs=batch)(
        x, weights, chosen, *kernels
    )
