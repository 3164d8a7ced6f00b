"""The train step, the evaluation step and the state: pure functions, their shardings and jits.

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

from pallas_kernels import api
from yocou_jax.config import Config, ModelConfig
from yocou_jax.data.pipeline import Batch
from yocou_jax.errors import UserError
from yocou_jax.model import (
    Compute,
    LanguageModel,
    ModelOutput,
    abstract_params,
    head_matrix,
    resolve_compute,
)
from yocou_jax.sharding import (
    batch_sharding,
    batch_ways,
    check_length,
    check_split,
    make_mesh,
    tree_shardings,
)
from yocou_jax.training import metrics
from yocou_jax.training.loss import LossSums, cross_entropy
from yocou_jax.training.optimizer import make_optimizer, make_schedule
from yocou_jax.typing import Array, PyTree

# --- The step -------------------------------------------------------------------------------------


@flax.struct.dataclass
class TrainState:
    """step, int32 scalar: number of batches consumed so far. A batch with a skipped update counts
    too. params: the tree of `LanguageModel`, float32. opt_state: that of `make_optimizer`."""

    step: Array
    params: PyTree
    opt_state: PyTree


def loss_fn(
    params: PyTree,
    batch: Batch,
    config: Config,
    compute: Compute,
    num_targets: Array,
    num_loops: int | None = None,
):
    """The part of the objective that one microbatch contributes. The parts of all microbatches sum
    to the objective of the batch, which is a mean over its `num_targets` targets, a scalar (targets
    of weight 0 do not count).

    Returns (objective, (LossSums, RouterStats or None)), the objective a scalar in nats. With
    experts, the auxiliary losses are means over layers and microbatches. The config has their
    weights. With optimizer.loop_loss, the objective is the weighted mean of those of the model
    with 1, 2, ... loops. The sums and the statistics are those of the last one.
    """
    apply = functools.partial(LanguageModel(config.model, compute).apply, {"params": params})
    inputs, optimizer = (batch.tokens, batch.positions, batch.segment_ids), config.optimizer
    if not optimizer.loop_weights:
        output = apply(*inputs, num_loops=num_loops, backprop_loops=optimizer.backprop_loops)
        objective, sums = _objective(output, params, batch, config, num_targets)
        return objective, (sums, output.router)
    weights = {count: w for count, w in enumerate(optimizer.loop_weights, start=1) if w}
    outputs = apply(*inputs, counts=tuple(weights), method="after_loops")
    parts = [_objective(output, params, batch, config, num_targets) for output in outputs]
    weighted = sum(w * part for w, (part, _) in zip(weights.values(), parts, strict=True))
    return weighted / sum(weights.values()), (parts[-1][1], outputs[-1].router)


def _objective(output: ModelOutput, params, batch: Batch, config: Config, num_targets):
    """The objective (see `loss_fn`) and the LossSums of one output of the model."""
    model = config.model
    total, sums = cross_entropy(
        output.hidden,
        head_matrix(params, model),
        batch.targets,
        batch.loss_weights,
        config.optimizer.z_loss,
    )
    objective = total / num_targets
    if output.router is not None:
        auxiliary = model.load_balance_weight * output.router.load_balance.mean()
        auxiliary += model.router_z_weight * output.router.router_z.mean()
        objective += auxiliary / config.optimizer.accumulation_steps
    return objective, sums


def train_step(
    state: TrainState,
    batch: Batch,
    num_loops: int | None = None,
    *,
    config: Config,
    compute: Compute,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
) -> tuple[TrainState, dict[str, Array]]:
    """One update from one global batch [B, N], in `accumulation_steps` microbatches.

    Returns the next state, and a scalar for each metric, by the names in metrics.py.
    num_loops: how often every looped stage runs; None: as the config says.
    schedule: the learning rate of `optimizer`, only for the metrics. If the gradient is not finite,
    parameters and optimizer do not change, and the metrics count a skipped update.
    """
    weights = batch.loss_weights
    num_targets = jnp.float32(batch.targets.size) if weights is None else jnp.sum(weights)
    given = {"config": config, "compute": compute, "num_targets": num_targets}
    objective = functools.partial(loss_fn, **given, num_loops=num_loops)
    grad_fn = jax.grad(objective, has_aux=True)
    steps = config.optimizer.accumulation_steps
    if steps == 1:
        grads, (sums, router) = grad_fn(state.params, batch)
    else:
        # Microbatch m has the rows m, m + steps, ... A device has consecutive rows of the batch. So
        # each microbatch takes as many rows from every device, and no row moves to another device.
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


def eval_step(
    params: PyTree,
    batch: Batch,
    num_loops: int | None = None,
    *,
    config: ModelConfig,
    compute: Compute,
) -> LossSums:
    """The sums of one validation batch [B, N], in nats. The host adds those of all batches.

    num_loops: how often every looped stage runs; None: as the config says.
    """
    inputs = batch.tokens, batch.positions, batch.segment_ids
    output = LanguageModel(config, compute).apply({"params": params}, *inputs, num_loops=num_loops)
    head = head_matrix(params, config)
    return cross_entropy(output.hidden, head, batch.targets, batch.loss_weights)[1]


# --- State on a mesh ------------------------------------------------------------------------------


def logical_axes(boxed: PyTree) -> PyTree:
    """The tuple of logical axis names of each parameter."""
    return jax.tree.map(
        lambda box: box.names, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
    )


def state_shardings(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh):
    """Returns the abstract TrainState and its NamedShardings.

    The optimizer has trees like that of the parameters (its moments). If the path of an array ends
    in the path of a parameter, and both have one shape, the array gets the sharding of the
    parameter. All other arrays are replicated.
    """
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

    def sharding_of(path, leaf):
        for start in range(len(path)):
            shape, sharding = by_path.get(path[start:], (None, None))
            if shape == leaf.shape:
                return sharding
        return replicated

    step = jax.ShapeDtypeStruct((), jnp.int32)
    abstract = TrainState(step, params, jax.eval_shape(optimizer.init, params))
    return abstract, jax.tree_util.tree_map_with_path(sharding_of, abstract)


def init_state(
    config: Config, compute: Compute, optimizer: optax.GradientTransformation
) -> TrainState:
    """A fresh state from run.seed. Jit this with out_shardings, so that no device stores all."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    model = LanguageModel(config.model, compute)
    variables = model.init(jax.random.key(config.run.seed), tokens)
    params = nn.unbox(variables)["params"]
    return TrainState(jnp.int32(0), params, optimizer.init(params))


