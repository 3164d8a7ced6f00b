"""Models of a few thousand parameters, and helpers that several test files use."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from yocou_jax.config import Config, ModelConfig
from yocou_jax.data.pipeline import Batch
from yocou_jax.model import Compute, LanguageModel, abstract_params, head_matrix, resolve_compute
from yocou_jax.training.loss import cross_entropy
from yocou_jax.training.step import TrainState

MODEL = {
    "num_layers": 4,
    "vocab_size": 32,
    "d_model": 16,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "d_ff": 24,
    "window": 4,
    "prefix_length": 3,
}
MOE = {"num_experts": 4, "experts_per_token": 2, "num_shared_experts": 1, "expert_width": 12}


def quick(values, *chosen):
    """Cases for `parametrize`, of which all but the chosen ones are slow."""
    assert set(chosen) <= set(values)
    return [pytest.param(v, marks=() if v in chosen else pytest.mark.slow) for v in values]


# They have what the others have: window, full and cross layers with loops and without, and streams.
FOUR = ("yoco_u", "upper_loop", "rins", "parscale")

UNROLL = base.get_config().compute.unroll  # of real runs


def config(
    architecture="yoco_u", *, optimizer=None, data=None, mesh=None, run=None, **model
) -> Config:
    """A tiny version of configs/base.py. Fields of `model` and `compute` are given by name, other
    groups as dicts. Stages are loops, which compile faster; unroll=UNROLL gives those of real runs.
    """
    c = base.get_config()
    c.compute.unroll = 0
    c.compute.update({name: model.pop(name) for name in tuple(model) if name in c.compute})
    c.model.update(architecture=architecture, **(MODEL | model))
    c.optimizer.update({"warmup_steps": 2} | (optimizer or {}))
    c.data.update({"batch_size": 8, "sequence_length": 16} | (data or {}))
    c.mesh.update(mesh or {})
    c.run.update({"steps": 20} | (run or {}))
    return Config.from_dict(c)


def model(architecture="yoco_u", **fields) -> ModelConfig:
    return config(architecture, **fields).model


def compute(**fields) -> Compute:
    """How a model runs, resolved. fields: those of `config.compute` that differ from base.py."""
    return resolve_compute(config(**fields).compute)


@functools.cache
def params(config: ModelConfig, seed: int = 0):
    """Random parameters from numpy, because flax's initialization takes seconds to compile.

    Norm scales are not all 1, so that tests find one that is not used.
    """
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        noise = rng.normal(size=leaf.shape)
        scale = jax.tree_util.keystr(path).endswith("['scale']")
        return np.asarray(1 + 0.1 * noise if scale else 0.25 * noise, leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, nn.unbox(abstract_params(config)))


def fresh_state(setup, params) -> TrainState:
    """A first state from given parameters, without the compilation of an initialization.

    It is placed like the state of later steps. Otherwise a step would be compiled a second time.
    """
    params = jax.tree.map(jnp.array, params)  # copies, because a step donates its state
    state = TrainState(jnp.int32(0), params, setup.optimizer.init(params))
    return jax.device_put(state, jax.tree.map(lambda x: x.sharding, setup.abstract_state))


def logprobs(logits, tokens):
    """log p(tokens[:, i] | all before) [B, N - 1] from all logits [B, N, V], for i >= 1."""
    logps = np.asarray(jax.nn.log_softmax(logits[:, : tokens.shape[1] - 1]))
    return np.take_along_axis(logps, np.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]


def tokens(batch: int, length: int, vocab: int = 32, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, vocab, (batch, length)), jnp.int32)


def token_blocks(*rows, steps: int) -> list[np.ndarray]:
    """Rows of ids as blocks of `steps` columns, with -1 after the end of each."""
    width = -(-max(map(len, rows)) // steps) * steps
    tokens = np.array([list(row) + [-1] * (width - len(row)) for row in rows])
    return np.split(tokens, width // steps, axis=1)


def batch(size: int = 8, length: int = 16, vocab: int = 32, seed: int = 0) -> Batch:
    text = np.asarray(tokens(size, length + 1, vocab, seed))
    return Batch(text[:, :-1], text[:, 1:], None, None, None)


def packed_batch(size: int = 8, length: int = 16, vocab: int = 32, seed: int = 0) -> Batch:
    """Rows with two documents each. Every row has its own boundary between them.

    The last target of the first document has weight 0, so that tests see whether weights are used.
    (In the training batches of the pipeline, every target counts.)
    """
    plain = batch(size, length, vocab, seed)
    cuts = np.random.default_rng(seed).integers(1, length, (size, 1))
    at = np.arange(length)[None]
    weights = np.where(at + 1 == cuts, 0.0, 1.0).astype(np.float32)
    return Batch(
        plain.tokens,
        plain.targets,
        weights,
        np.where(at < cuts, 1, 2).astype(np.int32),
        np.where(at < cuts, at, at - cuts).astype(np.int32),
    )


def _language_model(config: ModelConfig, how: Compute | None) -> LanguageModel:
    return LanguageModel(config, how or compute())


@functools.partial(jax.jit, static_argnames=("config", "num_loops", "compute"))
def hidden(
    params,
    config: ModelConfig,
    tokens,
    positions=None,
    segment_ids=None,
    num_loops=None,
    compute: Compute | None = None,
):
    output = _language_model(config, compute).apply(
        {"params": params}, tokens, positions, segment_ids, num_loops=num_loops
    )
    return output.hidden


@functools.partial(jax.jit, static_argnames=("config", "compute"))
def value_and_grad(params, config: ModelConfig, tokens, compute: Compute | None = None):
    """Mean loss of predicting each next token, and its gradients."""

    def loss(params):
        model = _language_model(config, compute)
        output = model.apply({"params": params}, tokens[:, :-1])
        total, _ = cross_entropy(output.hidden, head_matrix(params, config), tokens[:, 1:])
        return total / tokens[:, 1:].size

    return jax.value_and_grad(loss)(params)


def assert_close(a, b, tolerance=1e-5):
    """Two trees are equal. tolerance: relative to the largest entry of each array."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert x.shape == y.shape, jax.tree_util.keystr(path)
        worst, scale = np.abs(x - y).max(), np.abs(y).max()
        assert worst <= tolerance * scale, (
            f"{jax.tree_util.keystr(path)} differs by {worst}, its largest entry is {scale}"
        )
