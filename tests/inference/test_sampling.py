"""Drawn tokens follow the distribution of the settings, which this file computes again."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from yocou_jax.errors import UserError
from yocou_jax.inference.sampling import (
    Sampling,
    check,
    filter_logits,
    needs_seen,
    needs_sort,
    sample,
)

V, DRAWS = 16, 20_000
LOGITS = np.random.default_rng(0).normal(size=V) * 1.5
SEEN = np.arange(V) % 3 == 0  # logits of both signs, with the most likely token
Z_999 = 3.0902  # the 0.999 quantile of the normal distribution


@functools.partial(jax.jit, static_argnames="sort")
def draw(logits, keys, sampling, seen, sort=True):
    return sample(logits, keys, sampling, sort=sort, seen=seen)


@functools.partial(jax.jit, static_argnames="sort")
def filtered(logits, sampling, seen=None, sort=True):
    return filter_logits(jnp.asarray(logits), sampling, sort=sort, seen=seen)


def probabilities(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    """The distribution over tokens in float64, token by token, as in the papers."""
    x = LOGITS.astype(np.float64).copy()
    for token in np.flatnonzero(SEEN):
        x[token] *= repetition_penalty if x[token] < 0 else 1 / repetition_penalty
    p = np.exp(x / temperature)
    p /= p.sum()
    ranking = sorted(range(V), key=lambda token: -p[token])
    if top_k:
        p[ranking[top_k:]] = 0
        p /= p.sum()
    if top_p < 1:
        nucleus, mass = [], 0.0
        for token in ranking:
            if mass >= top_p:
                break
            nucleus.append(token)
            mass += p[token]
        p[[token for token in range(V) if token not in nucleus]] = 0
        p /= p.sum()
    p[p < min_p * p.max()] = 0
    return p / p.sum()


def chi_square(counts, p):
    """(statistic, its 0.999 quantile under p). Infinite if a token of probability 0 was drawn.

    The quantile is the approximation of Wilson and Hilferty: for d degrees of freedom, the cube
    root of (chi-square / d) is nearly normal with mean 1 - 2/(9d) and variance 2/(9d). It is 2.3%
    too large for d = 2, and better for every other d that occurs here.
    """
    expected = p * counts.sum()
    if counts[expected == 0].any():
        return np.inf, 0.0
    # The statistic is chi-square only for cells with enough draws, so rare tokens share one cell.
    rare = expected < 10
    counts, expected = (np.append(a[~rare], a[rare].sum()) for a in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    d = len(counts) - 1
    assert d >= 2
    quantile = d * (1 - 2 / (9 * d) + Z_999 * np.sqrt(2 / (9 * d))) ** 3
    return np.sum((counts - expected) ** 2 / expected), quantile


def test_the_quantile_agrees_with_tables():
    for d, table in ((2, 13.816), (5, 20.515), (10, 29.588), (15, 37.697)):
        _, quantile = chi_square(np.full(d + 1, 1000), np.full(d + 1, 1 / (d + 1)))
        assert abs(quantile / table - 1) < 0.025


@functools.cache
def counts(sampling_fields, seed=0):
    keys = jax.random.split(jax.random.key(seed), DRAWS)
    logits = np.tile(LOGITS.astype(np.float32), (DRAWS, 1))
    sampling = check(Sampling(**dict(sampling_fields)), DRAWS)
    seen = np.tile(SEEN, (DRAWS, 1)) if needs_seen(sampling) else None
    tokens = draw(logits, keys, sampling, seen, sort=needs_sort(sampling))
    return np.bincount(np.asarray(tokens), minlength=V)


CASES = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"top_k": 5},
    {"top_p": 0.75},
    {"min_p": 0.08},
    {"repetition_penalty": 1.4},
    {"top_k": 6, "top_p": 0.8},
    {"temperature": 1.3, "top_k": 9, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.3},
]


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_draws_follow_the_distribution(fields):
    p = probabilities(**fields)
    drawn = counts(tuple(fields.items()))
    assert not drawn[p == 0].any()
    statistic, quantile = chi_square(drawn, p)
    assert statistic < quantile


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_the_filtered_logits_are_the_distribution(fields):
    """To the digits of float32, which the draws cannot show."""
    x = filtered(LOGITS[None].astype(np.float32), Sampling(**fields), SEEN[None])
    expected = probabilities(**fields)
    np.testing.assert_array_equal(np.isneginf(x[0]), expected == 0)
    np.testing.assert_allclose(jax.nn.softmax(x)[0], expected, rtol=1e-5)


def test_the_filtered_logits_for_every_combination_of_settings():
    """Every combination has its own row."""
    values = {
        "temperature": (0.5, 1.0, 2.0),
        "top_k": (0, 4, 9),
        "top_p": (1.0, 0.55, 0.9),
        "min_p": (0.0, 0.1, 0.3),
        "repetition_penalty": (1.0, 1.6),
    }
    rows = list(itertools.product(*values.values()))
    columns = (np.asarray(column) for column in zip(*rows, strict=True))
    sampling = check(Sampling(**dict(zip(values, columns, strict=True))), len(rows))
    tiled = (np.tile(x, (len(rows), 1)) for x in (LOGITS.astype(np.float32), SEEN))
    logits, seen = tiled
    got = jax.nn.softmax(filtered(logits, sampling, seen))
    expected = [probabilities(**dict(zip(values, row, strict=True))) for row in rows]
    np.testing.assert_allclose(got, expected, rtol=1e-5)


WRONG = [
    ({"temperature": 0.6}, {"temperature": 0.63}),
    ({"top_k": 5}, {"top_k": 6}),
    ({"top_k": 5}, {"top_k": 4}),
    ({"top_p": 0.75}, {"top_p": 0.82}),
    ({"min_p": 0.08}, {"min_p": 0.12}),
    ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.3}),
]


@pytest.mark.parametrize(("fields", "other"), WRONG, ids=str)
def test_the_chi_square_notices_a_slightly_wrong_distribution(fields, other):
    statistic, quantile = chi_square(counts(tuple(fields.items())), probabilities(**other))
    assert statistic > quantile


def test_top_p_is_a_share_of_what_top_k_keeps():
    """Half of the probability of 3 tokens is less than half of that of all tokens. So the other
    order would keep more."""
    p = np.array([0.2, 0.17, 0.15, 0.13, 0.12, 0.12, 0.11])
    x = filtered(np.log(p)[None], Sampling(top_k=3, top_p=0.5))
    assert np.isfinite(x[0]).tolist() == [True, True] + [False] * 5
    x = filtered(np.log(p)[None], Sampling(top_p=0.5))
    assert np.isfinite(x[0]).tolist() == [True, True, True] + [False] * 4


def test_the_nucleus_includes_the_token_that_reaches_p_and_is_never_empty():
    p = np.array([0.125, 0.5, 0.25, 0.125])  # exact in binary, so that >= and > differ
    for top_p, kept in (
        (0.5, [1]),
        (0.51, [1, 2]),
        (0.75, [1, 2]),
        (0.76, [0, 1, 2]),
        (1e-45, [1]),
    ):
        x = filtered(np.log2(p)[None] * np.log(2), Sampling(top_p=top_p))
        assert np.flatnonzero(np.isfinite(x[0])).tolist() == kept, top_p


def test_a_long_tail_is_kept_when_top_p_is_off():
    """At the end a float32 sum does not grow any more: a comparison with p = 1 would cut tokens."""
    x = np.full((2, 100_000), -30.0, np.float32)
    x[:, 7] = 0
    out = filtered(x, Sampling(top_k=np.array([0, 2]), top_p=np.array([1.0, 0.5])))
    assert np.isfinite(out).sum(axis=1).tolist() == [100_000, 1]


def test_equal_logits_are_kept_by_lower_index_and_exactly_k():
    x = np.array([[1.0, 3, 2, 3, 2, 2, 0, 2]])
    for k, kept in ((1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (4, [1, 2, 3, 4]), (7, [*range(6), 7])):
        out = filtered(x, Sampling(top_k=k))
        assert np.flatnonzero(np.isfinite(out[0])).tolist() == kept
    flat = filtered(np.array([[0.0, -0.0, 0.0, -0.0]]), Sampling(top_k=2))
    assert np.isfinite(flat[0]).tolist() == [True, True, False, False]
    nucleus = filtered(np.zeros((1, 8)), Sampling(top_p=0.5))
    assert np.flatnonzero(np.isfinite(nucleus[0])).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("k", [0, V, V + 1, 2**31 - 1])
def test_a_top_k_of_everything_keeps_everything(k):
    x = filtered(LOGITS[None], check(Sampling(top_k=k), 1))
    np.testing.assert_array_equal(x, filtered(LOGITS[None], Sampling(), sort=False))
    assert np.isfinite(x).all()


def test_the_penalty_moves_both_signs_down_and_only_seen_tokens():
    x = np.array([[2.0, -2.0, 1.0, -1.0, 2.0]])
    seen = np.array([[True, True, False, False, False]])
    out = filtered(x, Sampling(repetition_penalty=2.0), seen)
    np.testing.assert_allclose(out, [[-1.0, -6.0, -1.0, -3.0, 0.0]], rtol=1e-6)
    # Without `seen` no token gets a penalty.
    np.testing.assert_allclose(filtered(x, Sampling(repetition_penalty=2.0)), x - 2)


def test_masked_logits_are_never_drawn():
    x = LOGITS[None].astype(np.float32).copy()
    x[0, ::2] = -np.inf
    settings = [Sampling(), Sampling(top_k=12), Sampling(top_p=0.99), Sampling(temperature=0.0)]
    for sampling in settings:
        out = np.asarray(filtered(x, sampling))
        assert np.isneginf(out[0, ::2]).all()
        assert np.isfinite(out[0, 1::2]).any()


# --- Greedy ---------------------------------------------------------------------------------------


def rows(n=32, seed=1):
    return np.random.default_rng(seed).normal(size=(n, V)).astype(np.float32)


def keys(n=32, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def test_temperature_0_and_top_1_take_the_argmax():
    x, seen = rows(), rows(seed=2) > 0
    for sampling in (Sampling(temperature=0.0), Sampling(top_k=1), Sampling(temperature=1e-42)):
        np.testing.assert_array_equal(draw(x, keys(), sampling, None), x.argmax(-1))
    for sort in (False, True):
        tokens = draw(x, keys(), Sampling(temperature=0.0, repetition_penalty=2.0), seen, sort)
        penalized = np.where(seen, np.where(x > 0, x / 2, x * 2), x)
        np.testing.assert_array_equal(tokens, penalized.argmax(-1))
        assert (penalized.argmax(-1) != x.argmax(-1)).any()


def test_the_first_of_equal_logits_is_taken():
    x = np.array([[1.0, 2, 2, 0], [0.0, 0, 0, 0]])
    assert draw(x, keys(2), Sampling(temperature=0.0), None).tolist() == [1, 0]


def test_no_temperature_makes_a_nan():
    x = np.array([[1e4, -1e4, 1e4 - 1, -np.inf]] * 6, np.float32)
    temperature = np.array([0.0, 1e-45, 1.2e-38, 1e-30, 1e30, 3e38], np.float32)
    out = np.asarray(filtered(x, check(Sampling(temperature=temperature), 6)))
    assert not np.isnan(out).any()
    assert (out.max(-1) == 0).all()
    np.testing.assert_array_equal(np.isfinite(out).sum(-1)[[0, 1, 4, 5]], [1, 1, 3, 3])


# --- Rows -----------------------------------------------------------------------------------------

MIXED = Sampling(
    temperature=np.array([0.0, 1.0, 0.7, 2.0] * 8),
    top_k=np.array([0, 3, 0, 5] * 8),
    top_p=np.array([1.0, 0.9, 0.5, 1.0] * 8),
    min_p=np.array([0.0, 0.1, 0.0, 0.02] * 8),
    repetition_penalty=np.array([1.0, 1.5, 1.0, 0.8] * 8),
)


def test_a_row_does_not_depend_on_its_batch():
    x, seen, mixed = rows(), rows(seed=2) > 0, check(MIXED, 32)
    together = np.asarray(draw(x, keys(), mixed, seen))
    for i in range(8):
        one = jax.tree.map(lambda field, i=i: field[i : i + 1], mixed)
        assert draw(x[i : i + 1], keys()[i : i + 1], one, seen[i : i + 1])[0] == together[i]
    other = np.random.default_rng(5).permutation(32)
    moved = draw(x[other], keys()[other], jax.tree.map(lambda f: f[other], mixed), seen[other])
    np.testing.assert_array_equal(moved, together[other])


def test_greedy_and_sampled_rows_in_one_batch():
    x = np.repeat(rows(1), 4000, axis=0)
    greedy = np.arange(4000) % 2 == 0
    sampling = check(Sampling(temperature=np.where(greedy, 0.0, 1.0)), 4000)
    tokens = np.asarray(draw(x, keys(4000), sampling, None, sort=False))
    assert (tokens[greedy] == x[0].argmax()).all()
    assert len(set(tokens[~greedy])) > V // 2


def test_a_row_has_the_seed_of_its_key():
    x = np.repeat(rows(1), 64, axis=0)
    seeds = np.arange(64) % 2
    tokens = np.asarray(draw(x, jax.vmap(jax.random.key)(seeds), Sampling(), None))
    assert len(set(tokens[seeds == 0])) == len(set(tokens[seeds == 1])) == 1
    assert len(set(draw(x, keys(64), Sampling(), None).tolist())) > 1


def test_without_a_sort_the_tokens_are_the_same():
    x, sampling = rows(), Sampling(temperature=0.9, min_p=0.05)
    assert not needs_sort(sampling)
    np.testing.assert_array_equal(
        draw(x, keys(), sampling, None, sort=True), draw(x, keys(), sampling, None, sort=False)
    )


def test_new_values_compile_nothing():
    function = jax.jit(sample, static_argnames="sort")
    for fields in CASES:
        function(rows(), keys(), check(Sampling(**fields), 32), sort=True)
    function(rows(), keys(), check(MIXED, 32), sort=True)
    assert function._cache_size() == 1


# --- Settings -------------------------------------------------------------------------------------


def test_check_makes_arrays():
    checked = check(Sampling(temperature=1, top_k=np.uint8(7), top_p=[0.5, 1, 1]), 3)
    assert checked.temperature.tolist() == [1, 1, 1]
    assert checked.top_k.tolist() == [7, 7, 7]
    for field in dataclasses.fields(checked):
        column = getattr(checked, field.name)
        assert column.shape == (3,)
        assert column.dtype == (jnp.int32 if field.name == "top_k" else jnp.float32)
    again = check(checked, 3)
    jax.tree.map(np.testing.assert_array_equal, again, checked)


def test_needs_sort_and_needs_seen():
    assert not needs_sort(Sampling(temperature=0.5, min_p=0.1))
    assert needs_sort(Sampling(top_k=1))
    assert needs_sort(Sampling(top_p=0.9))
    assert needs_sort(check(Sampling(top_p=[1, 1, 0.5]), 3))
    assert not needs_sort(check(Sampling(), 3))
    assert not needs_seen(check(Sampling(), 3))
    assert needs_seen(check(Sampling(repetition_penalty=[1, 1.2]), 2))


IMPOSSIBLE = [
    ({"temperature": -0.5}, "sampling.temperature=-0.5 must be finite and at least 0 "),
    ({"temperature": float("nan")}, "sampling.temperature=nan must be finite and at least 0 "),
    ({"temperature": float("inf")}, "sampling.temperature=inf must be finite and at least 0 "),
    ({"temperature": 1e39}, "sampling.temperature=1e+39 must be finite and at least 0 "),
    ({"temperature": [1.0, -1.0, 1.0]}, "sampling.temperature[1]=-1.0 must be finite and"),
    ({"temperature": "hot"}, "sampling.temperature='hot' must be a number, or an array"),
    ({"temperature": None}, "sampling.temperature=None must be a number, or an array"),
    ({"temperature": True}, "sampling.temperature=True must be a number, or an array"),
    ({"temperature": [[1.0], [1.0, 2.0]]}, "must be a number, or an array of one for each row."),
    ({"temperature": [1.0, 1.0]}, "sampling.temperature has the shape (2,), but must be one"),
    ({"temperature": [[1.0, 1.0, 1.0]]}, "has the shape (1, 3), but must be one number or one for"),
    ({"top_k": -1}, "sampling.top_k=-1 must be at least 0 "),
    ({"top_k": -(2**40)}, "sampling.top_k=-1099511627776 must be at least 0 "),
    ({"top_k": 5.0}, "sampling.top_k=5.0 must be a whole number"),
    ({"top_k": [1, 2]}, "sampling.top_k has the shape (2,), but must be one whole number"),
    ({"top_p": 0.0}, "sampling.top_p=0.0 must be in (0, 1] "),
    ({"top_p": 1.01}, "sampling.top_p=1.01 must be in (0, 1] "),
    ({"top_p": float("nan")}, "sampling.top_p=nan must be in (0, 1] "),
    ({"min_p": -0.1}, "sampling.min_p=-0.1 must be in [0, 1) "),
    ({"min_p": 1.0}, "sampling.min_p=1.0 must be in [0, 1) "),
    ({"repetition_penalty": 0.0}, "sampling.repetition_penalty=0.0 must be finite and above 0 "),
    ({"repetition_penalty": -2}, "sampling.repetition_penalty=-2 must be finite and above 0 "),
    ({"repetition_penalty": float("inf")}, "sampling.repetition_penalty=inf must be finite"),
]


@pytest.mark.parametrize(("fields", "sentence"), IMPOSSIBLE, ids=[str(f) for f, _ in IMPOSSIBLE])
def test_an_impossible_value_is_refused_in_a_sentence(fields, sentence):
    with pytest.raises(UserError) as error:
        check(Sampling(**fields), 3)
    assert sentence in str(error.value)
    assert str(error.value).endswith(".")
