"""Schedules, AdamW, Muon and skipped updates against hand computation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import tiny
from yocou_jax.model import abstract_params
from yocou_jax.optimizer import make_optimizer, make_schedule
from yocou_jax.train import logical_axes


def settings(**fields):
    return tiny.config(optimizer=fields, run={"steps": 1000}).optimizer


# --- Schedules ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "steps", "expected"),
    [
        # warm-up 4: the first update takes a quarter; then the cosine over 96 steps down to 0.1
        (
            {"schedule": "cosine", "warmup_steps": 4},
            100,
            {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 52: 0.55, 28: 0.1 + 0.9 * 0.8535534, 100: 0.1},
        ),
        # constant to step 70, then linear over 30
        (
            {"schedule": "wsd", "warmup_steps": 4, "decay_fraction": 0.3},
            100,
            {0: 0.25, 3: 1.0, 40: 1.0, 70: 1.0, 85: 0.55, 99: 0.13, 100: 0.1},
        ),
        ({"schedule": "constant", "warmup_steps": 2}, 100, {0: 0.5, 1: 1.0, 99: 1.0}),
        ({"schedule": "cosine", "warmup_steps": 0}, 100, {0: 1.0, 50: 0.55, 100: 0.1}),
        ({"schedule": "cosine", "warmup_steps": 1}, 101, {0: 1.0, 1: 1.0, 101: 0.1}),
        # A decay as long as the run leaves room for the warm-up and still ends at the bottom.
        (
            {"schedule": "wsd", "warmup_steps": 20, "decay_fraction": 1.0},
            100,
            {19: 1.0, 20: 1.0, 60: 0.55, 100: 0.1},
        ),
    ],
)
def test_schedules_at_points_computed_by_hand(fields, steps, expected):
    schedule = make_schedule(settings(learning_rate=2e-3, final_fraction=0.1, **fields), steps)
    for step, share in expected.items():
        assert float(schedule(step)) == pytest.approx(2e-3 * share, rel=1e-5), step


# --- AdamW ----------------------------------------------------------------------------------------

AXES = {
    "matrix": ("embed", "mlp"),
    "stacked": ("layers", "heads", "head_dim", "embed"),
    "scale": ("layers", "norm"),
    "prefix": ("layers", "pair", "streams", "prefix", "kv_heads", "head_dim"),
}
SHAPES = {"matrix": (3, 5), "stacked": (2, 2, 2, 3), "scale": (2, 3), "prefix": (1, 2, 2, 1, 1, 2)}


def _random(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(scale * rng.normal(size=s), jnp.float32) for k, s in SHAPES.items()}


def test_adamw_by_hand_for_three_steps():
    """Clipping, both moments with bias correction, and decay of matrices alone."""
    lr, b1, b2, eps, decay, clip = 0.01, 0.8, 0.9, 1e-3, 0.5, 2.0
    config = settings(
        **{"learning_rate": lr, "beta1": b1, "beta2": b2, "eps": eps, "weight_decay": decay},
        **{"clip_norm": clip, "schedule": "constant", "warmup_steps": 2},
    )
    optimizer = make_optimizer(config, 1000, AXES)
    params = _random(0)
    state, expected = optimizer.init(params), {k: np.asarray(v) for k, v in params.items()}
    m = {k: np.zeros(s) for k, s in SHAPES.items()}
    v = {k: np.zeros(s) for k, s in SHAPES.items()}
    for t, size in enumerate((0.01, 1.0, 10.0), 1):  # the first is small enough not to be clipped
        grads = _random(t, size)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        norm = np.sqrt(sum(np.sum(np.square(g)) for g in grads.values()))
        assert (norm > clip) == (t > 1)
        rate = lr * (0.5 if t == 1 else 1.0)
        for name, g in grads.items():
            g = np.asarray(g) * min(1.0, clip / norm)
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g**2
            step = m[name] / (1 - b1**t) / (np.sqrt(v[name] / (1 - b2**t)) + eps)
            if name in ("matrix", "stacked"):
                step = step + decay * expected[name]
            expected[name] = expected[name] - rate * step
    tiny.assert_close(params, expected, 1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_matrices_decay(name):
    """With gradients of 0 an update is nothing but the decay."""
    config = tiny.model("full*2, streams=2", qk_norm=True)
    axes, params = logical_axes(abstract_params(config)), tiny.params(config)
    optimizer = make_optimizer(
        settings(name=name, schedule="constant", warmup_steps=0, learning_rate=0.1), 10, axes
    )
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
    for (path, update), param in zip(
        jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(params), strict=True
    ):
        where = jax.tree_util.keystr(path)
        decays = not (where.endswith("['scale']") or where.endswith("['prefix']"))
        wanted = -0.1 * 0.1 * param if decays else jnp.zeros_like(param)
        np.testing.assert_allclose(update, wanted, atol=1e-6, err_msg=where)


# --- Muon -----------------------------------------------------------------------------------------


def _matrices(path: str, x) -> np.ndarray | None:
    """A parameter as [count, rows, columns], written down anew for each kind; None: no matrix."""
    x = np.asarray(x)
    if any(part in path for part in ("'query']['project'", "'key']['kernel'", "'value']['kernel'")):
        return x.reshape(-1, x.shape[-3], x.shape[-2] * x.shape[-1])
    if "'output']['project'" in path:
        return x.reshape(-1, x.shape[-3] * x.shape[-2], x.shape[-1])
    if any(f"'{part}']" in path for part in ("gate", "up", "down")):
        return x.reshape(-1, *x.shape[-2:])
    return None


def test_muon_orthogonalises_each_matrix_of_a_stack():
    config = tiny.model("yoco_u", qk_norm=True, **tiny.MOE)
    axes, params = logical_axes(abstract_params(config)), tiny.params(config)
    fields = {"name": "muon", "schedule": "constant", "warmup_steps": 0, "learning_rate": 0.1}
    optimizer = make_optimizer(settings(**fields, weight_decay=0.0, clip_norm=1e9), 10, axes)
    rng = np.random.default_rng(5)
    # Matrices of one stack differ in size a hundredfold: orthogonalised together they would show.
    grads = jax.tree.map(
        lambda x: jnp.asarray(
            rng.normal(size=x.shape)
            * 10.0 ** rng.uniform(-1, 1, (x.shape[0],) + (1,) * (x.ndim - 1)),
            jnp.float32,
        ),
        params,
    )
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    counts = {"muon": 0, "adam": 0}
    for (path, update), grad in zip(
        jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(grads), strict=True
    ):
        where = jax.tree_util.keystr(path)
        matrices = _matrices(where, update)
        if matrices is None:  # the first step of Adam: the sign, times the learning rate
            np.testing.assert_allclose(update, -0.1 * np.sign(grad), rtol=1e-3, err_msg=where)
            counts["adam"] += 1
            continue
        counts["muon"] += 1
        values = np.linalg.svd(matrices, compute_uv=False)
        # Newton-Schulz leaves singular values around 1, between about 0.6 and 1.3, here times
        # 0.2 sqrt(longer side), which makes the size of an entry that of AdamW's.
        values /= 0.1 * 0.2 * np.sqrt(max(matrices.shape[1:]))
        assert values.min() > 0.3, where
        assert values.max() < 1.5, where
        # And they point downhill.
        assert (np.asarray(update) * np.asarray(grad)).sum() < 0, where
    assert counts["muon"] >= 12
    assert counts["adam"] >= 8


# --- Updates that are not finite ------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_update_that_is_not_finite_changes_nothing_and_is_counted(bad):
    optimizer = make_optimizer(settings(), 1000, AXES)
    params = _random(0)
    _, state = optimizer.update(_random(1), optimizer.init(params), params)
    before = jax.tree.leaves(state.inner_state)
    broken = _random(2)
    broken["scale"] = broken["scale"].at[0, 0].set(bad)
    for count in (1, 2):
        updates, state = optimizer.update(broken, state, params)
        assert all((np.asarray(u) == 0).all() for u in updates.values())
        assert int(state.notfinite_count) == int(state.total_notfinite) == count
    for was, now in zip(before, jax.tree.leaves(state.inner_state), strict=True):
        np.testing.assert_array_equal(was, now)
    updates, state = optimizer.update(_random(3), state, params)
    assert all((np.asarray(u) != 0).any() for u in updates.values())
    assert int(state.notfinite_count) == 0
    assert int(state.total_notfinite) == 2
