"""The train step: golden figures, microbatches, donation, learning of every architecture."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from yocou_jax.data.pipeline import Batch
from yocou_jax.model import LanguageModel, head_matrix, resolve_compute
from yocou_jax.model.attention import Context
from yocou_jax.training import metrics
from yocou_jax.training.loss import cross_entropy
from yocou_jax.training.optimizer import make_schedule
from yocou_jax.training.step import eval_step, loss_fn, set_up, train_step


def one_device(config):
    return set_up(config, jax.devices()[:1])


def step_from(config, params, batch):
    setup = one_device(config)
    return setup.step(tiny.fresh_state(setup, params), batch)


# --- Golden figures -------------------------------------------------------------------------------

# Loss and gradient norm of steps 1 and 2 on tiny.batch(), from run.seed 0, or with experts from
# tiny.params. The numbers come from this code: the test only shows that they have not moved. If
# they move, the results of all earlier runs change: say so in CHANGELOG.md. The stages of the first
# are unrolled, as in real runs on a CPU; those of the second are loops.
GOLDEN = {
    "yoco_u": [(4.065546, 1.985903), (4.009507, 1.979549)],
    "experts": [(4.077636, 1.753606), (4.032959, 1.604970)],
}


@pytest.mark.parametrize("name", tiny.quick(GOLDEN, "yoco_u"))
def test_golden_metrics_of_the_first_steps(name):
    unrolled = tiny.config("yoco_u", unroll=tiny.UNROLL)
    config = unrolled if name == "yoco_u" else tiny.config("full*2@2", **tiny.MOE)
    setup = one_device(config)
    state = setup.init() if name == "yoco_u" else tiny.fresh_state(setup, tiny.params(config.model))
    found = []
    for _ in GOLDEN[name]:
        state, out = setup.step(state, tiny.batch())
        found.append((float(out[metrics.LOSS]), float(out[metrics.GRAD_NORM])))
    np.testing.assert_allclose(found, GOLDEN[name], rtol=1e-4)
    assert int(state.step) == 2


# --- One step -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_microbatches_add_up_to_the_batch():
    """The microbatches have different sums of weights, so that a mean of means would differ."""
    batch = tiny.packed_batch()
    fewer = (np.arange(8) % 4 < 2)[:, None].astype(np.float32)
    batch = dataclasses.replace(batch, loss_weights=batch.loss_weights * fewer)
    results = []
    for steps in (1, 4):
        config = tiny.config(
            "yoco_u",
            num_layers=2,
            num_loops=2,
            optimizer={"accumulation_steps": steps, "eps": 1e-3},
        )
        results.append(step_from(config, tiny.params(config.model), batch))
    (whole, out), (parts, parts_out) = results
    tiny.assert_close(parts_out, out, 1e-5)
    tiny.assert_close(parts.params, whole.params, 1e-5)


def test_the_step_donates_its_state():
    config = tiny.config("window*1 | cross*1")
    setup = one_device(config)
    state = tiny.fresh_state(setup, tiny.params(config.model))
    new, _ = setup.step(state, tiny.batch())
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))
    assert not any(x.is_deleted() for x in jax.tree.leaves(new))


def test_profiles_show_the_names_of_the_jitted_functions():
    """Also compile logs and errors: jax takes the name of the function."""
    setup = one_device(tiny.config("window*1"))
    names = setup.init.__name__, setup.step.__name__, setup.evaluate.__name__
    assert names == ("init_state", "train_step", "eval_step")
    assert setup.init.lower().as_text().startswith("module @jit_init_state")


def test_the_loss_is_that_of_the_evaluation():
    """For the same batch, training has means over the targets, and the evaluation has sums."""
    config = tiny.config("window*1 | cross*1")
    params, batch = tiny.params(config.model), tiny.packed_batch()
    sums = jax.jit(functools.partial(eval_step, config=config.model, compute=tiny.compute()))(
        params, batch
    )
    _, out = step_from(config, params, batch)
    assert float(sums.weight) == batch.loss_weights.sum()
    np.testing.assert_allclose(sums.nll / sums.weight, out[metrics.LOSS], rtol=1e-5)


def test_a_step_that_is_not_finite_is_skipped_and_the_next_one_counts():
    config = tiny.config("window*1 | cross*1")
    setup, params = one_device(config), tiny.params(config.model)
    schedule = make_schedule(config.optimizer, config.run.steps)
    given = {"compute": setup.compute, "optimizer": setup.optimizer, "schedule": schedule}
    step = jax.jit(functools.partial(train_step, config=config, **given))
    state = tiny.fresh_state(setup, params)
    batch = tiny.packed_batch()
    bad = dataclasses.replace(batch, loss_weights=np.full_like(batch.loss_weights, np.inf))
    skipped, out = step(state, bad)
    tiny.assert_close(skipped.params, params, 0)
    assert int(skipped.step) == 1  # the batch is used up
    assert int(out[metrics.SKIPPED_UPDATES]) == int(out[metrics.SKIPPED_IN_A_ROW]) == 1
    good, out = step(skipped, batch)
    assert int(out[metrics.SKIPPED_UPDATES]) == 1
    assert int(out[metrics.SKIPPED_IN_A_ROW]) == 0
    first, first_out = step(state, batch)
    # The schedule counts updates, not batches, so a skipped one leaves no gap.
    np.testing.assert_array_equal(out[metrics.LR], first_out[metrics.LR])
    tiny.assert_close(good.params, first.params, 1e-6)


# --- Loops ----------------------------------------------------------------------------------------


def test_a_step_with_a_loop_count_equals_that_of_a_model_with_this_count():
    program, batch = "full*1@2", tiny.batch()
    drawn = tiny.config(program, num_loops="1,3")
    params = tiny.params(drawn.model)
    setup = one_device(drawn)
    found, out = setup.step(tiny.fresh_state(setup, params), batch, 1)
    wanted, wanted_out = step_from(tiny.config(program, num_loops=1), params, batch)
    tiny.assert_close((found, out), (wanted, wanted_out), 0)


def gradient(config):
    """Jitted: (params, batch) -> gradient of the objective."""

    def objective(params, batch):
        targets = jnp.float32(batch.targets.size)
        return loss_fn(params, batch, config, resolve_compute(config.compute), targets)[0]

    return jax.jit(jax.grad(objective))


@pytest.mark.parametrize(
    ("program", "fields"),
    [
        ("window*1@3 | cross*1", {}),
        pytest.param("window*1 | cross*1@3", tiny.MOE | {"scan": False}, marks=pytest.mark.slow),
    ],
    ids=["lower", "upper with experts"],
)
def test_losses_after_loops_are_those_of_models_with_fewer_loops(program, fields):
    z_loss, batch = {"z_loss": 0.1}, tiny.batch(4, 9)

    def gradients(num_loops, **optimizer):
        config = tiny.config(program, num_loops=num_loops, optimizer=z_loss | optimizer, **fields)
        return gradient(config)(tiny.params(config.model), batch)

    found = gradients(3, loop_loss="0.5,0,2")
    one, three = gradients(1), gradients(3)
    tiny.assert_close(found, jax.tree.map(lambda a, b: (0.5 * a + 2 * b) / 2.5, one, three), 1e-5)


def test_backpropagation_through_all_loops_is_the_exact_gradient():
    def lowered(**optimizer):
        config = tiny.config("full*1@2", optimizer=optimizer)
        return gradient(config).lower(tiny.params(config.model), tiny.batch()).as_text()

    assert lowered(backprop_loops=2) == lowered()


@pytest.mark.parametrize("scan", tiny.quick([True, False], True))
def test_truncated_backpropagation_sees_only_the_last_loop(scan):
    """By hand: what the first two of three loops add is computed with other parameters, which have
    the same values."""
    config = tiny.config(
        "full*1 | window*1@3 | cross*1", optimizer={"backprop_loops": 1}, scan=scan
    )
    model, batch, params = config.model, tiny.batch(4, 9), tiny.params(config.model)
    tokens, context = jnp.array(batch.tokens), Context.of(model, jnp.arange(9)[None])

    def by_hand(params, frozen):
        live, still = (
            LanguageModel(model, tiny.compute()).bind({"params": p}) for p in (params, frozen)
        )
        x, y = (m.stages["stage_0_full"](m.embed(tokens), context, 1)[0] for m in (live, still))
        x += still.stages["stage_1_window"](y, context, 2)[0] - y
        x, _ = live.stages["stage_1_window"](x, context, 1)
        after = context.replace(global_kv=live.project_global_kv(x, context))
        x, _ = live.stages["stage_2_cross"](x, after, 1)
        hidden = live.read_out(x)
        total, _ = cross_entropy(hidden, head_matrix(params, model), jnp.array(batch.targets))
        return total / batch.targets.size

    found = gradient(config)(params, batch)
    tiny.assert_close(found, jax.jit(jax.grad(by_hand))(params, params), 1e-5)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found))


# --- Learning -------------------------------------------------------------------------------------

LEARN_STEPS = 120
LENGTH, OFFSET = 16, 3


def repeat_with_offset(seed: int) -> Batch:
    """token[i] = token[i - 3] + 1 (mod V), after three random tokens. A prediction needs the token
    three places back, and only attention reaches it."""
    rng = np.random.default_rng(seed)
    text = np.zeros((32, LENGTH + 1), np.int32)
    text[:, :OFFSET] = rng.integers(0, 16, (32, OFFSET))
    for i in range(OFFSET, LENGTH + 1):
        text[:, i] = (text[:, i - OFFSET] + 1) % 16
    weights = np.broadcast_to(np.arange(LENGTH) >= OFFSET - 1, (32, LENGTH)).astype(np.float32)
    return Batch(text[:, :-1], text[:, 1:], weights, None, None)


@pytest.mark.parametrize("name", tiny.quick(["yoco_u", "parscale", "experts"], "yoco_u"))
def test_an_architecture_learns_a_task_that_needs_attention(name):
    config = tiny.config(
        "full*2" if name == "experts" else name,
        **(tiny.MOE if name == "experts" else {}),
        **{"num_layers": 2, "vocab_size": 16, "d_model": 32, "d_ff": 64},
        optimizer={"learning_rate": 1e-2, "warmup_steps": 10, "weight_decay": 0.0},
        data={"batch_size": 32, "sequence_length": LENGTH},
        run={"steps": LEARN_STEPS},
    )
    setup = one_device(config)
    state = tiny.fresh_state(setup, tiny.params(config.model))
    losses = []
    for seed in range(LEARN_STEPS):
        state, out = setup.step(state, repeat_with_offset(seed))
        losses.append(out[metrics.LOSS])
    # Each batch is new. Without the token three places back, no loss is below log 16.
    assert float(losses[0]) > 2.5
    assert np.mean(losses[-5:]) < 0.3, [round(float(x), 2) for x in losses[::10]]
