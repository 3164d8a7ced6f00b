"""The train step and the state it moves: pure functions, their shardings, one jit each.

The host loop that calls them is in loop.py.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from yocou_jax.config import Config, ModelConfig
from yocou_jax.data.pipeline import Batch
from yocou_jax.errors import UserError
from yocou_jax.model import Compute, LanguageModel, abstract_params, head_matrix, resolve_compute
from yocou_jax.sharding import batch_sharding, batch_ways, check_split, make_mesh, tree_shardings
from yocou_jax.training import metrics
from yocou_jax.training.loss import LossSums, cross_entropy
from yocou_jax.training.optimizer import make_optimizer, make_schedule
from yocou_jax.typing import Array, PyTree

# --- The step -------------------------------------------------------------------------------------


@flax.struct.dataclass
class TrainState:
    """step: updates tried so far, which is also the number of batches consumed."""

    step: Array
    params: PyTree
    opt_state: PyTree


def loss_fn(params: PyTree, batch: Batch, config: Config, compute: Compute, num_targets: Array):
    """The objective of one microbatch, as its share of the mean over `num_targets` targets.

    Returns (objective, (LossSums, RouterStats or None)). With experts the auxiliary losses are
    means over layers and microbatches, weighted as the config says.
    """
    model = config.model
    output = LanguageModel(model, compute).apply(
        {"params": params}, batch.tokens, batch.positions, batch.segment_ids
    )
    total, sums = cross_entropy(
        output.hidden,
        head_matrix(params, model),
        batch.targets,
        batch.loss_weights,
        config.optimizer.z_loss,
        shards=batch_ways(),
    )
    objective = total / num_targets
    if output.router is not None:
        auxiliary = model.load_balance_weight * output.router.load_balance.mean()
        auxiliary += model.router_z_weight * output.router.router_z.mean()
        objective += auxiliary / config.optimizer.accumulation_steps
    return objective, (sums, output.router)


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    config: Config,
    compute: Compute,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
) -> tuple[TrainState, dict[str, Array]]:
    """One update from one global batch, in `accumulation_steps` microbatches.

    schedule: the optimiser's learning rate, which is reported.
    A non-finite gradient leaves parameters and optimiser as they were and is counted.
    """
    weights = batch.loss_weights
    num_targets = jnp.float32(batch.targets.size) if weights is None else jnp.sum(weights)
    objective = functools.partial(loss_fn, config=config, compute=compute, num_targets=num_targets)
    grad_fn = jax.grad(objective, has_aux=True)
    steps = config.optimizer.accumulation_steps
    if steps == 1:
        grads, (sums, router) = grad_fn(state.params, batch)
    else:
        micro = jax.tree.map(lambda x: x.reshape(-1, steps, *x.shape[1:]).swapaxes(0, 1), batch)

        def accumulate(total, one):
            return jax.tree.map(jnp.add, total, grad_fn(state.params, one)), ()

        one = jax.tree.map(lambda x: x[0], micro)
        shapes = jax.eval_shape(lambda: grad_fn(state.params, one))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (grads, (sums, router)), _ = jax.lax.scan(accumulate, zeros, micro)
        router = jax.tree.map(lambda x: x / steps, router)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    new = TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)
    out = {
        metrics.LOSS: sums.nll / sums.weight,
        metrics.Z_LOSS: sums.z / sums.weight,
        metrics.GRAD_NORM: optax.tree.norm(grads),
        metrics.LR: schedule(state.step - state.opt_state.total_notfinite),
        metrics.SKIPPED_UPDATES: opt_state.total_notfinite,
        metrics.SKIPPED_IN_A_ROW: opt_state.notfinite_count,
    }
    if router is not None:
        out[metrics.LOAD_BALANCE] = router.load_balance.mean()
        out[metrics.ROUTER_Z] = router.router_z.mean()
        out[metrics.EXPERT_LOAD_MAX] = router.load.max()
        out[metrics.EXPERT_LOAD_MIN] = router.load.min()
    return new, out


def eval_step(params: PyTree, batch: Batch, *, config: ModelConfig, compute: Compute) -> LossSums:
    """Sums of one validation batch, to be added up on the host."""
    output = LanguageModel(config, compute).apply(
        {"params": params}, batch.tokens, batch.positions, batch.segment_ids
    )
    head = head_matrix(params, config)
    return cross_entropy(
        output.hidden, head, batch.targets, batch.loss_weights, shards=batch_ways()
    )[1]


# --- State on a mesh ------------------------------------------------------------------------------


def logical_axes(boxed: PyTree) -> PyTree:
    """The tuple of logical axis names of each parameter."""
    return jax.tree.map(
        lambda box: box.names, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
    )


def state_shardings(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh):
    """(abstract TrainState, its NamedShardings). An array of the optimiser whose path ends in a
    parameter's path and that has its shape lies as the parameter does; all else is replicated."""
    boxed = abstract_params(config.model)
    params = nn.unbox(boxed)
    by_path = {
        path: (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params),
            jax.tree.leaves(tree_shardings(boxed, mesh)),
            strict=True,
        )
    }
    replicated = NamedSharding(mesh, PartitionSpec())

    def lies(path, leaf):
        for start in range(len(path)):
            shape, sharding = by_path.get(path[start:], (None, None))
            if shape == leaf.shape:
                return sharding
        return replicated

    step = jax.ShapeDtypeStruct((), jnp.int32)
    abstract = TrainState(step, params, jax.eval_shape(optimizer.init, params))
    return abstract, jax.tree_util.tree_map_with_path(lies, abstract)


