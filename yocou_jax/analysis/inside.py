"""All measurements inside a model, on one batch of text."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from yocou_jax.analysis.jacobian import Radius, loop_radius, receptive_field
from yocou_jax.analysis.walk import hidden_after, walk
from yocou_jax.config import ModelConfig
from yocou_jax.data.pipeline import Batch
from yocou_jax.model import Compute, head_matrix
from yocou_jax.training.loss import cross_entropy, divergence
from yocou_jax.typing import AnyArray, Array, Float, Int, PyTree


def angular_distance(x: Float[AnyArray, "*rows D"], y: Float[AnyArray, "*rows D"]) -> Array:
    """arccos(x y / (|x| |y|)) / pi [*rows]: 0 for the same direction, 1 for the opposite one.

    (Gromov et al., arXiv 2403.17887; Figure 8 of the paper.) With u and v, the vectors of
    length 1, the angle is 2 atan2(|u - v|, |u + v|). arccos itself loses half of the digits if x
    and y are similar, and layers change little.
    """
    u, v = (z / jnp.maximum(_norm(z)[..., None], 1e-30) for z in _float32(x, y))
    return 2 / jnp.pi * jnp.arctan2(_norm(u - v), _norm(u + v))


def step_norm(x: Float[AnyArray, "*rows D"], y: Float[AnyArray, "*rows D"]) -> Array:
    """|y - x| / |x| [*rows]."""
    x, y = _float32(x, y)
    return _norm(y - x) / jnp.maximum(_norm(x), 1e-30)


def routing_overlap(a: Int[AnyArray, "*rows k"], b: Int[AnyArray, "*rows k"]) -> Array:
    """Jaccard index of two sets of k experts: how many are in both sets, divided by how many are in
    any of them. 1 if the sets are equal [*rows]."""
    both = jnp.sum(a[..., :, None] == b[..., None, :], axis=(-2, -1))
    return both / (2 * a.shape[-1] - both)


def _float32(*arrays):
    return (z.astype(jnp.float32) for z in arrays)


def _norm(x):
    return jnp.linalg.norm(x, axis=-1)


@dataclasses.dataclass(frozen=True)
class Application:
    """One run of one layer. distance: angular distance of its input and its output."""

    stage: str
    loop: int
    layer: int
    distance: float


@dataclasses.dataclass(frozen=True)
class Loop:
    """One run of a looped stage. All are means over tokens, if nothing else is said.

    number: from 1, through the whole program. distance: mean of the layers' angular distances.
    step: `step_norm` of the states before and after this loop. loss, in nats per token: if the text
    is decoded after this loop (the stages after it run as they are). kl: KL(p || q) in nats per
    token, q: the predictions after this loop, p: those of the whole model. overlap: for each
    layer, the `routing_overlap` with the loop before; None without experts and in the first loop.
    radius: spectral radius of the loop's Jacobian, mean over the sampled positions (see
    `loop_radius`). radius_max: the largest one. residual: the largest residual.
    """

    number: int
    stage: str
    loop: int
    distance: float
    step: float
    loss: float
    kl: float
    overlap: tuple[float, ...] | None
    radius: float
    radius_max: float
    residual: float


@dataclasses.dataclass(frozen=True)
class Inside:
    """applications: all runs of layers, in order. hand_over: the index of the first one in the
    cross-decoder; None without a cross-decoder. loops: the runs of looped stages; a program without
    loops has none. receptive_field: see there."""

    applications: tuple[Application, ...]
    hand_over: int | None
    loops: tuple[Loop, ...]
    receptive_field: int

    def scalars(self) -> dict[str, float]:
        """The numbers that make curves over a training run, by name."""
        found = {"receptive_field": self.receptive_field}
        if self.hand_over is not None:
            found["distance_hand_over"] = self.applications[self.hand_over].distance
        for loop in self.loops:
            numbers = {name: getattr(loop, name) for name in CURVES}
            numbers |= {} if loop.overlap is None else {"overlap": float(np.mean(loop.overlap))}
            found |= {f"{name}_loop_{loop.number}": value for name, value in numbers.items()}
        return found


CURVES = ("distance", "step", "loss", "kl", "radius", "radius_max")


def inside(params: PyTree, config: ModelConfig, compute: Compute, batch: Batch) -> Inside:
    """Measures one batch [B, N].

    Jacobians are those at one position of each row, from N / B in the first row to N in the last
    one. Costs, in forward passes of the batch: two, and for each loop the stages after it and
    ITERATIONS backward passes of one loop. Memory: what one backward pass of the self-decoder
    keeps, as in training, and a hidden state [B, N, D] for each loop.
    """
    model, applications, loops = (params, config, compute), [], []
    B, N = batch.tokens.shape
    at = np.arange(1, B + 1) * N // B - 1
    steps = walk(*model, batch.tokens, batch.positions, batch.segment_ids)
    experts: dict[int, Array] = {}  # of each layer of the stage, in its newest run
    for (_, loop), run in itertools.groupby(steps, lambda s: (s.visit.name, s.visit.loop)):
        overlaps, first = [], None
        for step in run:
            first = first or step
            distance = _mean(angular_distance, step.x, step.y, batch.loss_weights)
            applications.append((step.visit, distance))
            if step.experts is not None and loop:
                before = experts[step.visit.layer]
                overlaps.append(_mean(routing_overlap, before, step.experts, batch.loss_weights))
            experts[step.visit.layer] = step.experts
        if first.visit.stage.loops is not None:
            numbers = _mean(step_norm, first.x, step.y, batch.loss_weights), overlaps
            radius = loop_radius(*model, first, at)
            loops.append((first.visit, *numbers, radius, hidden_after(*model, step)))
    last = hidden_after(*model, step)
    loops = [(*loop, _lens(params, hidden, last, batch, config=config)) for *loop, hidden in loops]
    return _result(applications, loops, receptive_field(*model, batch.tokens))


@functools.partial(jax.jit, static_argnames="measure")
def _mean(measure, a, b, weights: Float[Array, "B N"] | None) -> Float[Array, ""]:
    """The mean over tokens of measure(a, b). All parallel streams of a token have its weight."""
    values = measure(a, b)
    if weights is None:
        return jnp.mean(values)
    weights = jnp.tile(weights, (len(values) // len(weights), 1))
    return jnp.sum(values * weights) / jnp.sum(weights)


@functools.partial(jax.jit, static_argnames="config")
def _lens(
    params: PyTree,
    hidden: Float[Array, "B N D"],
    last: Float[Array, "B N D"],
    batch: Batch,
    *,
    config: ModelConfig,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Loss and KL of `hidden`, per token. last: the hidden state of the whole model."""
    head, weights = head_matrix(params, config), batch.loss_weights
    _, sums = cross_entropy(hidden, head, batch.targets, weights)
    kl = divergence(last, hidden, head, weights)
    return sums.nll / sums.weight, kl / sums.weight


def _result(applications: list, loops: list, field: Array) -> Inside:
    made = tuple(
        Application(visit.name, visit.loop, visit.layer, float(distance))
        for visit, distance in applications
    )
    crossing = [i for i, (visit, _) in enumerate(applications) if visit.stage.reads_global]
    return Inside(
        applications=made,
        hand_over=crossing[0] if crossing else None,
        loops=tuple(_loop(i, made, *loop) for i, loop in enumerate(loops, start=1)),
        receptive_field=int(field),
    )


def _loop(number, applications, visit, step, overlaps, radius: Radius, lens) -> Loop:
    run = visit.name, visit.loop
    loss, kl = lens
    return Loop(
        number=number,
        stage=visit.name,
        loop=visit.loop,
        distance=float(np.mean([a.distance for a in applications if (a.stage, a.loop) == run])),
        step=float(step),
        loss=float(loss),
        kl=float(kl),
        overlap=tuple(map(float, overlaps)) or None,
        radius=float(radius.radius.mean()),
        radius_max=float(radius.radius.max()),
        residual=float(radius.residual.max()),
    )
