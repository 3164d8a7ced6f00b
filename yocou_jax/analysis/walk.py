"""A forward pass layer by layer, so that the residual stream can be looked at between layers."""

import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from yocou_jax.config import ModelConfig
from yocou_jax.model import Block, Compute, LanguageModel
from yocou_jax.model.attention import Context
from yocou_jax.program import Visit
from yocou_jax.typing import AnyArray, Array, Float, Int, PyTree


class Step(NamedTuple):
    """One run of one layer.

    x, y [PB, N, D]: the residual stream before and after the layer. context: what the layer saw in
    addition to x. experts [PB, N, k]: to which experts each token was sent; None without experts.
    """

    visit: Visit
    x: Array
    y: Array
    context: Context
    experts: Array | None


def walk(
    params: PyTree,
    config: ModelConfig,
    compute: Compute,
    tokens: Int[AnyArray, "B N"],
    positions: Int[AnyArray, "#B N"] | None = None,
    segment_ids: Int[AnyArray, "B N"] | None = None,
) -> Iterator[Step]:
    """Every run of a layer in the forward pass of `LanguageModel`, in order.

    The arguments are those of `LanguageModel`. Each kind of layer is compiled once, so a deep model
    costs no more compilation than a flat one. Only the residual streams that the caller keeps stay
    in memory.
    """
    if positions is None:
        positions = np.arange(tokens.shape[1], dtype=np.int32)[None]
    x = _part(params, tokens, config=config, compute=compute, method="embed")
    context = Context.of(config, positions, segment_ids=segment_ids)
    yield from _run(params, config, compute, x, context, config.program.visits())


def hidden_after(
    params: PyTree, config: ModelConfig, compute: Compute, step: Step
) -> Float[Array, "B N D"]:
    """What the head maps to logits, if the stage of `step` ends after this step: the stages after
    it run, and then the final norm.

    After a run of a looped stage, this is the model in which the stage runs only so many times.
    """
    names = [name for name, _ in config.program.named_stages]
    later = config.program.named_stages[names.index(step.visit.name) + 1 :]
    visits = (visit for name, stage in later for visit in stage.visits(name))
    x = step.y
    for later_step in _run(params, config, compute, x, step.context, visits):
        x = later_step.y
    return _part(params, x, config=config, compute=compute, method="read_out")


def _run(
    params: PyTree,
    config: ModelConfig,
    compute: Compute,
    x: Float[Array, "PB N D"],
    context: Context,
    visits: Iterable[Visit],
) -> Iterator[Step]:
    for visit in visits:
        if visit.stage.reads_global and context.global_kv is None:
            global_kv = _part(
                params, x, context, config=config, compute=compute, method="project_global_kv"
            )
            context = context.replace(global_kv=global_kv)
        block = Block(config, compute, visit.stage.mixer)
        y, experts = _layer(params[visit.name]["layers"], visit.layer, x, context, block=block)
        yield Step(visit, x, y, context, experts)
        x = y


@functools.partial(jax.jit, static_argnames=("config", "compute", "method"))
def _part(params: PyTree, *args, config: ModelConfig, compute: Compute, method: str):
    """Calls a method of `LanguageModel` that is not a stage."""
    return LanguageModel(config, compute).apply({"params": params}, *args, method=method)


@functools.partial(jax.jit, static_argnames="block")
def _layer(stacked: PyTree, layer: int | Int[Array, ""], x, context: Context, *, block: Block):
    """Runs one layer of a stage. Returns y, and the experts of each token (None without experts).
    stacked: the parameters of all layers of the stage."""
    params = jax.tree.map(lambda w: w[layer], stacked)
    (y, _), captured = block.apply(
        *({"params": params}, x, context),
        capture_intermediates=lambda module, _: module.name == "router",
        mutable=["intermediates"],
    )
    logits = jax.tree.leaves(captured)
    if not logits:
        return y, None
    # As the router itself chooses (MixtureOfExperts): the softmax can make two logits equal.
    return y, jax.lax.top_k(jax.nn.softmax(logits[0]), block.config.experts_per_token)[1]
