"""Derivatives of the looped part: does a loop contract, and which inputs does its output see?"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from yocou_jax.analysis.walk import Step
from yocou_jax.config import ModelConfig
from yocou_jax.model import Compute, LanguageModel
from yocou_jax.model.attention import Context
from yocou_jax.model.language_model import StageStack
from yocou_jax.program import Stage
from yocou_jax.sharding import constrain
from yocou_jax.typing import AnyArray, Array, Float, Int, PyTree

ITERATIONS = 20  # for most trained layers enough for a residual of a few percent


class Radius(NamedTuple):
    """radius [PB]: the largest absolute value of an eigenvalue. residual [PB]: the error of the
    eigenvalue equation for the unit vector that was found, divided by the radius. So 0.01 means: a
    matrix that differs by 1% of the radius has an eigenvalue of exactly this size. Both are NaN if
    the derivative is not finite."""

    radius: np.ndarray
    residual: np.ndarray


def loop_radius(
    params: PyTree,
    config: ModelConfig,
    compute: Compute,
    step: Step,
    at: Int[np.ndarray, " B"],
    iterations: int = ITERATIONS,
) -> Radius:
    """Spectral radius of the Jacobian of one run of a looped stage, at a state of the model.

    The map F takes the residual stream [N, D] of a row before one run of the stage to that after
    it. The global K, V stay constant. step: the first layer of this run, so step.x is the state.
    at: a position i in each row; the result is the spectral radius of the block dF_i/dx_i [D, D].

    The model is causal, so dF_i/dx_j is 0 for j > i. Hence the Jacobian of all positions [N D, N D]
    is block-triangular: its eigenvalues are those of the blocks, and its spectral radius is the
    largest one of all positions. (A power iteration with the whole matrix would need more
    iterations than the row has positions. Before that, most of its growth is what positions add to
    each other.)

    Method: Arnoldi's. It is a power iteration that keeps all of its vectors and takes the
    eigenvalues of the block in their span (at most `iterations` vectors). So a complex pair, which
    rotates forever in a power iteration, has a value too. The kernels have reverse-mode derivatives
    only, so the iteration runs with the transposed block, which has the same eigenvalues.

    Costs `iterations` backward passes through the stage, and the memory of one.
    """
    streams = step.x.shape[0] // len(at)
    hessenberg = _arnoldi(
        *(params, step.x, step.context, np.tile(at, streams)),
        config=config,
        compute=compute,
        name=step.visit.name,
        stage=dataclasses.replace(step.visit.stage, loops=None),
        iterations=min(iterations, config.d_model),
    )
    return _eigenvalues(np.asarray(jax.device_get(hessenberg), np.float64))


def _eigenvalues(hessenberg: Float[np.ndarray, "PB more k"]) -> Radius:
    finite = np.isfinite(hessenberg).all(axis=(1, 2))
    hessenberg = np.where(finite[:, None, None], hessenberg, 0.0)
    values, vectors = np.linalg.eig(hessenberg[:, :-1])
    rows, largest = np.arange(len(values)), np.abs(values).argmax(axis=1)
    radius = np.abs(values[rows, largest])
    # Saad, Numerical Methods for Large Eigenvalue Problems, proposition 6.8.
    error = hessenberg[:, -1, -1] * np.abs(vectors[rows, -1, largest])
    residual = error / np.maximum(radius, np.finfo(np.float32).tiny)
    return Radius(np.where(finite, radius, np.nan), np.where(finite, residual, np.nan))


def _stage(params, x, context, *, config, compute, name: str, stage: Stage):
    stack = StageStack(config, compute, stage, name=name)
    return stack.apply({"params": params[name]}, x, context, stage.num_loops)[0]


@functools.partial(jax.jit, static_argnames=("config", "compute", "name", "stage", "iterations"))
def _arnoldi(
    params: PyTree,
    x: Float[Array, "PB N D"],
    context: Context,
    at: Int[Array, " PB"],
    *,
    config: ModelConfig,
    compute: Compute,
    name: str,
    stage: Stage,
    iterations: int,
) -> Float[Array, "PB more k"]:
    """The block of each row in an orthonormal basis: k columns, and one row more, whose last entry
    is the part that leaves the basis. Vectors after an invariant subspace are 0."""
    own = jnp.arange(x.shape[1])[None, :, None] == at[:, None, None]

    def own_state(x):
        return jnp.sum(jnp.where(own, x, 0), axis=1)

    def loop(h):
        changed = jnp.where(own, h[:, None], x)
        return own_state(
            _stage(params, changed, context, config=config, compute=compute, name=name, stage=stage)
        )

    _, transposed = jax.vjp(loop, own_state(x))
    einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

    def iterate(i, carry):
        basis, hessenberg = carry
        w = transposed(basis[i].astype(x.dtype))[0].astype(jnp.float32)
        length, parts = jnp.linalg.norm(w, axis=-1), 0.0
        for _ in range(2):  # once is not orthogonal enough in float32
            part = einsum("kbd,bd->bk", basis, w)
            w, parts = w - einsum("bk,kbd->bd", part, basis), parts + part
        rest = jnp.linalg.norm(w, axis=-1)
        rest = jnp.where(rest > 1e-5 * length, rest, 0)  # less is rounding: the span is invariant
        w = jnp.where(rest[:, None] > 0, w / jnp.maximum(rest, 1e-30)[:, None], 0)
        parts = parts.at[:, i + 1].set(rest)
        return basis.at[i + 1].set(w), hessenberg.at[:, :, i].set(parts)

    rows, width = x.shape[0], x.shape[2]
    start = jax.random.normal(jax.random.key(0), (rows, width))
    basis = jnp.zeros((iterations + 1, rows, width))
    basis = basis.at[0].set(start / jnp.linalg.norm(start, axis=-1, keepdims=True))
    hessenberg = jnp.zeros((rows, iterations + 1, iterations))
    _, hessenberg = jax.lax.fori_loop(0, iterations, iterate, (basis, hessenberg))
    return constrain(hessenberg, None, None, None)  # the host reads it


@functools.partial(jax.jit, static_argnames=("config", "compute"))
def receptive_field(
    params: PyTree, config: ModelConfig, compute: Compute, tokens: Int[AnyArray, "B N"]
) -> Int[Array, ""]:
    """From how many input positions the last output of the self-decoder gets a gradient that is not
    zero: the most of any row.

    For window layers that run in loops this is loops * layers * (W - 1) + 1, or all N positions if
    there are fewer. It is less if the attention to the farthest keys is zero in float32.
    """
    context = Context.of(config, jnp.arange(tokens.shape[1])[None])

    def last_output(x):
        for name, stage in config.program.self_decoder:
            x = _stage(params, x, context, config=config, compute=compute, name=name, stage=stage)
        return x[:, -1]

    x = LanguageModel(config, compute).apply({"params": params}, tokens, method="embed")
    y, pull = jax.vjp(last_output, x)
    # A random direction: with a plain sum, a position could cancel to exactly 0.
    (gradient,) = pull(jax.random.normal(jax.random.key(0), y.shape).astype(y.dtype))
    return jnp.sum(jnp.any(gradient != 0, axis=-1), axis=1).max()
