"""Intervals against scipy's own tests and closed forms, and verdicts by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from yocou_jax.evaluation.statistics import Interval, interval, paired, smallest_effect, verdict

VALUES = [1.41, 1.44, 1.40, 1.47]


def test_the_interval_is_that_of_students_t():
    found = interval(VALUES)
    expected = stats.ttest_1samp(VALUES, 0.0).confidence_interval(0.95)
    np.testing.assert_allclose(found[:3], [1.43, expected.low, expected.high])
    assert found.sd == pytest.approx(np.std(VALUES, ddof=1))
    # Two values a and b: t(0.975, 1) = tan(0.475 pi), and the standard error is |a - b| / 2.
    two = interval([1.0, 3.0])
    assert two.high - two.mean == pytest.approx(math.tan(0.475 * math.pi))
    assert interval([2.0, 2.0, 2.0]) == (2.0, 2.0, 2.0, 0.0, 3)


def test_one_value_has_no_interval():
    assert interval([1.5]) == Interval(1.5, None, None, None, 1)
    assert smallest_effect(interval([1.5])) is None


def test_differences_are_paired_by_seed():
    lower = {0: 1.0, 1: 2.0, 2: 3.0, 5: 9.0}
    higher = {2: 3.1, 0: 1.1, 1: 2.4, 7: 0.0}
    found = paired(lower, higher)
    expected = stats.ttest_rel([1.1, 2.4, 3.1], [1.0, 2.0, 3.0]).confidence_interval(0.95)
    np.testing.assert_allclose(found[:3], [0.2, expected.low, expected.high])
    assert found.n == 3
    assert paired({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize("n", [2, 3, 10])
def test_the_smallest_effect_is_found_in_four_of_five_experiments(n):
    """Simulated, with a known standard deviation of 1 in place of the sample's."""
    effect = smallest_effect(Interval(0.0, 0.0, 0.0, 1.0, n))
    samples = np.random.default_rng(0).normal(effect, 1.0, (20_000, n))
    found = stats.ttest_1samp(samples, 0.0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.01)


def test_the_smallest_effect_of_many_pairs():
    """(z(0.975) + z(0.8)) standard errors."""
    effect = smallest_effect(Interval(0.0, 0.0, 0.0, 3.0, 10_000))
    assert effect == pytest.approx((1.959964 + 0.841621) * 3 / 100, rel=1e-3)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.001, 0.03, "reproduced"),
        (-0.001, 0.03, "inconclusive"),
        (-0.03, -0.001, "not at this scale"),
        (-0.03, 0.004, "not at this scale"),
        (0.001, 0.004, "not at this scale"),  # there is an effect, but it would not matter
        (-0.03, 0.005, "inconclusive"),
        (0.0, 0.03, "inconclusive"),
        (None, None, "inconclusive"),
    ],
)
def test_verdicts(low, high, expected):
    assert verdict(Interval(0.0, low, high, 0.01, 3), least=0.005) == expected


def test_fewer_than_three_pairs_are_inconclusive():
    assert verdict(None, least=0.005) == "inconclusive"
    for n, expected in ((2, "inconclusive"), (3, "reproduced")):
        assert verdict(Interval(0.02, 0.01, 0.03, 0.01, n), least=0.005) == expected
