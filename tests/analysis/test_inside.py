"""Inside a model: hand-made parameters with known values, the numpy oracle, explicit matrices."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracle, tiny
from yocou_jax import analysis
from yocou_jax.analysis.jacobian import _eigenvalues
from yocou_jax.model import head_matrix, to_logits
from yocou_jax.model.language_model import StageStack

# In the package, the name is that of the function.
inside = importlib.import_module("yocou_jax.analysis.inside")

CONFIG = tiny.model("window*2@3 | cross*1", window=2, **tiny.MOE)
COMPUTE = tiny.compute()
BATCH = tiny.packed_batch(8, 8)  # it has weights
MODEL = tiny.params(CONFIG), CONFIG, COMPUTE


@pytest.fixture(scope="module")
def found():
    return analysis.inside(*MODEL, BATCH)


@pytest.fixture(scope="module")
def steps():
    return list(analysis.walk(*MODEL, BATCH.tokens, BATCH.positions, BATCH.segment_ids))


def mean(values):
    return np.average(np.asarray(values, np.float64), weights=BATCH.loss_weights)


# --- The walk -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program",
    ["window*1@2 | full*1 | cross*1@2", "window*1@2 | cross*1 | cross*1@2", "full*1@2, streams=2"],
)
def test_a_walk_is_the_forward_pass(program):
    config, tokens = tiny.model(program), tiny.tokens(2, 6)
    params = tiny.params(config)
    steps = list(analysis.walk(params, config, COMPUTE, tokens))
    hidden = analysis.hidden_after(params, config, COMPUTE, steps[-1])
    assert [step.visit for step in steps] == list(config.program.visits())
    expected, _ = oracle.logits(oracle.to_float64(params), config, np.asarray(tokens))
    tiny.assert_close(to_logits(hidden, head_matrix(params, config)), expected)


# --- Hand-made parameters -------------------------------------------------------------------------


@pytest.mark.slow
def test_layers_that_add_nothing():
    """Then no loop changes anything, and the derivative of a loop is the identity."""

    def silent(path, leaf):
        last = {"output", "down"} & {key.key for key in path}
        return np.zeros_like(leaf) if last else leaf

    params = jax.tree_util.tree_map_with_path(silent, MODEL[0])
    found = analysis.inside(params, *MODEL[1:], BATCH)
    assert [a.distance for a in found.applications] == [0] * 7
    assert found.receptive_field == 1
    for loop in found.loops:
        assert (loop.distance, loop.step, loop.kl, loop.residual) == (0, 0, 0, 0)
        assert loop.overlap in (None, (1, 1))
        assert loop.loss == found.loops[0].loss
        np.testing.assert_allclose([loop.radius, loop.radius_max], 1, rtol=1e-6)


def test_the_weight_of_a_token_is_that_of_all_its_streams():
    """The rows of two streams are stream-major."""
    x, weights = np.zeros((4, 3, 2)), np.array([[1.0, 0, 0], [0, 1, 0]])
    y = np.arange(12.0).reshape(4, 3)
    found = inside._mean(lambda a, b: y, x, x, weights)
    assert found == np.mean([y[0, 0], y[1, 1], y[2, 0], y[3, 1]])


def test_jacobians_are_taken_at_the_last_position_of_each_share(monkeypatch):
    asked = []
    real = inside.loop_radius
    monkeypatch.setattr(
        inside, "loop_radius", lambda *args: (asked.append(args[-1]), real(*args))[1]
    )
    analysis.inside(*MODEL, BATCH)
    B, N = BATCH.tokens.shape
    assert all(list(at) == [(row + 1) * N // B - 1 for row in range(B)] for at in asked)
    assert asked


def test_angles_that_are_small_or_large():
    x = np.array([[1, 0], [1, 0], [1, 0], [1, 1e-5]], np.float32)
    y = np.array([[0, 2], [-3, 0], [1, 0], [1, 0]], np.float32)
    distance = analysis.angular_distance(x, y)
    np.testing.assert_allclose(distance, [0.5, 1, 0, 1e-5 / np.pi], rtol=1e-5)


def test_eigenvalues_with_a_complex_pair():
    """[[0, -2], [2, 0]] has +-2i, with the vectors (1, -+i) / sqrt(2); 0.3 leaves the basis."""
    whole = np.array([[[0, -2], [2, 0], [0, 0.3]]])
    np.testing.assert_allclose(_eigenvalues(whole), [[2], [0.3 / np.sqrt(2) / 2]])
    assert np.isnan(_eigenvalues(whole * np.nan)).all()


# --- Random parameters ----------------------------------------------------------------------------


def test_each_run_of_a_layer_has_its_distance(found, steps):
    visits = list(CONFIG.program.visits())
    assert [(a.stage, a.loop, a.layer) for a in found.applications] == [
        (visit.name, visit.loop, visit.layer) for visit in visits
    ]
    for application, step in zip(found.applications, steps, strict=True):
        x, y = np.asarray(step.x, np.float64), np.asarray(step.y, np.float64)
        cos = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
        np.testing.assert_allclose(application.distance, mean(np.arccos(cos)) / np.pi, rtol=1e-5)
    assert found.hand_over == 6
    assert found.receptive_field == 2 * 3 * (2 - 1) + 1


def test_steps_and_experts_of_each_loop(found, steps):
    for k, loop in enumerate(found.loops):
        first, last = steps[2 * k], steps[2 * k + 1]
        x, y = np.asarray(first.x, np.float64), np.asarray(last.y, np.float64)
        change = np.linalg.norm(y - x, axis=-1) / np.linalg.norm(x, axis=-1)
        np.testing.assert_allclose(loop.step, mean(change), rtol=1e-5)
        assert (loop.number, loop.loop) == (k + 1, k)
        for layer in range(2) if k else ():
            a, b = (np.asarray(steps[2 * i + layer].experts) for i in (k - 1, k))
            pairs = [(set(a[i]), set(b[i])) for i in np.ndindex(a.shape[:2])]
            jaccard = [len(p & q) / len(p | q) for p, q in pairs]
            expected = mean(np.reshape(jaccard, a.shape[:2]))
            np.testing.assert_allclose(loop.overlap[layer], expected, rtol=1e-6)
    assert found.loops[0].overlap is None


def test_the_lens_after_a_loop_is_the_model_with_so_many_loops(found):
    def predictions(loops):
        config = dataclasses.replace(CONFIG, num_loops=loops)
        texts = BATCH.tokens, BATCH.positions, BATCH.segment_ids
        logits, _ = oracle.logits(oracle.to_float64(MODEL[0]), config, *texts)
        return logits - oracle.logsumexp(logits)[..., None]

    last = predictions(3)
    for loop in found.loops:
        logp = predictions(loop.number)
        picked = np.take_along_axis(logp, BATCH.targets[..., None], -1)[..., 0]
        np.testing.assert_allclose(loop.loss, -mean(picked), rtol=1e-5)
        kl = mean((np.exp(last) * (last - logp)).sum(-1))
        np.testing.assert_allclose(loop.kl, kl, rtol=1e-4, atol=1e-6)


def test_the_radius_is_that_of_the_whole_jacobian():
    """Of all positions of a row: the largest radius of the blocks."""
    rows = jax.tree.map(lambda x: np.repeat(x[:1], 8, axis=0), BATCH)  # the same text 8 times
    step = next(analysis.walk(*MODEL, rows.tokens, rows.positions, rows.segment_ids))
    radius, residual = analysis.loop_radius(*MODEL, step, np.arange(8))

    stage = dataclasses.replace(step.visit.stage, loops=None)
    stack = StageStack(CONFIG, COMPUTE, stage, name=step.visit.name)
    params = MODEL[0][step.visit.name]
    context = jax.tree.map(lambda x: jnp.asarray(x[:1]), step.context)

    def loop(x):
        return stack.apply({"params": params}, x.reshape(1, 8, -1), context, 1)[0].reshape(-1)

    @jax.jit
    def jacobian_of(x):
        _, pull = jax.vjp(loop, x)
        return jax.lax.map(lambda row: pull(row)[0], jnp.eye(len(x)))

    jacobian = np.asarray(jacobian_of(step.x[0].reshape(-1)), np.float64)
    expected = np.abs(np.linalg.eigvals(jacobian)).max()
    np.testing.assert_allclose(radius.max(), expected, rtol=1e-3)
    assert residual.max() < 1e-3  # there are as many vectors as a block has


def test_scalars_have_the_names_of_curves(found):
    scalars = found.scalars()
    assert scalars["distance_hand_over"] == found.applications[6].distance
    assert scalars["kl_loop_3"] == found.loops[2].kl
    assert scalars["overlap_loop_2"] == pytest.approx(np.mean(found.loops[1].overlap))
    assert "overlap_loop_1" not in scalars
