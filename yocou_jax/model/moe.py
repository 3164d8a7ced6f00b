"""Mixture-of-experts feed-forward: SwiGLU experts, the top k of them per token, and shared ones.

Tokens are sorted by expert. `grouped_matmul` is a matrix product with one group of rows per expert,
so no token is dropped, and no expert is padded to a capacity.

The mesh axis "tensor" splits the width of every expert, and "expert" splits the experts themselves.
No token is dropped, and the result is that of one device, also if all tokens choose the experts of
one device. There are two ways. Take a group of n devices, which have T tokens of width D each; a
token has k of the E experts. The bytes are those that a device sends in a layer, in bfloat16, and
in float32 in brackets; without remat, they are the same forward and backward:

gather      All tokens go to all devices of the group. Each runs its own experts on them, and the
            sums, in float32, go back to the devices of the tokens (reduce-scatter).
            (2 + 4) (n - 1) T D bytes (8), and n k T rows in memory.
all-to-all  Each token goes to the devices of its k experts (k rows), and k results come back.
            (2 + 2) k T D (n - 1) / n bytes (8), and at most min(n k, E) T rows (`most_rows`).

If n > k, the all-to-all is used: it sends at most 2/3 of the bytes. It sends less if n > k / 1.5,
but then the gain is small. An all-to-all has to cross several links of a torus, the neighbors of a
gather one; and an equal number of rows needs more memory, because XLA copies what it exchanges into
another layout. XLA has no ragged all-to-all for the CPU. There, the devices gather all rows and
pick theirs: it is exact, and meant for tests.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from yocou_jax.config import ModelConfig
from yocou_jax.model.grouped_matmul import block_rows, grouped_matmul
from yocou_jax.model.layers import Linear, SwiGLU, fan_in_init, gated_silu
from yocou_jax.sharding import gather, scatter, spec_for, split_over
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


class Slices(NamedTuple):
    """Rows that a device exchanges with the others of its group: one slice for each expert that it
    sends to, or for each device and own expert that it gets from. here, there: where a slice starts
    on this device and on the other one. sizes: its rows."""

    here: Int[Array, " S"]
    there: Int[Array, " S"]
    sizes: Int[Array, " S"]


def _starts(sizes: Int[Array, "... S"], axis: int = -1) -> Int[Array, "... S"]:
    return jnp.cumsum(sizes, axis) - sizes


def _slices(
    counts: Int[Array, " E"], group: tuple[str, ...]
) -> tuple[Slices, Slices, Int[Array, " e"]]:
    """(what this device sends, what it gets, rows for each of its own e experts). counts: its rows
    for each expert of the group. It sends them in the order of the experts, and gets them so."""
    device, devices = jax.lax.axis_index(group), jax.lax.axis_size(group)
    sent = jax.lax.all_gather(counts, group)  # [devices, E]
    totals = sent.sum(0).reshape(devices, -1)  # [devices, e]
    target = _starts(totals).reshape(1, -1) + _starts(sent, axis=0)  # [devices, E]

    def mine(x):
        return x.reshape(devices, devices, -1)[:, device].reshape(-1)

    send = Slices(_starts(counts), target[device], counts)
    return send, Slices(mine(target), mine(_starts(sent)), mine(sent)), totals[device]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _exchange(
    x: Float[Array, "M D"], rows: int, group: tuple[str, ...], send: Slices, receive: Slices
) -> Float[Array, "R D"]:
    """What the devices of a group send to this one, in so many rows; others are 0. `receive` and
    `send` exchanged is the way back, and the gradient."""

    def ragged(x, send, receive):
        empty = jnp.zeros((rows, x.shape[1]), x.dtype)
        sizes = send.here, send.sizes, send.there, receive.sizes
        return jax.lax.ragged_all_to_all(x, empty, *sizes, axis_name=group)

    def gathered(x, send, receive):  # XLA has no ragged all-to-all for the CPU
        x = jax.lax.all_gather(x, group)  # [devices, M, D]
        row = jnp.arange(rows)[:, None] - receive.here[None]
        found = (row >= 0) & (row < receive.sizes[None])  # [R, S]
        one = found.argmax(1)
        device = one // (len(receive.sizes) // len(x))
        x = x[device, receive.there[one] + jnp.arange(rows) - receive.here[one]]
        return jnp.where(found.any(1, keepdims=True), x, 0)

    return jax.lax.platform_dependent(x, send, receive, cpu=gathered, default=ragged)


def _exchange_fwd(x, rows, group, send, receive):
    return _exchange(x, rows, group, send, receive), (len(x), send, receive)


def _exchange_bwd(rows, group, kept, g):
    length, send, receive = kept
    return _exchange(g, length, group, receive, send), None, None


_exchange.defvjp(_exchange_fwd, _exchange_bwd)


def most_rows(tokens: int, per_token: int, experts: int, devices: int) -> int:
    """The most rows that a device with so many of the experts can get from so many devices with so
    many tokens each: every token, as often as it can choose experts of this device."""
    return devices * tokens * min(per_token, experts)


def _experts(
    x: Float[Array, "M D"],
    weights: Float[Array, "M k"],
    chosen: Int[Array, "M k"],
    gate: Float[Array, "e D F"],
    up: Float[Array, "e D F"],
    down: Float[Array, "e F D"],
    group: tuple[str, ...] = (),
    parts: int = 1,
) -> Float[Array, "M D"]:
    """Sends each token through its `chosen` experts, and returns the sum of their results, times
    `weights`, in float32. gate, up, down: the SwiGLU matrices of the experts of this device; F is
    the width of one expert. group: mesh axes over which all experts are split; each device has
    other tokens. parts: the experts of this device are one of so many parts, and the others add
    nothing; they have numbers below 0, or from e on."""
    own_experts, (tokens, per_token) = gate.shape[0], chosen.shape
    num_experts = own_experts * (jax.lax.axis_size(group) if group else 1)
    if parts > 1:  # sorted to the end
        chosen = jnp.where((chosen >= 0) & (chosen < num_experts), chosen, num_experts)
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    group_sizes = jnp.bincount(chosen.reshape(-1), length=num_experts).astype(jnp.int32)
    # unique_indices: this is a permutation, so its gradient is a scatter without collisions. It is
    # the same in every run, also on a GPU.
    x_sorted = jnp.repeat(x, per_token, axis=0).at[order].get(unique_indices=True)
    if parts > 1:
        # What grouped_matmul and its gradient give for rows after the last group is not defined.
        exists = (jnp.arange(len(order)) < group_sizes.sum())[:, None]
        x_sorted = jnp.where(exists, x_sorted, 0)
    if group:
        send, receive, group_sizes = _slices(group_sizes, group)
        rows = most_rows(tokens, per_token, own_experts, jax.lax.axis_size(group))
        x_sorted = _exchange(x_sorted, rows, group, send, receive)
    block = block_rows(tokens * per_token / (own_experts * parts))
    hidden = gated_silu(
        grouped_matmul(x_sorted, gate, group_sizes, block),
        grouped_matmul(x_sorted, up, group_sizes, block),
    )
    y = grouped_matmul(hidden, down, group_sizes, block)
    if group:
        y = _exchange(y, len(order), group, receive, send)
    if parts > 1:
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
    """Runs `_experts` on each device with its tokens, or those of its expert group. A sort across
    all devices would gather all tokens.

    Each tensor shard has a slice of the width of every expert, so the results are summed over the
    shards.
    """

    def flat(x, weights, chosen, *kernels, **options):
        rows = (array.reshape(-1, array.shape[-1]) for array in (x, weights, chosen))
        return _experts(*rows, *kernels, **options).reshape(x.shape)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return flat(x, weights, chosen, *kernels).astype(x.dtype)
    # From LOGICAL_AXES, except "embed": every device needs all rows of its experts' matrices.
    tokens = spec_for(("batch", "length", None), x.shape, mesh)
    into = spec_for(("experts", None, "mlp"), kernels[0].shape, mesh)
    out = spec_for(("experts", "mlp", None), kernels[-1].shape, mesh)
    group = split_over("experts", kernels[0].shape[0], mesh) if mesh.shape["expert"] > 1 else ()
    spread = set(group) & set(split_over("batch", x.shape[0], mesh))  # the tokens are split too
    all_to_all = spread and mesh.shape["expert"] > chosen.shape[-1]

    def grouped(x, weights, chosen, *kernels):
        dtype = x.dtype
        if spread:
            chosen = jax.lax.all_gather(chosen, group, axis=0, tiled=True)
            x, weights = (
                gather(array.astype(jnp.float32), group, 0, dtype).astype(dtype)
                for array in (x, weights)
            )
        chosen = chosen - jax.lax.axis_index(group) * kernels[0].shape[0]
        y = flat(x, weights, chosen, *kernels, parts=jax.lax.axis_size(group))
        return scatter(y, group, 0, dtype) if spread else jax.lax.psum(y, group)

    def local(x, weights, chosen, *kernels):
        if group and not all_to_all:
            y = grouped(x, weights, chosen, *kernels)
        else:
            y = flat(x, weights, chosen, *kernels, group=group)
        y = y.astype(x.dtype)
        return jax.lax.psum(y, out[1]) if out[1] else y

    specs = (tokens, tokens, tokens, into, into, out)
    # With check_vma, jax 0.10.2 does not sum the gradient of x over the group if x is not gathered.
    run = jax.shard_map(local, in_specs=specs, out_specs=tokens, check_vma=False)
    return run(x, weights, chosen, *kernels)
