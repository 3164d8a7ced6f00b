"""Intervals against scipy's own tests and closed forms, and verdicts by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from yocou_jax.evaluation.statistics import (
    Interval,
    all_equal,
    clustered,
    interval,
    paired,
    smallest_effect,
    verdict,
    wilson,
)

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
    mean = 0.0 if low is None else (low + high) / 2
    assert verdict(Interval(mean, low, high, 0.01, 3), least=0.005) == expected


def test_a_mean_that_would_not_matter_is_not_reproduced():
    """Its interval has differences that would matter, so it is not "not at this scale" either."""
    for mean, expected in ((0.0049, "inconclusive"), (0.005, "reproduced")):
        assert verdict(Interval(mean, 0.001, 0.009, 0.01, 3), least=0.005) == expected


def test_differences_that_are_equal_up_to_rounding_are_inconclusive():
    equal = interval([0.3, 0.1 + 0.2, 0.3])
    assert equal.sd > 0
    assert all_equal(equal)
    assert verdict(equal, least=0.005) == "inconclusive"
    assert not all_equal(interval([0.3, 0.30001, 0.3]))
    assert not all_equal(interval([0.3]))


def test_fewer_than_three_pairs_are_inconclusive():
    assert verdict(None, least=0.005) == "inconclusive"
    for n, expected in ((2, "inconclusive"), (3, "reproduced")):
        assert verdict(Interval(0.02, 0.01, 0.03, 0.01, n), least=0.005) == expected


def test_the_interval_of_wilson():
    """The limits solve (share - p)^2 = z^2 p (1 - p) / n, whose solutions they are."""
    for right, samples in ((0, 20), (7, 20), (20, 20), (1, 1)):
        for p in wilson(right, samples):
            distance = (right / samples - p) ** 2
            assert distance == pytest.approx(1.959964**2 * p * (1 - p) / samples, abs=1e-7)
    low, high = wilson(7, 20)
    assert low < 7 / 20 < high
    assert wilson(0, 0) == (0, 1)


def test_answers_of_one_text_are_not_independent():
    """40 texts with 25 equal answers are 40 samples (39 and Student's t, to be exact). Independent
    answers are as many samples as there are answers, or fewer by chance."""
    rng = np.random.default_rng(0)
    texts, right = np.repeat(np.arange(40), 25), np.repeat(np.arange(40) % 4 == 0, 25)
    order = rng.permutation(1000)
    limit = float(stats.t.ppf(0.975, 39))
    assert clustered(right[order], texts[order]) == pytest.approx(wilson(39 / 4, 39, limit))
    low, high = clustered(rng.random(1000) < 0.25, texts)
    exact = wilson(250, 1000)
    assert 0.8 < (high - low) / (exact[1] - exact[0]) < 1.4
    assert clustered(np.ones(1000, bool), texts) == wilson(40, 40, limit)
    assert clustered(np.ones(3, bool), np.zeros(3, int)) == (0, 1)


def test_the_interval_of_clusters_covers_the_share():
    """Texts have 1 to 20 answers, and chances of their own with the mean 0.8."""
    rng, covered, independent = np.random.default_rng(0), 0, 0
    for _ in range(400):
        texts = np.repeat(np.arange(50), rng.integers(1, 21, 50))
        right = rng.random(len(texts)) < rng.beta(2, 0.5, 50)[texts]
        low, high = clustered(right, texts)
        covered += low < 0.8 < high
        low, high = wilson(int(right.sum()), len(right))
        independent += low < 0.8 < high
    assert covered / 400 == pytest.approx(0.95, abs=0.03)
    assert independent / 400 < 0.7
