"""Compares the library with the oracle (oracle.py), for every pair of its options."""

import dataclasses
import functools
import itertools
import random
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import oracle, tiny
from yocou_jax import inference
from yocou_jax.model import resolve_compute
from yocou_jax.training import metrics
from yocou_jax.training.optimizer import make_schedule
from yocou_jax.training.step import TrainState, set_up, train_step

LENGTH = 9

# --- Options in pairs -----------------------------------------------------------------------------

OPTIONS = {
    "architecture": (
        "window*1@2 | cross*1 | cross*1@2",
        "window*1 | full*1@2",
        "full*1@2, streams=2",
    ),
    "num_experts": (0, 4),
    "window": (3, LENGTH - 1),
    "remat": ("none", "full"),
    "num_kv_heads": (1, 2),
    "cross_rope": (False, True),
    "qk_norm": (False, True),
    "tie_embeddings": (False, True),
    "packed": (False, True),
    "scan": (True, False),
    "z_loss": (0.0, 0.05),
    "accumulation_steps": (1, 2),
}


def possible(row: dict) -> bool:
    """A learned prefix has no segment, so parallel streams cannot have packed documents."""
    return not (row.get("packed") and "streams" in row.get("architecture", ""))


def pairs(row: dict) -> set:
    return set(itertools.combinations(sorted(row.items()), 2))


def every_pair(options: dict[str, tuple], tries: int = 200) -> list[dict]:
    """Rows of one value per option. Each two values of two options are together in at least one
    row. Each new row is the best of some random ones that have a pair which is still missing."""
    rng = random.Random(2)  # of 60 seeds, it gives the fewest rows
    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(sorted(options), 2)
        for x, y in itertools.product(options[a], options[b])
        if possible({a: x, b: y})
    }
    rows = []
    while missing:
        start = dict(min(missing, key=repr))
        drawn = (
            {name: rng.choice(values) for name, values in options.items()} | start
            for _ in range(tries)
        )
        rows.append(max(filter(possible, drawn), key=lambda row: len(pairs(row) & missing)))
        missing -= pairs(rows[-1])
    return rows


ROWS = every_pair(OPTIONS)


def config_of(row: dict):
    fields = dict(row)
    optimizer = {name: fields.pop(name) for name in ("z_loss", "accumulation_steps")}
    data = {"batch_size": 4, "sequence_length": LENGTH, "packing": fields.pop("packed")}
    # So large that each of them changes the loss visibly.
    large = {"load_balance_weight": 0.3, "router_z_weight": 0.2, "norm_eps": 0.05}
    return tiny.config(optimizer=optimizer, data=data, **(tiny.MOE | large | {"d_ff": 12} | fields))


# --- A training step ------------------------------------------------------------------------------


class Recorded(NamedTuple):
    """The state of an optimizer that stores the gradient it gets."""

    grads: dict
    total_notfinite: int
    notfinite_count: int


def _record(grads, state, params):
    del state
    return jax.tree.map(jnp.zeros_like, params), Recorded(grads, 0, 0)


RECORDER = optax.GradientTransformation(lambda params: Recorded(params, 0, 0), _record)


@functools.partial(jax.jit, static_argnames="config")
def recorded_step(params, batch, config):
    """The gradients that the train step gives to its optimizer, and its metrics."""
    state = TrainState(jnp.int32(0), params, RECORDER.init(params))
    state, out = train_step(
        state,
        batch,
        config=config,
        compute=resolve_compute(config.compute),
        optimizer=RECORDER,
        schedule=make_schedule(config.optimizer, config.run.steps),
    )
    return state.opt_state.grads, out


def assert_slopes(grads, params, objective, tolerance=2e-4):
    """Compares the gradient of each parameter in a random direction with a central difference."""
    rng, leaves = np.random.default_rng(5), jax.tree_util.tree_leaves_with_path(grads)
    flat, tree = jax.tree.flatten(params)
    for i, (path, grad) in enumerate(leaves):
        grad = np.asarray(grad, np.float64)
        step = 1e-5 * rng.normal(size=grad.shape)
        ends = (
            objective(tree.unflatten([*flat[:i], flat[i] + sign * step, *flat[i + 1 :]]))
            for sign in (1, -1)
        )
        up, down = ends
        error = abs((up - down) / 2 - (grad * step).sum())
        size = 1e-5 * np.linalg.norm(grad)
        assert size > 0, jax.tree_util.keystr(path)
        assert error < tolerance * size, (jax.tree_util.keystr(path), error / size)


