"""A decode step is the last row of the full operation."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    MASKED,
    cross_attention,
    decode_cross,
    decode_window,
    join,
    window_attention,
)
from pallas_kernels.attention.join import join_splits
from tests.kernels.cases import Shape, inputs

W = 8


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("length", [1, 5, W, W + 1, 21])
def test_decode_window_is_the_last_row(implementation, length):
    """Position p is in slot p mod W. So the keys of a ring are not in order, and at first some
    slots are empty."""
    q, k, v, *_ = inputs(Shape(24, 24, Q=4))
    slots = [p for p in range(length) if p >= length - W]
    ring = {x: jnp.full((2, W, 2, 4), 1e4) for x in "kv"}  # garbage in the slots not yet written
    for p in slots:
        ring["k"] = ring["k"].at[:, p % W].set(k[:, p])
        ring["v"] = ring["v"].at[:, p % W].set(v[:, p])
    got = decode_window(
        q[:, length - 1],
        ring["k"],
        ring["v"],
        jnp.full(2, length),
        implementation=implementation,
    )
    want = window_attention(q, k, v, window=W, implementation="reference")[:, length - 1]
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_decode_cross_is_the_last_row(implementation):
    q, k, v, *_ = inputs(Shape(24, 24, Q=4))
    want = cross_attention(q, k, v, implementation="reference")
    got = decode_cross(
        jnp.stack([q[0, 6], q[1, 23]]), k, v, jnp.array([7, 24]), implementation=implementation
    )
    np.testing.assert_allclose(got, jnp.stack([want[0, 6], want[1, 23]]), atol=1e-5)


def test_decode_over_many_chunks_of_keys():
    """Chunks have 512 keys. The last one is moved back, so it overlaps with the one before. Each
    row ends in another chunk."""
    q, k, v, *_ = inputs(Shape(1, 1300, Q=6, K=3, B=5))
    lengths = jnp.array([1, 512, 513, 1299, 1300])
    want = decode_cross(q[:, 0], k, v, lengths, implementation="reference")
    got = decode_cross(q[:, 0], k, v, lengths, implementation="xla")
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_parts_of_a_cache_join(implementation):
    """By their lse. The first row has no key, and the second one has none in the second part."""
    q, k, v, *_ = inputs(Shape(1, 24, Q=4, B=3))
    lengths, half = jnp.array([0, 9, 20]), 12
    how = {"return_lse": True, "implementation": implementation}
    whole = decode_cross(q[:, 0], k, v, lengths, **how)
    first = decode_cross(q[:, 0], k[:, :half], v[:, :half], lengths, **how)
    second = decode_cross(q[:, 0], k[:, half:], v[:, half:], lengths - half, **how)
    got = join(first, second)
    np.testing.assert_allclose(got[0], whole[0], atol=1e-5)
    np.testing.assert_allclose(got[1], whole[1], rtol=1e-5)
    _, lse = cross_attention(
        *(q, k, v), q_offset=24, kv_lengths=lengths, return_lse=True, implementation="reference"
    )
    np.testing.assert_allclose(whole[1], lse[:, 0], rtol=1e-5)


def test_splits_of_one_kernel_join():
    """With lse in base 2, as kernels return it. The last row sees nothing."""
    rng = np.random.default_rng(0)
    scores, values = rng.normal(size=(2, 3, 5)), rng.normal(size=(2, 3, 5, 4))
    weights = np.exp(scores)
    total = weights.sum(-1)
    out = np.einsum("bsk,bskh->bsh", weights, values) / total[..., None]
    lse2 = np.log2(total)
    out, lse2 = np.append(out, 0 * out[:1], 0), np.append(lse2, np.full((1, 3), MASKED), 0)
    got, lse = join_splits(jnp.asarray(out), jnp.asarray(lse2), axis=1)
    want = np.einsum("bsk,bskh->bh", weights, values) / total.sum(1)[:, None]
    np.testing.assert_allclose(got, np.append(want, np.zeros((1, 4)), 0), atol=1e-6)
    np.testing.assert_allclose(lse, np.append(np.log(total.sum(1)), np.float32(MASKED)), rtol=1e-6)


def test_xla_reads_no_further_than_the_longest_row():
    q, k, v, *_ = inputs(Shape(140, 1300, Q=2, K=1, B=2, q_offset=1300))
    lengths = jnp.array([100, 200])
    beyond = (jnp.arange(1300) >= 512)[:, None, None]
    k, v = (jnp.where(beyond, jnp.nan, x) for x in (k, v))
    assert jnp.isfinite(decode_cross(q[:, 0], k, v, lengths, implementation="xla")).all()
    chunk = {"q_offset": 1300, "kv_lengths": lengths, "implementation": "xla"}
    assert jnp.isfinite(cross_attention(q, k, v, **chunk)).all()


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("decode", [decode_window, decode_cross])
def test_a_row_of_length_zero_gives_zero(implementation, decode):
    q, k, v, *_ = inputs(Shape(1, W, Q=4))
    got = decode(q[:, 0], k, v, jnp.array([0, 3]), implementation=implementation)
    assert not got[0].any()
    assert got[1].all()


def test_decode_bf16():
    """The error is at most 1.5 times that of the bf16 reference; both are against fp32."""
    q, k, v = inputs(Shape(1, 64, Q=4, H=32))[:3]
    lengths = jnp.array([64, 50])
    exact = decode_cross(q[:, 0], k, v, lengths, implementation="reference")
    error = {}
    for name in ("reference", "xla"):
        q16, k16, v16 = (x.astype(jnp.bfloat16) for x in (q, k, v))
        got = decode_cross(q16[:, 0], k16, v16, lengths, implementation=name)
        error[name] = float(jnp.sqrt(jnp.mean((got.astype(jnp.float32) - exact) ** 2)))
    assert error["xla"] <= 1.5 * error["reference"], error
