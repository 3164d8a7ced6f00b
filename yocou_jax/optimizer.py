"""AdamW or Muon with clipping, a schedule, and non-finite updates skipped."""

import jax
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


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up to the peak, then cosine over the rest, or constant with a linear decay over
    the last `decay_fraction` of the run (wsd), down to final_fraction * peak."""
    peak, end = config.learning_rate, config.learning_rate * config.final_fraction
    warmup = config.warmup_steps
    rest = max(1, steps - warmup)
    if config.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction)
    elif config.schedule == "wsd":
        decay = min(rest, max(1, round(steps * config.decay_fraction)))
        main = optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, end, decay)],
            [rest - decay],
        )
    else:
        main = optax.constant_schedule(peak)
    if not warmup:
        return main
    # The first update takes peak / warmup, not 0: a step that changes nothing is a wasted one.
    ramp = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([ramp, main], [warmup])


def _is_names(x) -> bool:
    return isinstance(x, tuple)


def _muon_dimensions(names: tuple[str, ...]) -> optax.contrib.MuonDimensionNumbers | None:
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
            weight_decay=config.weight_decay,
            eps=config.eps,
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
