"""Means and paired differences over the seeds of a study, and what they say about a claim; and
shares of right answers.

Intervals are those of Student's t. Two entries with the same seed see the same batches in the same
order, so their difference varies less than each of them: all differences are paired by seed.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

from yocou_jax.typing import Bool, Int

LEVEL = 0.95  # of all intervals
POWER = 0.8  # with which the smallest effect is found
PAIRS = 3  # fewer decide nothing
# Differences that vary less are equal: losses are float32, so their last digits are rounding.
ROUNDING = 1e-6

REPRODUCED, NOT_HERE, INCONCLUSIVE = "reproduced", "not at this scale", "inconclusive"
HOLDS = "holds"  # instead of "reproduced", if the paper does not say it


class Interval(NamedTuple):
    """The mean of n values, and its 95% interval from low to high. sd: of one value. With one
    value, sd, low and high are None."""

    mean: float
    low: float | None
    high: float | None
    sd: float | None
    n: int


def interval(values: Sequence[float]) -> Interval:
    """The mean of at least one value, with its interval."""
    n, mean = len(values), statistics.fmean(values)
    if n < 2:
        return Interval(mean, None, None, None, n)
    sd = statistics.stdev(values)
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * sd / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, sd, n)


def paired(lower: Mapping[int, float], higher: Mapping[int, float]) -> Interval | None:
    """`higher` minus `lower`, over the seeds that both have. None if there are none. Above 0,
    `lower` is lower."""
    seeds = sorted(lower.keys() & higher.keys())
    return interval([higher[seed] - lower[seed] for seed in seeds]) if seeds else None


def smallest_effect(difference: Interval) -> float | None:
    """The smallest true difference that this many pairs would have found with 80% probability.

    To find it means that the 95% interval excludes 0 (the two-sided paired t test). The standard
    deviation is that of the sample. None with fewer than two pairs.
    """
    if difference.sd is None:
        return None
    df = difference.n - 1
    limit = float(stats.t.ppf((1 + LEVEL) / 2, df))

    def missing(shift: float) -> float:
        """Of the power, if the true difference is `shift` standard errors. The square of a
        noncentral t is a noncentral F (which scipy computes for more values)."""
        return POWER - float(stats.ncf.sf(limit**2, 1, df, shift**2))

    high = 1.0
    while missing(high) > 0:
        high *= 2
    shift = float(optimize.brentq(missing, high / 2, high))
    return shift * difference.sd / math.sqrt(difference.n)


def all_equal(difference: Interval) -> bool:
    """Whether several differences are equal, up to rounding. Such a sample says nothing about their
    spread, so its interval is no interval."""
    return difference.sd is not None and difference.sd < ROUNDING


def verdict(difference: Interval | None, least: float) -> str:
    """What a difference (`paired`) says about the claim that it is above 0.

    reproduced: the whole interval is above 0, and the mean at least `least`. not at this scale: the
    whole interval is below `least`, so there is no effect that would matter. inconclusive: anything
    else, fewer than PAIRS seeds, and differences that are all equal.
    """
    if difference is None or difference.n < PAIRS or all_equal(difference):
        return INCONCLUSIVE
    low, high = difference.low, difference.high
    if low is None or high is None:
        return INCONCLUSIVE
    if high < least:
        return NOT_HERE
    return REPRODUCED if low > 0 and difference.mean >= least else INCONCLUSIVE


# --- Shares of right answers ----------------------------------------------------------------------


def wilson(right: float, samples: float, z: float | None = None) -> tuple[float, float]:
    """The 95% interval of a share, `right` of `samples` (Wilson 1927). It stays inside [0, 1], and
    does not shrink to a point if all samples are right, or none. Without samples it is (0, 1).

    z: the half width in standard errors; None: that of independent samples.
    """
    if samples <= 0:
        return 0.0, 1.0
    z = float(stats.norm.ppf((1 + LEVEL) / 2)) if z is None else z
    share = right / samples
    middle = share + z**2 / (2 * samples)
    half = z * math.sqrt(share * (1 - share) / samples + z**2 / (4 * samples**2))
    scale = 1 + z**2 / samples
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def clustered(
    right: Bool[np.ndarray, " n"], clusters: Int[np.ndarray, " n"]
) -> tuple[float, float]:
    """The 95% interval of the share of right answers, if those of one cluster (of one text) may
    depend on each other, and different clusters do not.

    The standard error is that of a ratio of two means over clusters: right answers and answers.
    The interval is Wilson's for as many independent answers as would have this standard error, at
    most all, with the quantile of Student's t. If all answers are right, or none, nothing varies:
    then each cluster counts as one answer. With fewer than two clusters it is (0, 1).
    """
    _, number = np.unique(clusters, return_inverse=True)
    answers = np.bincount(number)
    if (count := len(answers)) < 2:
        return 0.0, 1.0
    share = float(right.mean())
    rest = np.bincount(number, right) - share * answers  # of each cluster; their sum is 0
    variance = count / (count - 1) * float(rest @ rest) / len(right) ** 2
    if variance == 0:
        samples = count if share in (0, 1) else len(right)
    else:
        samples = min(share * (1 - share) / variance, len(right))
    return wilson(share * samples, samples, float(stats.t.ppf((1 + LEVEL) / 2, count - 1)))