def init_state(
    config: Config, compute: Compute, optimizer: optax.GradientTransformation
) -> TrainState:
    """A fresh state from run.seed; jit it with out_shardings so that no device holds all of it."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    model = LanguageModel(config.model, compute)
    variables = model.init(jax.random.key(config.run.seed), tokens)
    params = nn.unbox(variables)["params"]
    return TrainState(jnp.int32(0), params, optimizer.init(params))


class Setup(NamedTuple):
    """What a run is made of once its config is known: how it is computed, mesh, learning rate,
    optimiser, jitted functions."""

    compute: Compute
    mesh: Mesh
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    abstract_state: TrainState
    init: Callable
    step: Callable
    evaluate: Callable


def set_up(config: Config, devices=None) -> Setup:
    """Derives all shardings and jits init, step and evaluation once. Compiles nothing yet."""
    mesh = make_mesh(config.mesh, devices)
    ways = batch_ways(mesh) * config.optimizer.accumulation_steps
    if config.data.batch_size % ways:
        raise UserError(
            f"data.batch_size={config.data.batch_size} does not divide by {ways}, which is "
            f"mesh data*fsdp={batch_ways(mesh)} times "
            f"optimizer.accumulation_steps={config.optimizer.accumulation_steps}."
        )
    boxed = abstract_params(config.model)
    check_split(boxed, mesh)
    schedule = make_schedule(config.optimizer, config.run.steps)
    optimizer = make_optimizer(config.optimizer, schedule, logical_axes(boxed))
    abstract, shardings = state_shardings(config, optimizer, mesh)
    replicated = NamedSharding(mesh, PartitionSpec())
    batch = batch_sharding(mesh)
    with jax.set_mesh(mesh):  # whose devices answer "auto"
        compute = resolve_compute(config.compute)
    step = functools.partial(
        train_step, config=config, compute=compute, optimizer=optimizer, schedule=schedule
    )
    return Setup(
        compute=compute,
        mesh=mesh,
        schedule=schedule,
        optimizer=optimizer,
        abstract_state=jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
        ),
        init=jax.jit(lambda: init_state(config, compute, optimizer), out_shardings=shardings),
        step=jax.jit(
            step,
            in_shardings=(shardings, batch),
            out_shardings=(shardings, replicated),
            donate_argnums=0,
        ),
        evaluate=jax.jit(
            functools.partial(eval_step, config=config.model, compute=compute),
            in_shardings=(shardings.params, batch),
            out_shardings=replicated,
        ),
    )