def assert_a_step_is_the_oracles(config, batch, seed=0):
    params = tiny.params(config.model, seed)
    grads, out = recorded_step(params, batch, config)
    exact = oracle.to_float64(params)
    expected = oracle.training_step(exact, config, batch)
    objective = expected.pop("objective")
    assert np.isfinite(objective)
    for name, value in expected.items():
        np.testing.assert_allclose(out[name], value, rtol=2e-5, err_msg=name)
    assert_slopes(grads, exact, lambda p: oracle.training_step(p, config, batch)["objective"])
    norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(out[metrics.GRAD_NORM], norm, rtol=1e-5)


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=pytest.mark.slow if i else ()) for i, row in enumerate(ROWS)],
    ids=[" ".join(map(str, row.values())) for row in ROWS],
)
def test_a_step_with_options_in_pairs(row):
    make = tiny.packed_batch if row["packed"] else tiny.batch
    assert_a_step_is_the_oracles(config_of(row), make(4, LENGTH))


# --- Windows about as long as the text ------------------------------------------------------------


@pytest.mark.parametrize(
    "window",
    [LENGTH, *(pytest.param(w, marks=pytest.mark.slow) for w in (LENGTH - 1, LENGTH + 1))],
)
def test_a_window_about_as_long_as_the_text(window):
    """In training, in prefill and in decode."""
    config = tiny.model("window*1@2 | cross*1 | cross*1@2", window=window, cross_rope=True)
    params = tiny.params(config)
    tokens = np.asarray(tiny.tokens(2, LENGTH + 3))
    expected = oracle.logits(oracle.to_float64(params), config, tokens)[0]
    hidden = tiny.hidden(params, config, tokens[:, :LENGTH])
    trained = np.asarray(hidden) @ np.asarray(params["head"])
    tiny.assert_close(trained, expected[:, :LENGTH])
    model = inference.prepare(params, config, tiny.compute())
    cache, after, found, _ = inference.score(
        model, tokens[:, :LENGTH], capacity=LENGTH + 3, chunk=LENGTH
    )
    tiny.assert_close(found[:, 1:], tiny.logprobs(expected, tokens[:, :LENGTH]))
    tiny.assert_close(after, expected[:, LENGTH - 1])
    for at in range(LENGTH, LENGTH + 3):
        cache, after = inference.decode_step(model, cache, tokens[:, at])
        tiny.assert_close(after, expected[:, at])


# --- Three updates --------------------------------------------------------------------------------


def adamw(g, slots, t, o):
    """The update without learning rate and sign: algorithm 2 of Loshchilov and Hutter."""
    m, v = slots.setdefault("m", np.zeros_like(g)), slots.setdefault("v", np.zeros_like(g))
    m += (1 - o.beta1) * (g - m)
    v += (1 - o.beta2) * (g**2 - v)
    return m / (1 - o.beta1**t) / (np.sqrt(v / (1 - o.beta2**t)) + o.eps)


def muon(g, slots, t, o):
    """One matrix: Newton-Schulz of Jordan, and the scale of Moonlight (arXiv 2502.16982, eq. 4).

    Nesterov's look-ahead has a bias correction for each of its two terms, as in optax.
    """
    m = slots.setdefault("m", np.zeros_like(g))
    m += (1 - o.momentum) * (g - m)
    x = o.momentum * m / (1 - o.momentum ** (t + 1)) + (1 - o.momentum) * g / (1 - o.momentum**t)
    x = x / (np.linalg.norm(x) + o.eps)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return 0.2 * np.sqrt(max(x.shape)) * x


