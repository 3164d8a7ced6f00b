"""Mixture-of-experts feed-forward: SwiGLU experts, the top k of them per token, and shared ones.

Tokens are sorted by expert. `jax.lax.ragged_dot` is one matrix product with one group per expert,
so no token is dropped, and no expert is padded to a capacity.

The mesh axis "tensor" splits the width of every expert, and "expert" splits the experts themselves.
The devices of an expert group gather their tokens, each runs its own experts on all of them, and
the sums go back to the devices of the tokens (reduce-scatter, in float32). That is exact, also if
all tokens choose the experts of one device, and needs memory for all tokens of the group, each as
often as it has experts. An all-to-all would send a token once for each of its experts. So if a
token has k of them, this moves fewer bytes in a group of at most k / 1.5 devices.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from yocou_jax.config import ModelConfig
from yocou_jax.model.layers import Linear, SwiGLU, fan_in_init, gated_silu
from yocou_jax.sharding import gather, spec_for, split_over
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
    some: bool = False,
) -> Float[Array, "M D"]:
    """Sends each token through its `chosen` experts, and returns the sum of their results, times
    `weights`, in float32. gate, up, down: the SwiGLU matrices of all experts; F is the width of one
    expert. some: they are only some of the experts; another one, whose number is not from 0 to
    E - 1, adds nothing."""
    num_experts, (tokens, per_token) = gate.shape[0], chosen.shape
    if some:  # sorted to the end
        chosen = jnp.where((chosen >= 0) & (chosen < num_experts), chosen, num_experts)
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    group_sizes = jnp.bincount(chosen.reshape(-1), length=num_experts).astype(jnp.int32)
    # unique_indices: this is a permutation, so its gradient is a scatter without collisions. It is
    # the same in every run, also on a GPU.
    x_sorted = jnp.repeat(x, per_token, axis=0).at[order].get(unique_indices=True)
    if some:
        # What ragged_dot and its gradient give for rows after the last group is not defined.
        exists = (jnp.arange(len(order)) < group_sizes.sum())[:, None]
        x_sorted = jnp.where(exists, x_sorted, 0)
    hidden = gated_silu(
        jax.lax.ragged_dot(x_sorted, gate, group_sizes),
        jax.lax.ragged_dot(x_sorted, up, group_sizes),
    )
    y = jax.lax.ragged_dot(hidden, down, group_sizes)
    if some:
        y = jnp.where(exists, y, 0)
    y = y.at[jnp.argsort(order)].get(unique_indices=True).reshape(tokens, per_token, -1)
    return jnp.einsum("mkd,mk->md", y, weights, preferred_element_type=jnp.float32)


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
    """Runs `_experts` on each device with the tokens of its expert group. A sort across all devices
    would gather all tokens.

    Each tensor shard has a slice of the width of every expert, so the results are summed over the
    shards.
    """

    def flat(x, weights, chosen, *kernels, some=False):
        rows = (array.reshape(-1, array.shape[-1]) for array in (x, weights, chosen))
        return _experts(*rows, *kernels, some=some).reshape(x.shape)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return flat(x, weights, chosen, *kernels).astype(x.dtype)
    # From LOGICAL_AXES, except "embed": every device needs all rows of its experts' matrices.
    tokens = spec_for(("batch", "length", None), x.shape, mesh)
    into = spec_for(("experts", None, "mlp"), kernels[0].shape, mesh)
    out = spec_for(("experts", "mlp", None), kernels[-1].shape, mesh)
    group = split_over("experts", kernels[0].shape[0], mesh) if mesh.shape["expert"] > 1 else ()
    gathered = set(group) & set(split_over("batch", x.shape[0], mesh))

    def local(x, weights, chosen, *kernels):
        dtype = x.dtype
        if gathered:
            chosen = jax.lax.all_gather(chosen, group, axis=0, tiled=True)
            x, weights = (
                gather(array.astype(jnp.float32), group, 0, dtype).astype(dtype)
                for array in (x, weights)
            )
        if group:
            chosen = chosen - jax.lax.axis_index(group) * kernels[0].shape[0]
        y = flat(x, weights, chosen, *kernels, some=bool(group))
        if gathered:
            y = jax.lax.psum_scatter(y, group, scatter_dimension=0, tiled=True)
        elif group:
            y = jax.lax.psum(y, group)
        y = y.astype(dtype)
        return jax.lax.psum(y, out[1]) if out[1] else y

    specs = (tokens, tokens, tokens, into, into, out)
    # With check_vma, jax 0.10.2 does not sum the gradient of x over the group if x is not gathered.
    run = jax.shard_map(local, in_specs=specs, out_specs=tokens, check_vma=False)
    return run(x, weights, chosen, *kernels)
