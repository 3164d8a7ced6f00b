"""AdamW or Muon with clipping, a schedule, and non-finite updates skipped."""

import math

import jax
import jax.numpy as jnp
import optax

from yocou_jax.config import OptimizerConfig
from yocou_jax.typing import PyTree

# The share of orthogonalised updates in AdamW's step size: with it Muon takes AdamW's learning rate
# and weight decay as they are (Moonlight, arXiv 2502.16982, eq. 4).
MUON_CONSISTENT_RMS = 0.2

# Stacked axes that make a parameter many matrices instead of one.
_BATCH_AXES = ("layers", "experts")
# The hidden side of the matrices that Muon is for; embedding, head, router and prefix take AdamW.
_MUON_AXES = {"heads", "kv_heads", "mlp"}


def decay_starts(config: OptimizerConfig, steps: int) -> int | None:
    """The first update, counted from 0, whose learning rate depends on `steps`; None: none does.

    A longer run has the same learning rates before it. cosine: the end of the warm-up. wsd: the
    start of the last `decay_fraction` of the run, never before the end of the warm-up.
    """
    if config.schedule == "constant":
        return None
    decaying = max(1, steps - config.warmup_steps)
    if config.schedule == "wsd":
        decaying = min(decaying, max(1, round(steps * config.decay_fraction)))
    return steps - decaying


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate of the updates 0 to steps - 1.

    Warm-up: update i takes (i + 1) / warmup_steps of the peak; its last one runs at the peak. Then
    the rate stays there up to `decay_starts`, and falls in the n updates from there on: the k-th of
    them, k = 1 to n, takes

        final_fraction + (1 - final_fraction) * share
        share = (1 + cos(pi k / n)) / 2  (cosine)  or  1 - k / n  (wsd)

    of the peak. So the first is below the peak already (in a long cosine by less than float32
    holds), the last runs at final_fraction * peak exactly, and without warm-up a cosine begins one
    update below the peak.
    """
    peak, end = config.learning_rate, config.learning_rate * config.final_fraction
    start = decay_starts(config, steps)
    start = math.inf if start is None else start

    def schedule(count):
        """count: of the updates done before, int."""
        ramp = jnp.minimum((count + 1) / max(1, config.warmup_steps), 1.0)
        fallen = jnp.clip((count + 1 - start) / max(1, steps - start), 0.0, 1.0)
        fallen = (1 - jnp.cos(jnp.pi * fallen)) / 2 if config.schedule == "cosine" else fallen
        return ramp * (peak * (1 - fallen) + end * fallen)

    return schedule


def _is_names(x) -> bool:
    return isinstance(x, tuple)


def _muon_dimensions(names: tuple[str | None, ...]) -> optax.contrib.MuonDimensionNumbers | None:
    """Which axes of a stacked parameter are the rows and columns of its matrices."""
    if not _MUON_AXES & set(names) or "embed" not in names:
        return None
    embed = names.index("embed")
    hidden = [i for i, name in enumerate(names) if name not in (*_BATCH_AXES, "embed")]
    rows, columns = ([embed], hidden) if embed < hidden[0] else (hidden, [embed])
    return optax.contrib.MuonDimensionNumbers(tuple(rows), tuple(columns))


def make_optimizer(
    config: OptimizerConfig, steps: int, axes: PyTree
) -> optax.GradientTransformation:
    """axes: the tree of the parameters with a tuple of logical axis names at each leaf.

    Weight decay applies to matrices, not to norm scales. An update with a non-finite gradient is
    skipped and counted (`notfinite_count` in a row, `total_notfinite`).

    Muon is `optax.contrib.muon`, for the matrices of attention and feed-forward; all else takes
    AdamW. With b = momentum, and g the clipped gradient of one matrix, its update t = 1, 2, ... is

        m = b m + (1 - b) g
        d = b m / (1 - b^(t + 1)) + (1 - b) g / (1 - b^t)
        -rate * (0.2 sqrt(max(rows, columns)) NewtonSchulz(d / (|d| + eps)) + weight_decay * matrix)

    d is Nesterov's look ahead, with a bias correction for each of its parts: Jordan's own Muon has
    none, and differs in the first updates. |d| is the Frobenius norm; Newton-Schulz takes 5 steps
    with Jordan's coefficients. So `eps` is that of Newton-Schulz as well as AdamW's, and beta1 and
    beta2 are AdamW's alone. optax 0.2.6 to 0.2.8, and its main branch of August 2026, agree in
    this; what else it offers (adaptive, preconditioning, coefficients) stays as it is there.
    """
    schedule = make_schedule(config, steps)
    decay_mask = jax.tree.map(lambda names: "embed" in names, axes, is_leaf=_is_names)
    update = optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    if config.name == "muon":
        # optax's own split would leave embedding and head without decay and give them NAdam.
        dimensions = jax.tree.map(_muon_dimensions, axes, is_leaf=_is_names)
        muon = optax.contrib.muon(
            schedule,
            beta=config.momentum,
            eps=config.eps,
            weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=dimensions,
            consistent_rms=MUON_CONSISTENT_RMS,
        )
        labels = jax.tree.map(
            lambda names: "muon" if _muon_dimensions(names) else "adamw", axes, is_leaf=_is_names
        )
        update = optax.partition({"muon": muon, "adamw": update}, labels)
    clipped = optax.chain(optax.clip_by_global_norm(config.clip_norm), update)
    # The host stops the run after several skips in a row; optax must never apply one instead.
    return optax.apply_if_finite(clipped, max_consecutive_errors=2**30)
