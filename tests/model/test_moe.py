"""Compares routed experts with a plain loop over experts, on one device and on eight."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from yocou_jax.config import MeshConfig
from yocou_jax.model import moe
from yocou_jax.model.grouped_matmul import grouped_matmul
from yocou_jax.model.moe import MixtureOfExperts, _slices, most_rows
from yocou_jax.sharding import make_mesh, tree_shardings

D = tiny.MODEL["d_model"]
X = jnp.asarray(np.random.default_rng(1).normal(size=(8, 6, D)), jnp.float32)


def layer(**fields):
    """One feed-forward with experts: (a function of parameters and x, its parameters)."""
    module = MixtureOfExperts(tiny.model(**(tiny.MOE | fields)), jnp.float32)
    boxed = jax.eval_shape(lambda: module.init(jax.random.key(0), X))["params"]
    rng = np.random.default_rng(2)
    params = jax.tree.map(
        lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), nn.unbox(boxed)
    )
    return lambda params, x: module.apply({"params": params}, x), params, boxed


def swiglu(x, gate, up, down):
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def loop_over_experts(params, x, per_token):
    """Every expert gets every token. An expert that is not chosen has weight 0."""
    logits = x @ params["router"]["kernel"]
    p = jax.nn.softmax(logits, axis=-1)
    kth = jnp.sort(p, axis=-1)[..., -per_token][..., None]
    weights = jnp.where(p >= kth, p, 0.0)
    weights = weights / weights.sum(-1, keepdims=True)
    y = jnp.zeros_like(x)
    for e in range(p.shape[-1]):
        expert = (params[name][e] for name in ("gate", "up", "down"))
        y = y + weights[..., e : e + 1] * swiglu(x, *expert)
    if "shared" in params:
        y = y + swiglu(x, *(params["shared"][name]["kernel"] for name in ("gate", "up", "down")))
    return y


def gradients(f, params, x):
    """The output, and the gradients of a projection of it, for parameters and input."""
    direction = jax.random.normal(jax.random.key(3), x.shape)

    def projected(params, x):
        y = f(params, x)
        return (y * direction).sum(), y  # the sum itself may cancel, so nothing compares it

    (_, y), grads = jax.jit(jax.value_and_grad(projected, argnums=(0, 1), has_aux=True))(params, x)
    return y, grads


@pytest.mark.parametrize(
    "fields",
    [
        {"num_experts": 4, "experts_per_token": 2},
        {"num_experts": 5, "experts_per_token": 3, "num_shared_experts": 0},
        {"num_experts": 3, "experts_per_token": 3, "num_shared_experts": 2},
    ],
    ids=["top 2 of 4", "top 3 of 5, none shared", "all 3"],
)
def test_routed_experts_are_a_loop_over_experts(fields):
    apply, params, _ = layer(**fields)
    k = fields["experts_per_token"]
    np.testing.assert_allclose(apply(params, X)[0], loop_over_experts(params, X, k), atol=2e-5)
    got = gradients(lambda p, x: apply(p, x)[0], params, X)
    tiny.assert_close(got, gradients(lambda p, x: loop_over_experts(p, x, k), params, X), 2e-5)


def test_no_token_is_dropped_when_all_choose_one_expert():
    apply, params, _ = layer(experts_per_token=1, num_shared_experts=0)
    params["router"]["kernel"] = jnp.zeros((D, 4)).at[0, 2].set(100.0)
    x = X.at[..., 0].set(1.0)
    y, stats = apply(params, x)
    expert = (params[name][2] for name in ("gate", "up", "down"))
    np.testing.assert_allclose(y, swiglu(x, *expert), atol=2e-5)
    np.testing.assert_allclose(stats.load, [0, 0, 4, 0])
    np.testing.assert_allclose(stats.load_balance, 4.0, rtol=1e-5)  # the maximum


def test_a_router_without_preference_has_balance_one():
    apply, params, _ = layer()
    params["router"]["kernel"] = jnp.zeros((D, 4))
    _, stats = apply(params, X)
    np.testing.assert_allclose(stats.load_balance, 1.0, rtol=1e-6)
    np.testing.assert_allclose(stats.router_z, np.log(4.0) ** 2, rtol=1e-6)


def test_router_statistics_by_hand():
    apply, params, _ = layer()
    _, stats = apply(params, X)
    logits = np.asarray(X, np.float64).reshape(-1, D) @ np.asarray(params["router"]["kernel"])
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.argsort(-p, axis=-1)[:, :2]
    share = np.bincount(chosen.ravel(), minlength=4) / chosen.size
    np.testing.assert_allclose(stats.load, share * 4, rtol=1e-5)
    np.testing.assert_allclose(stats.load_balance, 4 * (share * p.mean(0)).sum(), rtol=1e-5)
    z = (np.log(np.exp(logits).sum(-1)) ** 2).mean()
    np.testing.assert_allclose(stats.router_z, z, rtol=1e-5)


def test_the_balance_loss_moves_the_router():
    apply, params, _ = layer()

    def balance(kernel):
        return apply(params | {"router": {"kernel": kernel}}, X)[1].load_balance

    value, slope = jax.jit(jax.value_and_grad(balance))(params["router"]["kernel"])
    assert np.abs(slope).max() > 1e-3
    assert balance(params["router"]["kernel"] - 0.05 * slope) < value


# With two experts per token, a group of 2 devices gathers its tokens, and a larger one has an
# all-to-all.
EIGHT = {"num_experts": 8, "experts_per_token": 2}


@pytest.mark.parametrize(
    ("sizes", "fields"),
    [
        ((2, 2, 2), {}),
        ((1, 1, 8), {}),
        ((2, 1, 1, 1, 4), {}),
        ((1, 1, 2, 2, 2), {}),
        ((1, 1, 1, 1, 8), {}),
        ((1, 1, 1, 1, 8), EIGHT),
        ((1, 1, 2, 1, 4), EIGHT),
    ],
    ids=str,
)
def test_eight_devices_compute_what_one_does(sizes, fields):
    """data, fsdp, tensor, context, expert. tensor=2 divides the width 12, tensor=8 does not, and
    expert=8 does not divide the four experts."""
    apply, params, boxed = layer(**fields)

    def both(params, x):
        y, stats = apply(params, x)
        return y + stats.load_balance + stats.router_z + stats.load.max()

    expected = gradients(both, params, X)
    mesh = make_mesh(MeshConfig(*sizes))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, tree_shardings(boxed, mesh))
        got = jax.device_get(gradients(both, placed, X))
    tiny.assert_close(got, jax.device_get(expected), 1e-5)


def test_the_router_computes_in_float32_for_each_compute_type():
    """bfloat16 has three digits: its rounding would send tokens to other experts."""
    module = MixtureOfExperts(tiny.model(**tiny.MOE), jnp.bfloat16)
    _, params, _ = layer()
    x = X.astype(jnp.bfloat16)
    y, stats = jax.jit(module.apply)({"params": params}, x)
    assert y.dtype == jnp.bfloat16
    rows = np.asarray(x, np.float64).reshape(-1, D)
    logits = rows @ np.asarray(params["router"]["kernel"], np.float64)
    z = (np.log(np.exp(logits).sum(-1)) ** 2).mean()
    np.testing.assert_allclose(stats.router_z, z, rtol=1e-6)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    share = np.bincount(np.argsort(-p, axis=-1)[:, :2].ravel(), minlength=4) / (2 * len(rows))
    np.testing.assert_allclose(stats.load, 4 * share, rtol=1e-6)
    np.testing.assert_allclose(stats.load_balance, 4 * (share * p.mean(0)).sum(), rtol=1e-6)
    assert {stat.dtype for stat in jax.tree.leaves(stats)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("sizes", "fields"),
    [
        ((2, 1, 1, 1, 4), {}),
        ((1, 1, 1, 1, 8), EIGHT | {"experts_per_token": 1}),
        ((1, 1, 2, 1, 4), EIGHT),
        ((4, 1, 1, 1, 2), {}),
    ],
    ids=str,
)
def test_all_tokens_may_choose_the_experts_of_one_device(sizes, fields):
    """No token is dropped, and the other devices have nothing to do."""
    apply, params, boxed = layer(**fields)
    k = fields.get("experts_per_token", 2)
    first = jnp.zeros_like(params["router"]["kernel"]).at[:, :k].set(1.0)
    params, x = params | {"router": {"kernel": first}}, jnp.abs(X) + 1
    expected = gradients(lambda p, x: apply(p, x)[0], params, x)
    mesh = make_mesh(MeshConfig(*sizes))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, tree_shardings(boxed, mesh))
        load = jax.jit(apply)(placed, x)[1].load
        got = jax.device_get(gradients(lambda p, x: apply(p, x)[0], placed, x))
    expert = np.arange(len(load))
    np.testing.assert_allclose(load, np.where(expert < k, len(load) / k, 0), rtol=1e-6)
    tiny.assert_close(got, jax.device_get(expected), 1e-5)


@pytest.mark.parametrize(
    ("devices", "per_token", "all_to_all"),
    [(2, 1, True), (2, 2, False), (4, 3, True), (4, 4, False), (8, 2, True)],
)
def test_a_group_of_more_devices_than_a_token_has_experts_exchanges_rows(
    devices, per_token, all_to_all
):
    """For a TPU: XLA has no ragged all-to-all for the CPU. x and y are sent in bfloat16, and so are
    their gradients."""
    module = MixtureOfExperts(
        tiny.model(**(tiny.MOE | {"num_experts": 8, "experts_per_token": per_token})), jnp.bfloat16
    )
    x = jnp.zeros(X.shape, jnp.bfloat16)
    params = jax.eval_shape(lambda: nn.unbox(module.init(jax.random.key(0), x)))

    def run(params, x):
        y, vjp = jax.vjp(lambda *args: module.apply(*args)[0], params, x)
        return y, vjp(y)

    with jax.set_mesh(make_mesh(MeshConfig(data=8 // devices, expert=devices))):
        text = jax.jit(run).trace(params, x).lower(lowering_platforms=("tpu",)).as_text()
    ragged = re.findall(rf"@ragged_all_to_all\(.*-> tensor<(\d+)x{D}x(\w+)>", text)
    tokens = X.shape[0] * X.shape[1] // 8
    if not all_to_all:
        assert not ragged
        return
    most = most_rows(tokens, per_token, 8 // devices, devices)
    own = tokens * per_token
    assert sorted(ragged) == sorted([(str(rows), "bf16") for rows in (most, own)] * 2)


def test_slices_are_what_the_ragged_all_to_all_needs():
    """The CPU does not have it, so this does what its documentation says, with numpy. All rows of a
    device must arrive sorted by expert, and the way back must bring each one to where it was."""
    counts = np.random.default_rng(4).integers(0, 4, (8, 16)) * (np.arange(16) % 3 > 0)
    mesh, split = make_mesh(MeshConfig(data=1, expert=8)), jax.P("expert")
    run = jax.shard_map(
        lambda x: _slices(x, ("expert",)), mesh=mesh, in_specs=split, out_specs=split
    )
    send, receive, sizes = jax.tree.map(lambda x: np.asarray(x).reshape(8, -1), run(counts.ravel()))

    def exchange(x, rows, send, receive):
        there, out = send.there.reshape(8, 8, -1), np.zeros((8, rows), int)
        for to in range(8):  # output_offsets_ = all_to_all(output_offsets)
            begins = there[:, to].ravel()
            for i, (begin, size) in enumerate(zip(begins, receive.sizes[to], strict=True)):
                source, slice = divmod(i, 2)
                mine = 2 * to + slice
                assert send.sizes[source][mine] == size
                start = send.here[source][mine]
                out[to, begin : begin + size] = x[source, start : start + size]
        return out

    experts = [np.repeat(np.arange(16), row) for row in counts]
    rows = max(map(len, experts))
    x = np.array(
        [np.pad(1 + 100 * one + 10_000 * i, (0, rows - len(one))) for i, one in enumerate(experts)]
    )
    got = exchange(x, counts.sum(), send, receive)
    for device in range(8):
        of_expert = got[device][: sizes[device].sum()] % 10_000 // 100
        np.testing.assert_array_equal(
            of_expert, np.repeat([2 * device, 2 * device + 1], sizes[device])
        )
        assert not got[device][sizes[device].sum() :].any()
    np.testing.assert_array_equal(exchange(got, rows, receive, send), x)


def test_rows_that_do_not_divide_are_on_every_device():
    """As in generation with one row: all devices of a group have the tokens already."""
    apply, params, boxed = layer()
    x = X[:3]
    expected = gradients(lambda p, x: apply(p, x)[0], params, x)
    mesh = make_mesh(MeshConfig(data=2, expert=4))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, tree_shardings(boxed, mesh))
        got = jax.device_get(gradients(lambda p, x: apply(p, x)[0], placed, x))
    tiny.assert_close(got, jax.device_get(expected), 1e-5)


def test_a_device_has_its_own_experts_only():
    _, _, boxed = layer()
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=1, expert=4))
    split = tree_shardings(boxed, mesh)
    shapes = {
        name: split[name].shard_shape(boxed[name].value.shape) for name in ("gate", "up", "down")
    }
    assert shapes == {"gate": (1, D // 2, 12), "up": (1, D // 2, 12), "down": (1, 12, D // 2)}


@pytest.mark.parametrize(
    ("sizes", "rows"),
    [((1, 1, 1), 12), ((4, 1, 1, 1, 2), 3), ((2, 1, 1, 1, 4), 6), ((1, 1, 1, 1, 8), 12)],
    ids=["one device", "a group that gathers", "a group with an all-to-all", "a group of 8"],
)
def test_blocks_are_for_the_rows_of_an_expert(sizes, rows, monkeypatch):
    """48 tokens have 2 of 8 experts each; 8 devices have 6 tokens each."""
    apply, params, _ = layer(**EIGHT)
    seen = set()
    monkeypatch.setattr(moe, "block_rows", lambda size: seen.add(size) or 4)
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    with jax.set_mesh(mesh):
        jax.eval_shape(apply, params, X)
    assert seen == {rows}


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def undefined_after_the_groups(x, w, sizes, block):
    """As on a TPU: of rows after the last group, results and gradients may be anything."""
    return _undefined(x, w, sizes, block)[0]


def _known(array, sizes, other):
    return jnp.where((jnp.arange(len(array)) < sizes.sum())[:, None], array, other)


def _undefined(x, w, sizes, block):
    y = grouped_matmul(x, w, sizes, block)
    return _known(y, sizes, jnp.nan), (x, w, sizes)


def _undefined_bwd(block, kept, g):
    x, w, sizes = kept
    _, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, block), x, w)
    dx, dw = vjp(_known(g, sizes, 0))
    return _known(dx, sizes, jnp.nan), dw, None


undefined_after_the_groups.defvjp(_undefined, _undefined_bwd)


def test_rows_after_the_last_group_do_not_count(monkeypatch):
    rng = np.random.default_rng(5)
    chosen = jnp.asarray([rng.permutation(8)[:2] for _ in range(12)], jnp.int32) - 2  # of 4 parts
    shapes = (12, D), (12, 2), (2, D, 5), (2, D, 5), (2, 5, D)
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]

    def run():
        def loss(x, weights, *kernels):
            return (moe._experts(x, weights, chosen, *kernels, parts=4) ** 2).sum()

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4)))(*arrays)

    expected = run()
    monkeypatch.setattr(moe, "grouped_matmul", undefined_after_the_groups)
    tiny.assert_close(run(), expected, 1e-6)
