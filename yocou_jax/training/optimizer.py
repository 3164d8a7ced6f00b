"""AdamW or Muon, with clipping and a schedule. Updates that are not finite are skipped."""

import math

import jax
import jax.numpy as jnp
import optax

from yocou_jax.config import OptimizerConfig
from yocou_jax.typing import PyTree

# Scale of Muon's updates. It gives them the root mean square of AdamW's updates, so that Muon can
# use the learning rate and weight decay of AdamW (Moonlight, arXiv 2502.16982, eq. 4).
MUON_CONSISTENT_RMS = 0.2

# Stacked axes: a parameter that has one of them is many matrices.
_BATCH_AXES = ("layers", "experts")
# Muon updates a parameter with "embed" and one of these axes: attention and feed-forward.
_MUON_AXES = {"heads", "kv_heads", "mlp"}
# AdamW updates a parameter with "embed" and one of these axes: embedding and head, routers, and the
# matrices that join parallel streams.
_ADAMW_AXES = {"vocab", "experts", "streams"}


def decay_starts(config: OptimizerConfig, steps: int) -> int | None:
    """The first update, counted from 0, whose learning rate depends on `steps`, or None.

    Before it, a longer run has the same learning rates. cosine: the end of the warm-up. wsd: the
    start of the last `decay_fraction` of the run, but not before the end of the warm-up.
    """
    if config.schedule == "constant":
        return None
    decaying = max(1, steps - config.warmup_steps)
    if config.schedule == "wsd":
        decaying = min(decaying, max(1, round(steps * config.decay_fraction)))
    return steps - decaying


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate of the updates 0 to steps - 1.

    Warm-up: update i takes (i + 1) / warmup_steps of the peak, so the last one takes the peak. Then
    the rate stays at the peak until `decay_starts`, and falls in the n updates after that. The k-th
    of them, k = 1 to n, takes

        final_fraction + (1 - final_fraction) * share
        share = (1 + cos(pi k / n)) / 2  (cosine)  or  1 - k / n  (wsd)

    of the peak. So the first of them is below the peak already (in a long cosine by less than
    float32 can represent), and the last one takes exactly final_fraction * peak. Without warm-up,
    update 0 of a cosine is the first of them.
    """
    peak, end = config.learning_rate, config.learning_rate * config.final_fraction
    start = decay_starts(config, steps)
    start = math.inf if start is None else start

    def schedule(count):
        """count: number of updates before this one, int."""
        ramp = jnp.minimum((count + 1) / max(1, config.warmup_steps), 1.0)
        fallen = jnp.clip((count + 1 - start) / max(1, steps - start), 0.0, 1.0)
        fallen = (1 - jnp.cos(jnp.pi * fallen)) / 2 if config.schedule == "cosine" else fallen
        return ramp * (peak * (1 - fallen) + end * fallen)

    return schedule


def _is_names(x) -> bool:
    return isinstance(x, tuple)


def _muon_dimensions(names: tuple[str | None, ...]) -> optax.contrib.MuonDimensionNumbers | None:
    """The axes of a parameter that are rows and columns of its matrices. None: AdamW updates it.

    Raises ValueError for axes that are in neither table. This is a mistake in a module.
    """
    if "embed" not in names:
        return None
    if not _MUON_AXES & set(names):
        if not _ADAMW_AXES & set(names):
            raise ValueError(
                f"Muon or AdamW? Add an axis of the parameter {names} to _MUON_AXES or _ADAMW_AXES."
            )
        return None
    embed = names.index("embed")
    hidden = [i for i, name in enumerate(names) if name not in (*_BATCH_AXES, "embed")]
    rows, columns = ([embed], hidden) if embed < hidden[0] else (hidden, [embed])
    return optax.contrib.MuonDimensionNumbers(tuple(rows), tuple(columns))


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule, axes: PyTree
) -> optax.GradientTransformation:
    """schedule: the learning rate, as `make_schedule` returns it. axes: the tree of the parameters,
    with a tuple of logical axis names at each leaf.

    Weight decay applies to matrices, not to norm scales. An update with a non-finite gradient is
    skipped and counted (`notfinite_count` in a row, `total_notfinite`).

    Muon is `optax.contrib.muon`. It updates the matrices of attention and feed-forward, and AdamW
    updates the rest. For one matrix with the clipped gradient g, and b = momentum, the update
    t = 1, 2, ... is

        m = b m + (1 - b) g
        d = b m / (1 - b^(t + 1)) + (1 - b) g / (1 - b^t)
        -rate * (0.2 sqrt(max(rows, columns)) NewtonSchulz(d / (|d| + eps)) + weight_decay * matrix)

    d is Nesterov's look-ahead with a bias correction for each of its two parts. Jordan's own Muon
    has no bias correction, so its first updates differ. |d| is the Frobenius norm. Newton-Schulz
    takes 5 steps with Jordan's coefficients. So Newton-Schulz and AdamW use `eps`, and only AdamW
    uses beta1 and beta2. optax 0.2.6 to 0.2.8, and its main branch of August 2026, agree in this.
    Other options of optax (adaptive, preconditioning, coefficients) have their defaults.
    """
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
        # The split that optax makes would give NAdam without decay to embedding and head.
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
    # The host stops the run after several skips in a row. optax must never apply such an update.
    return optax.apply_if_finite(clipped, max_consecutive_errors=2**30)