class Setup(NamedTuple):
    """All that `set_up` derives from the config of a run.

    init() returns a TrainState. step(state, batch) returns the next one and the metrics, and the
    given state is donated. evaluate(params, batch) returns LossSums. Both take a loop count as one
    more argument, and compile once for each. On several devices, call them inside `with
    jax.set_mesh(setup.mesh)`, or they raise RuntimeError: the shardings of activations and of
    attention are those of the mesh in the context.
    """

    compute: Compute
    mesh: Mesh
    optimizer: optax.GradientTransformation
    abstract_state: TrainState
    init: Callable
    step: Callable
    evaluate: Callable


def _inside(mesh: Mesh, function: Callable) -> Callable:
    """`function`, but when it is traced, it checks that the context has the mesh. The name stays:
    profiles, compile logs and errors show it."""

    def checked(*args):
        if mesh.size > 1 and jax.sharding.get_abstract_mesh() != mesh.abstract_mesh:
            raise RuntimeError(
                "Call init, step and evaluate inside `with jax.set_mesh(setup.mesh)`."
            )
        return function(*args)

    checked.__name__ = getattr(function, "func", function).__name__  # of a partial: its function
    return checked


def set_up(config: Config, devices=None) -> Setup:
    """Derives all shardings, and jits init, step and evaluate once. Nothing is compiled yet.

    devices: all of jax's if None. Raises UserError if the batch, the mesh and the devices do not
    fit together.
    """
    mesh = make_mesh(config.mesh, devices)
    ways = batch_ways(mesh) * config.optimizer.accumulation_steps
    if config.data.batch_size % ways:
        raise UserError(
            f"data.batch_size={config.data.batch_size} must be a multiple of {ways}, which is "
            f"mesh.data * mesh.fsdp * mesh.expert = {batch_ways(mesh)} times "
            f"optimizer.accumulation_steps={config.optimizer.accumulation_steps}."
        )
    check_length(config.data.sequence_length, mesh)
    if config.run.analysis and mesh.shape["context"] > 1:
        raise UserError(
            f"run.analysis=True cannot be combined with mesh.context={mesh.shape['context']}: it "
            "looks at whole sequences on each device."
        )
    boxed = abstract_params(config.model)
    check_split(boxed, mesh)
    schedule = make_schedule(config.optimizer, config.run.steps)
    optimizer = make_optimizer(config.optimizer, schedule, logical_axes(boxed))
    abstract, shardings = state_shardings(config, optimizer, mesh)
    replicated = NamedSharding(mesh, PartitionSpec())
    batch = batch_sharding(mesh)
    if config.compute.attention == "auto":
        api.agree_on_kernels()
    with jax.set_mesh(mesh):  # "auto" depends on the devices of this mesh
        compute = resolve_compute(config.compute)
    init = functools.partial(init_state, config, compute, optimizer)
    step = functools.partial(
        train_step, config=config, compute=compute, optimizer=optimizer, schedule=schedule
    )
    return Setup(
        compute=compute,
        mesh=mesh,
        optimizer=optimizer,
        abstract_state=jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
        ),
        init=jax.jit(_inside(mesh, init), out_shardings=shardings),
        step=jax.jit(
            _inside(mesh, step),
            in_shardings=(shardings, batch),
            out_shardings=(shardings, replicated),
            donate_argnums=0,
            static_argnums=2,
        ),
        evaluate=jax.jit(
            _inside(mesh, functools.partial(eval_step, config=config.model, compute=compute)),
            in_shardings=(shardings.params, batch),
            out_shardings=replicated,
            static_argnums=2,
        ),
    )
