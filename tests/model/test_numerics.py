"""What is computed in float32 for each compute type, and the size of initial parameters.

A result in bfloat16 may differ from the exact one only by its last rounding: half a unit in the
last place, which is 2^-8 of its size. An intermediate result in bfloat16 gives an error of several
units.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracle, tiny
from yocou_jax.model import LanguageModel, abstract_params, to_logits
from yocou_jax.model.attention import Context, GlobalKeyValue
from yocou_jax.model.layers import gated_silu, rms_norm, rope, rotation
from yocou_jax.training.loss import cross_entropy
from yocou_jax.training.step import logical_axes

ROUNDING = 2.0**-8  # of a bfloat16, relative
RNG = np.random.default_rng(0)


def bfloat16(*shape, scale=1.0):
    return jnp.asarray(scale * RNG.normal(size=shape), jnp.bfloat16)


def exact(x) -> np.ndarray:
    return np.asarray(x, np.float64)


def assert_rounded_once(got, want):
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(exact(got), want, rtol=1.01 * ROUNDING, atol=1e-30)


# --- In float32 for each compute type -------------------------------------------------------------


def test_rms_norm_and_its_gradient():
    x, scale, g = bfloat16(64, 48), jnp.asarray(RNG.normal(size=48), jnp.float32), bfloat16(64, 48)
    got, pull = jax.vjp(lambda x: rms_norm(x, scale, 0.1), x)
    assert_rounded_once(got, oracle.norm(exact(x), {"scale": exact(scale)}, 0.1))
    inverse = 1 / np.sqrt((exact(x) ** 2).mean(-1, keepdims=True) + 0.1)
    normed, slope = exact(x) * inverse, exact(g) * exact(scale)
    want = inverse * (slope - normed * (normed * slope).mean(-1, keepdims=True))
    error = np.abs(exact(pull(g)[0]) - want)
    assert (error <= 1.01 * ROUNDING * np.abs(want) + 1e-5).all()


def test_gated_silu_and_its_gradient():
    gate, up, g = bfloat16(64, 48, scale=3), bfloat16(64, 48), bfloat16(64, 48)
    got, pull = jax.vjp(gated_silu, gate, up)
    x = exact(gate)
    sigmoid = 1 / (1 + np.exp(-x))
    assert_rounded_once(got, x * sigmoid * exact(up))
    d_gate, d_up = pull(g)
    assert_rounded_once(d_up, exact(g) * x * sigmoid)
    want = exact(g) * exact(up) * (sigmoid + x * sigmoid * (1 - sigmoid))
    np.testing.assert_allclose(exact(d_gate), want, rtol=1.01 * ROUNDING, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rope_at_positions_far_into_a_text(dtype):
    """bfloat16 has integers up to 256: with angles in bfloat16, later positions would be equal."""
    x = bfloat16(1, 8, 2, 16).astype(dtype)
    positions = np.array([[0, 1, 255, 257, 300, 1023, 4097, 8191]])
    want = oracle.rotate(exact(x), positions, 100.0)
    got, back = jax.vjp(lambda x: rope(x, rotation(positions, 16, 100.0)), x)
    assert got.dtype == dtype
    error = np.abs(exact(got) - want)
    assert (error <= (1.01 * ROUNDING * np.abs(want) if dtype == jnp.bfloat16 else 0) + 2e-3).all()
    (gradient,) = back(x)
    want = oracle.rotate(exact(x), -positions, 100.0)
    assert gradient.dtype == dtype
    error = np.abs(exact(gradient) - want)
    assert (error <= (1.01 * ROUNDING * np.abs(want) if dtype == jnp.bfloat16 else 0) + 2e-3).all()


def test_logits_leave_the_product_in_float32():
    hidden, head = bfloat16(2, 6, 64), jnp.asarray(RNG.normal(size=(64, 11)), jnp.float32)
    want = exact(hidden) @ exact(head.astype(jnp.bfloat16))
    np.testing.assert_allclose(to_logits(hidden, head), want, rtol=1e-4, atol=1e-4)
    targets = jnp.asarray(RNG.integers(0, 11, (2, 6)))
    lse = oracle.logsumexp(want)
    nll = lse - np.take_along_axis(want, np.asarray(targets)[..., None], -1)[..., 0]
    total, sums = cross_entropy(hidden, head, targets)
    np.testing.assert_allclose((sums.nll, sums.z), (nll.sum(), (lse**2).sum()), rtol=1e-5)
    # With a gradient, other code runs.
    again, _ = jax.value_and_grad(lambda h: cross_entropy(h, head, targets)[0])(hidden)
    np.testing.assert_allclose((total, again), nll.sum(), rtol=1e-5)


def test_the_global_keys_and_values_are_float32():
    """So the gradients of all cross layers are summed in float32."""
    config = tiny.model(cross_rope=True)
    module = GlobalKeyValue(config, jnp.bfloat16)
    x, context = (
        jnp.zeros((2, 6, config.d_model), jnp.bfloat16),
        Context.of(config, jnp.arange(6)[None]),
    )
    kv, _ = jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), x, context))
    assert (kv.k.dtype, kv.v.dtype) == (jnp.float32, jnp.float32)


# --- Initial parameters ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "fields"),
    [
        ("window*1@3 | cross*1", tiny.MOE | {"num_shared_experts": 2, "qk_norm": True}),
        ("full*1@2, streams=2", {"tie_embeddings": True}),
    ],
    ids=["experts", "streams"],
)
def test_initial_parameters_have_the_size_of_their_fan_in(program, fields):
    """1 / sqrt(inputs). Matrices that write to the residual stream also have a factor
    1 / sqrt(2 depth), where loops count. Embedding and head: 1 / sqrt(D). Prefixes: 1. Norm scales:
    exactly 1."""
    wide = {"d_model": 64, "d_ff": 96, "vocab_size": 128, "prefix_length": 16, "expert_width": 48}
    config = tiny.model(program, **(fields | wide))
    streams = config.program.streams
    init = jax.jit(LanguageModel(config, tiny.compute()).init)
    params = nn.unbox(init(jax.random.key(3), jnp.zeros((1, 2), jnp.int32)))["params"]
    axes = logical_axes(abstract_params(config))
    for (path, x), names in zip(
        jax.tree_util.tree_leaves_with_path(params),
        jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple)),
        strict=True,
    ):
        name = jax.tree_util.keystr(path)
        sizes = dict(zip(names, x.shape, strict=True))
        if name.endswith("['scale']"):
            np.testing.assert_array_equal(x, 1.0, err_msg=name)
            continue
        want = config.d_model**-0.5
        if "stream_gate" in name:
            want = (streams * config.d_model) ** -0.5
        if name.endswith("['prefix']"):
            want = 1.0
        if "['output']" in name:
            want = (sizes["heads"] * sizes["head_dim"]) ** -0.5
        if "['down']" in name:
            want = sizes["mlp"] ** -0.5
        if "['output']" in name or "['down']" in name:
            want *= (2 * config.program.depth) ** -0.5
        # Four standard errors of a standard deviation.
        np.testing.assert_allclose(np.std(x), want, rtol=4 / np.sqrt(2 * x.size), err_msg=name)
        assert abs(np.mean(x)) < 4 * want / np.sqrt(x.size), name
