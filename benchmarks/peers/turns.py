"""How two programs are timed in turn, and what a report says about the pairs of times."""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import device
from benchmarks.peers.process import Peer
from benchmarks.report import Grid
from benchmarks.timing import seconds
from benchmarks.training import PRODUCT

# Idle threads of a library look for new work for some milliseconds before they sleep. So there is a
# pause between two turns.
PAUSE_S = 0.02

Timed = Callable[[], float]  # runs once and returns its seconds


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def load() -> float:
    """How many threads of all programs were busy in the last minute, on average."""
    return os.getloadavg()[0]


def products(peer: Peer) -> tuple[Timed, Timed]:
    """A matrix product in jax, and the same in PyTorch."""
    x = jax.random.normal(jax.random.key(0), (PRODUCT, PRODUCT))
    product = jax.jit(jnp.dot)
    seconds(product, x, x)
    return lambda: seconds(product, x, x), lambda: peer.ask("product", size=PRODUCT, times=1)


def take(pair: tuple[Timed, Timed], number: int) -> tuple[float, float]:
    """Times both once, one after the other; in every second pair the other one begins."""
    times = [0.0, 0.0]
    for side in (0, 1) if number % 2 == 0 else (1, 0):
        time.sleep(PAUSE_S)
        times[side] = pair[side]()
    return times[0], times[1]


def summary(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    """Medians of our seconds and of theirs, and of the ratio ours / theirs in each pair, with its
    quartiles."""
    ratios = [ours / theirs for ours, theirs in pairs]
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
    return {
        "pairs": len(pairs),
        "ours_s": statistics.median(ours for ours, _ in pairs),
        "theirs_s": statistics.median(theirs for _, theirs in pairs),
        "time_ratio": middle,
        "time_ratio_quartiles": [low, high],
    }


def report_head(
    name: str, peer: Peer, load_before: float, product_times: list[tuple[float, float]]
) -> dict[str, Any]:
    """What every report has: the machine, the versions, and the speed of the matrix product."""
    product = summary(product_times)
    return {
        "device": jax.devices()[0].device_kind,
        "cores": cores(),
        "load_before": load_before,
        "versions": device.versions(),
        "peer": name,
        "peer_versions": peer.versions,
        "matmul_gflops": {
            side: 2 * PRODUCT**3 / product[f"{side}_s"] / 1e9 for side in ("ours", "theirs")
        },
    }


def close(ours, theirs, what: str, tolerance: float) -> float:
    """The largest difference of two arrays, relative to the largest entry.

    Raises RuntimeError above the tolerance: then the two programs do not compute the same.
    """
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    found = float(np.abs(ours - theirs).max() / np.abs(ours).max())
    if not found <= tolerance:
        raise RuntimeError(
            f"The peer is not the same model: {what} differ by {found:.2g} of the largest."
        )
    return found


def cells(times: dict[str, Any]) -> list[str]:
    """The columns of a summary in a table."""
    low, high = times["time_ratio_quartiles"]
    return [
        f"{times['ours_s'] * 1e3:,.4g}",
        f"{times['theirs_s'] * 1e3:,.4g}",
        f"{times['time_ratio']:.2f}",
        f"{low:.2f} to {high:.2f}",
        f"{1 / times['time_ratio']:.2f}x",
        str(times["pairs"]),
    ]


def grid(report: dict[str, Any], texts: list[str]) -> Grid:
    """The table of a report. texts: the fields of a row that name it."""
    columns = [*texts, "ours, ms", "theirs, ms", "ratio of times", "quartiles", "speed", "pairs"]
    rows = [[*(str(row[key]) for key in texts), *cells(row)] for row in report["rows"]]
    return Grid(f"ours / {report['peer']}", columns, rows, texts=len(texts))