def role(path: str) -> tuple[int, int] | None:
    """(rows, columns): the axes of the matrices of a parameter. None: it is not a matrix of a
    hidden layer, so AdamW updates it."""
    if path.startswith("['stage_") or path.startswith("['global_kv']"):
        if any(f"['{name}']" in path for name in ("query", "key_value")) and "scale" not in path:
            return 1, 2
        if "['output']" in path:
            return 2, 1
        if any(f"['{name}']" in path for name in ("gate", "up", "down")):
            return 1, 1
    return None


def by_matrix(g, slots, t, o, axes):
    """Muon of each matrix of a stack."""
    rows, columns = axes
    lead = g.ndim - rows - columns
    shape = (-1, int(np.prod(g.shape[lead : lead + rows])), int(np.prod(g.shape[lead + rows :])))
    out = [muon(one, slots.setdefault(i, {}), t, o) for i, one in enumerate(g.reshape(shape))]
    return np.stack(out).reshape(g.shape)


def update(params, grads, slots, t, rate, o):
    """Parameters after update t = 1, 2, ...: clipping, the optimizer, and decoupled decay of all
    parameters except norm scales and prefixes."""
    paths, tree = jax.tree_util.tree_flatten_with_path(grads)
    grads = [np.asarray(g, np.float64) for _, g in paths]
    clip = min(1.0, o.clip_norm / np.sqrt(sum((g**2).sum() for g in grads)))
    new = []
    for (path, _), g, p in zip(paths, grads, jax.tree.leaves(params), strict=True):
        name = jax.tree_util.keystr(path)
        mine = slots.setdefault(name, {})
        if o.name == "muon" and (axes := role(name)):
            step = by_matrix(clip * g, mine, t, o, axes)
        else:
            step = adamw(clip * g, mine, t, o)
        if not name.endswith(("['scale']", "['prefix']")):
            step = step + o.weight_decay * p
        new.append(p - rate * step)
    return tree.unflatten(new)


# One row for each optimizer, from the rows above, because their gradients are compiled already.
GOLDEN = [
    ("adamw", lambda row: "streams" in row["architecture"] and not row["num_experts"]),
    ("muon", lambda row: "streams" in row["architecture"] and row["num_experts"]),
]


@pytest.mark.parametrize(
    ("name", "fits"),
    [GOLDEN[0], pytest.param(*GOLDEN[1], marks=pytest.mark.slow)],
    ids=["adamw", "muon"],
)
def test_three_updates(name, fits):
    """Compares the parameters after three train steps with those of optimizers in numpy."""
    row = next(filter(fits, ROWS))
    gradients = config_of(row)
    optimizer = dataclasses.replace(
        gradients.optimizer,
        **{"name": name, "schedule": "wsd", "warmup_steps": 2, "learning_rate": 0.02},
        **{"weight_decay": 0.3, "clip_norm": 0.7, "eps": 1e-4},
    )
    config = dataclasses.replace(gradients, optimizer=optimizer)
    setup = set_up(config, jax.devices()[:1])
    start = tiny.params(config.model)
    state = tiny.fresh_state(setup, start)
    expected, slots = oracle.to_float64(start), {}
    for t, rate in ((1, 0.01), (2, 0.02), (3, 0.02)):
        batch = (tiny.packed_batch if row["packed"] else tiny.batch)(4, LENGTH, seed=t)
        single = jax.tree.map(np.float32, expected)
        grads, wanted = recorded_step(single, batch, gradients)
        state, out = setup.step(state, batch)
        np.testing.assert_allclose(out[metrics.LR], rate, rtol=1e-6)
        for metric in set(wanted) - {metrics.LR}:
            np.testing.assert_allclose(out[metric], wanted[metric], rtol=1e-3, err_msg=metric)
        assert float(out[metrics.GRAD_NORM]) > optimizer.clip_norm
        expected = update(expected, grads, slots, t, rate, optimizer)
    moved = jax.tree.map(lambda new, old: np.asarray(new, np.float64) - old, state.params, start)
    tiny.assert_close(moved, jax.tree.map(np.subtract, expected, start), 2e-3)
