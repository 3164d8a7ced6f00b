"""What tasks with right answers share: their settings, batches, shares and bins."""

import math
from collections.abc import Collection, Iterator
from typing import TypeVar

import numpy as np

from yocou_jax import manifest
from yocou_jax.data.sources import parse_source
from yocou_jax.data.synthetic import Hops, Needle, parse_settings, parse_task
from yocou_jax.errors import UserError
from yocou_jax.evaluation.options import Options
from yocou_jax.evaluation.statistics import clustered, wilson
from yocou_jax.sharding import batch_ways
from yocou_jax.typing import Bool, Float, Int

Settings = TypeVar("Settings", Hops, Needle)
# Flags that give what a task does not read from --source.
FLAGS = {"length": "--lengths", "documents": "--samples", "seed": "--seed"}


def settings(
    options: Options, kind: type[Settings], default: list[Settings], reads: Collection[str]
) -> list[Settings]:
    """The tasks of a kind that `options.source` names; without it, those of the run's training
    data; if these have none, or if there is no run, `default`. Weights of a mixture do not matter.

    reads: the settings that are read. The others are the defaults in what is returned, so parts of
    a mixture that differ only in these are one task.

    Raises UserError if options.source names anything else, or another setting.
    """
    source, found = options.source, None
    if source is not None:
        _check_source(source, kind, default[0], reads)
    elif (options.folder / manifest.FILE).exists():
        found = manifest.read(options.folder)
    if found is not None:
        source = found["config"]["data"]["source"]
    named = [] if source is None else [parse_task(name) for _, name in parse_source(source)]
    tasks = [task for task in named if isinstance(task, kind)] or default
    same = (kind(**{name: getattr(task, name) for name in reads}) for task in tasks)
    return list(dict.fromkeys(same))


def _check_source(
    source: str, kind: type[Settings], example: Settings, reads: Collection[str]
) -> None:
    """Raises UserError if a part of the source is not of this kind, or has a setting that is not
    read."""
    for _, part in parse_source(source):
        found = parse_settings(part)
        if found is None or found[0] is not kind:
            raise UserError(
                f"--source={source} has {part}, which is no task of this kind; "
                f"{described([example], reads)} would be one."
            )
        for name in found[1]:
            if name not in reads:
                raise UserError(
                    f"{name} in --source={source} would be ignored: give {FLAGS[name]} instead."
                )


def described(tasks: list[Settings], reads: Collection[str]) -> str:
    """What is asked, as a source without weights: the settings that are read."""
    named = []
    for task in tasks:
        given = {name: getattr(task, name) for name in reads}
        words = ",".join(f"{name}={value}" for name, value in given.items() if value != "")
        named.append(f"{type(task).__name__.lower()}({words})")
    return " + ".join(named)


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
