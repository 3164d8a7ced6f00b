"""What tasks with right answers share: their settings, batches, shares and bins."""

import math
from collections.abc import Iterator
from typing import TypeVar

import numpy as np

from yocou_jax import manifest
from yocou_jax.data.corpus import parse_source
from yocou_jax.data.synthetic import Hops, Needle, parse_task
from yocou_jax.errors import UserError
from yocou_jax.evaluation.options import Options
from yocou_jax.evaluation.statistics import clustered, wilson
from yocou_jax.sharding import batch_ways
from yocou_jax.typing import Bool, Float, Int

Settings = TypeVar("Settings", Hops, Needle)


def settings(options: Options, kind: type[Settings], default: list[Settings]) -> list[Settings]:
    """The tasks of a kind that `options.source` names; without it, those of the run's training
    data; if these have none, or if there is no run, `default`.

    Raises UserError if options.source names no such task.
    """
    source, found = options.source, None
    if source is None and (options.folder / manifest.FILE).exists():
        found = manifest.read(options.folder)
    if found is not None:
        source = found["config"]["data"]["source"]
    named = [] if source is None else [parse_task(name) for _, name in parse_source(source)]
    tasks = [task for task in named if isinstance(task, kind)]
    if options.source is not None and not tasks:
        raise UserError(
            f"--source={options.source} names no task of this kind; {default[0].name} would be one."
        )
    return tasks or default


def batches(rows: int, size: int) -> Iterator[Int[np.ndarray, " size"]]:
    """The numbers of all rows, in batches of one size, which devices can share: about `size`, or
    `rows` if they are fewer. The last batch is filled up with rows from the beginning."""
    ways = batch_ways()
    size = -(-max(1, min(size, rows)) // ways) * ways
    for first in range(0, rows, size):
        yield np.arange(first, first + size) % rows


def accuracy(
    right: Bool[np.ndarray, " n"], texts: Int[np.ndarray, " n"] | None = None
) -> dict[str, float]:
    """The share of right answers, and its interval. texts: for each answer the number of its text;
    None: each is of a text of its own, and so independent of the others."""
    if texts is None:
        low, high = wilson(int(right.sum()), right.size)
    else:
        low, high = clustered(right, texts)
    share = float(right.mean()) if right.size else math.nan
    return {"answers": right.size, "accuracy": share, "low": low, "high": high}


def summary(
    right: Bool[np.ndarray, " n"], nll: Float[np.ndarray, " n"], texts: Int[np.ndarray, " n"]
) -> dict[str, float]:
    """The accuracy, and the mean loss in nats. texts: see `accuracy`."""
    loss = float(nll.mean(dtype=np.float64)) if nll.size else math.nan
    return accuracy(right, texts) | {"nats": loss}


def bins(
    values: Int[np.ndarray, " n"], least: int
) -> list[tuple[int, int, Bool[np.ndarray, " n"]]]:
    """(first, last, which values are from first to last): consecutive bins of at least `least`
    values, except the last one."""
    found, begin, total = [], None, 0
    distinct, numbers = np.unique(values, return_counts=True)
    for value, number in zip(distinct.tolist(), numbers.tolist(), strict=True):
        begin, total = value if begin is None else begin, total + number
        if total >= least or value == distinct[-1]:
            found.append((begin, value, (values >= begin) & (values <= value)))
            begin, total = None, 0
    return found
