"""Training on several devices is training on one: the first 20 steps, also if the mesh changes."""

import functools
import math

import jax
import numpy as np
import pytest

from tests import tiny
from tests.test_sharding import config_on
from yocou_jax.checkpoint import Checkpointer
from yocou_jax.training.step import set_up

pytestmark = pytest.mark.slow

ONE = (1, 1, 1, 1, 1)


@functools.cache
def built(mesh, architecture="yoco_u", extra=()):
    """(setup, config of the model): the functions of a run, which each mesh compiles once."""
    config = config_on(mesh, architecture, **dict(extra))
    return set_up(config, jax.devices()[: math.prod(mesh)]), config.model


def train(setup, state, steps):
    """The state after the steps, and the loss of each one, with AdamW."""
    losses = []
    with jax.set_mesh(setup.mesh):
        for step in steps:
            state, out = setup.step(state, tiny.batch(seed=step % 3))
            losses.append(float(out["loss"]))
    return state, losses


def first_state(setup, model):
    with jax.set_mesh(setup.mesh):
        return tiny.fresh_state(setup, tiny.params(model))


@functools.cache
def twenty_steps(*key):
    """(parameters, losses) of a run that is not disturbed."""
    setup, model = built(*key)
    state, losses = train(setup, first_state(setup, model), range(20))
    return jax.device_get(state.params), losses


def assert_same_training(params, losses, expected):
    np.testing.assert_allclose(losses, expected[1], rtol=1e-5)
    assert losses[-1] < losses[0]
    tiny.assert_close(params, expected[0], 1e-5)


@pytest.mark.parametrize(
    ("mesh", "architecture", "extra"),
    [
        ((8, 1, 1), "yoco_u", {}),
        ((1, 8, 1), "yoco_u", {}),
        ((1, 1, 8), "yoco_u", {}),
        ((1, 4, 2), "yoco_u", {}),
        ((1, 2, 1, 4), "yoco_u", {}),
        ((2, 1, 2, 2), "transformer", {"num_loops": None}),
        ((1, 2, 1, 2, 2), "window*1@2 | cross*1", tiny.MOE),
    ],
    ids=["data", "fsdp", "tensor", "fsdp x tensor", "context", "full", "experts"],
)
def test_twenty_steps_are_those_of_one_device(mesh, architecture, extra):
    rest = architecture, tuple(extra.items())
    assert_same_training(*twenty_steps(mesh, *rest), twenty_steps(ONE, *rest))


def test_checkpoints_continue_the_run_on_4_then_2_then_8_devices(tmp_path):
    """Each of the three starts trains on from the checkpoint of the one before. Together they are
    the run that was never stopped."""
    losses, state = [], None
    for mesh, steps in (
        ((2, 2, 1), range(7)),
        ((1, 1, 2), range(7, 14)),
        ((1, 4, 2), range(14, 20)),
    ):
        setup, model = built(mesh, "yoco_u", ())
        with Checkpointer(tmp_path) as checkpointer, jax.set_mesh(setup.mesh):
            saved = jax.device_get(state)
            restored = checkpointer.restore_latest(setup.abstract_state)
            state, first = restored or (first_state(setup, model), 0)
            assert first == steps.start
            if saved is not None:  # bit for bit, and placed on the new mesh
                jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), saved)
            wanted = jax.tree.map(lambda x: x.sharding, setup.abstract_state)
            assert jax.tree.map(lambda x: x.sharding, state) == wanted
            state, found = train(setup, state, steps)
            losses += found
            checkpointer.save(steps.stop, state)
    assert_same_training(jax.device_get(state.params), losses, twenty_steps(ONE, "yoco_u", ()))
