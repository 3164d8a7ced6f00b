"""Schedules, AdamW, Muon and skipped updates, compared with computations by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import tiny
from yocou_jax.model import abstract_params
from yocou_jax.training.optimizer import decay_starts, make_optimizer, make_schedule
from yocou_jax.training.step import logical_axes


def settings(**fields):
    return tiny.config(optimizer=fields, run={"steps": 1000}).optimizer


def optimizer_of(config, axes) -> optax.GradientTransformation:
    return make_optimizer(config, make_schedule(config, 1000), axes)


# --- Schedules ------------------------------------------------------------------------------------


# Learning rates of all updates, as shares of the peak, by hand. None: independent of `steps`.
TABLES = [
    # schedule, warm-up, decay_fraction, final_fraction; the rates; the start of the decay
    ("cosine", 0, 1.0, 0.2, [0.2], 0),
    ("cosine", 0, 1.0, 0.0, [0.75, 0.25, 0.0], 0),
    ("cosine", 1, 1.0, 0.1, [1.0, 0.1], 1),
    ("cosine", 2, 1.0, 0.1, [0.5, 1.0, 0.775, 0.325, 0.1], 2),
    ("cosine", 4, 1.0, 0.1, [0.25, 0.5, 0.75, 1.0, 0.1], 4),
    ("wsd", 0, 0.5, 0.2, [0.2], 0),
    ("wsd", 0, 1.0, 0.0, [0.8, 0.6, 0.4, 0.2, 0.0], 0),
    ("wsd", 0, 0.4, 0.0, [1.0, 1.0, 1.0, 0.5, 0.0], 3),
    ("wsd", 0, 0.35, 0.0, [1.0, 1.0, 1.0, 0.5, 0.0], 3),  # 1.75 updates are rounded to 2
    ("wsd", 2, 0.2, 0.1, [0.5, 1.0, 1.0, 1.0, 0.1], 4),
    ("wsd", 2, 0.01, 0.1, [0.5, 1.0, 1.0, 1.0, 0.1], 4),
    # A decay that is longer than the rest after the warm-up takes the whole rest, without a jump.
    ("wsd", 3, 0.9, 0.5, [1 / 3, 2 / 3, 1.0, 0.75, 0.5], 3),
    ("wsd", 1, 1.0, 0.2, [1.0, 0.8, 0.6, 0.4, 0.2], 1),
    ("constant", 0, 1.0, 0.1, [1.0, 1.0, 1.0], None),
    ("constant", 2, 1.0, 0.1, [0.5, 1.0, 1.0, 1.0], None),
    ("constant", 4, 1.0, 0.1, [0.25, 0.5], None),
]


def rates(config, steps) -> np.ndarray:
    return np.broadcast_to(make_schedule(config, steps)(jnp.arange(steps)), steps)


def schedule_of(schedule, warmup, decay, final, peak=2e-3):
    return settings(
        **{"schedule": schedule, "warmup_steps": warmup, "learning_rate": peak},
        **{"decay_fraction": decay, "final_fraction": final},
    )


@pytest.mark.parametrize(("schedule", "warmup", "decay", "final", "expected", "start"), TABLES)
def test_every_learning_rate_of_a_short_run(schedule, warmup, decay, final, expected, start):
    config = schedule_of(schedule, warmup, decay, final)
    np.testing.assert_allclose(
        rates(config, len(expected)), 2e-3 * np.asarray(expected), rtol=1e-6, atol=1e-12
    )
    assert decay_starts(config, len(expected)) == start


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("final", [0.0, 0.02, 0.1, 1.0])
@pytest.mark.parametrize("decay", [0.001, 0.3, 1.0])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (0, 7), (1, 2), (6, 7), (20, 600)])
def test_a_run_ends_at_the_final_fraction_exactly_and_never_jumps(
    schedule, final, decay, warmup, steps
):
    """If a decay follows the warm-up, one update has the peak. After it no rate rises again."""
    config = schedule_of(schedule, warmup, decay, final)
    found, peak = rates(config, steps), np.float32(2e-3)
    assert found[-1] == np.float32(2e-3 * final)
    start = decay_starts(config, steps)
    assert warmup <= start < steps
    np.testing.assert_allclose(found[:warmup], peak * np.arange(1, warmup + 1) / warmup, rtol=1e-6)
    assert (found[max(0, warmup - 1) : start] == peak).all()
    falls = -np.diff(found[max(0, start - 1) :])
    assert (falls >= -1e-9).all()
    if final < 1:
        assert found[start] < peak
        assert (falls > 0).all()
    # No step down is larger than that of a straight line (wsd), or than the steepest of the cosine.
    steepest = np.pi / 2 if schedule == "cosine" else 1.0
    most = steepest * peak * (1 - final) / (steps - start)
    assert falls.max(initial=0) <= most * (1 + 1e-3) + 1e-9


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_a_longer_run_has_the_same_learning_rates_until_the_decay_starts(schedule, warmup):
    config = schedule_of(schedule, warmup, 0.3, 0.1)
    short, long = rates(config, 10), rates(config, 17)[:10]
    start = decay_starts(config, 10)
    np.testing.assert_array_equal(short[:start], long[:start])
    assert start is None or short[start] != long[start]


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
    """Clipping, both moments with bias correction, and decay only of matrices."""
    lr, b1, b2, eps, decay, clip = 0.01, 0.8, 0.9, 1e-3, 0.5, 2.0
    config = settings(
        **{"learning_rate": lr, "beta1": b1, "beta2": b2, "eps": eps, "weight_decay": decay},
        **{"clip_norm": clip, "schedule": "constant", "warmup_steps": 2},
    )
    optimizer = optimizer_of(config, AXES)
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
    """If all gradients are 0, an update is only the decay."""
    config = tiny.model("full*2, streams=2", qk_norm=True)
    axes, params = logical_axes(abstract_params(config)), tiny.params(config)
    optimizer = optimizer_of(
        settings(name=name, schedule="constant", warmup_steps=0, learning_rate=0.1), axes
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
    """A parameter as [count, rows, columns], written here for each kind. None: not a matrix."""
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
    optimizer = optimizer_of(settings(**fields, weight_decay=0.0, clip_norm=1e9), axes)
    rng = np.random.default_rng(5)
    # The matrices of one stack differ in size by a factor of 100. If they were orthogonalized
    # together, this would change the result.
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
        if matrices is None:  # the first step of Adam is the sign times the learning rate
            np.testing.assert_allclose(update, -0.1 * np.sign(grad), rtol=1e-3, err_msg=where)
            counts["adam"] += 1
            continue
        counts["muon"] += 1
        values = np.linalg.svd(matrices, compute_uv=False)
        # After Newton-Schulz, singular values are between about 0.6 and 1.3. Here they are scaled
        # by 0.2 sqrt(longer side), so that an entry is as large as with AdamW.
        values /= 0.1 * 0.2 * np.sqrt(max(matrices.shape[1:]))
        assert values.min() > 0.3, where
        assert values.max() < 1.5, where
        # The update reduces the loss.
        assert (np.asarray(update) * np.asarray(grad)).sum() < 0, where
    assert counts["muon"] >= 12
    assert counts["adam"] >= 8


def test_muon_refuses_a_matrix_whose_axes_it_does_not_know():
    """Otherwise AdamW would update the matrices of a new kind of layer, and nobody would see it."""
    axes = AXES | {"new": ("layers", "embed", "state")}
    optimizer_of(settings(name="adamw"), axes)
    with pytest.raises(ValueError, match=r"\('layers', 'embed', 'state'\) to _MUON_AXES or"):
        optimizer_of(settings(name="muon"), axes)


def _newton_schulz(x, eps) -> np.ndarray:
    """One matrix: five steps x <- a x + (b A + c A^2) x with A = x x^T, in float64."""
    x = x / (np.sqrt(np.sum(x**2)) + eps)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


@pytest.mark.parametrize("momentum", [0.0, 0.6, 0.95])
def test_muon_by_hand_for_three_steps(momentum):
    """Nesterov with a bias correction for each part. eps is large, so that it has an effect."""
    lr, decay, eps, b = 0.01, 0.5, 0.3, momentum
    config = settings(
        **{"name": "muon", "learning_rate": lr, "weight_decay": decay, "eps": eps, "momentum": b},
        **{"clip_norm": 1e9, "schedule": "constant", "warmup_steps": 0},
    )
    optimizer = optimizer_of(config, AXES)
    params = _random(0)
    state = optimizer.init(params)
    expected = np.asarray(params["matrix"], np.float64)
    m = np.zeros_like(expected)
    for t in (1, 2, 3):
        grads = _random(t)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        g = np.asarray(grads["matrix"], np.float64)
        m = b * m + (1 - b) * g
        ahead = b * m / (1 - b ** (t + 1)) + (1 - b) * g / (1 - b**t)
        step = 0.2 * np.sqrt(5) * _newton_schulz(ahead, eps) + decay * expected
        expected = expected - lr * step
        np.testing.assert_allclose(params["matrix"], expected, rtol=0, atol=1e-5)


# --- Updates that are not finite ------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_update_that_is_not_finite_changes_nothing_and_is_counted(bad):
    optimizer = optimizer_of(settings(), AXES)
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


def test_many_bad_updates_in_a_row_are_all_skipped():
    """The host stops the run after some of them. Until then, optax must not apply any."""
    optimizer = optimizer_of(settings(max_skipped_updates=2), AXES)
    params, broken = _random(0), _random(1)
    broken["matrix"] = broken["matrix"].at[0, 0].set(np.nan)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for _ in range(20):
        updates, state = update(broken, state, params)
        assert all((np.asarray(u) == 0).all() for u in updates.values())
    assert int(state.notfinite_count) == 20
