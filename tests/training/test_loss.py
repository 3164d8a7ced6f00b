"""Compares the chunked cross-entropy with the plain one, and checks its memory."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests import tiny
from yocou_jax.config import MeshConfig
from yocou_jax.sharding import make_mesh
from yocou_jax.training import loss
from yocou_jax.training.loss import cross_entropy, divergence, token_scores


def plain(hidden, head, targets, weights, z_loss):
    """(the sum to differentiate, sum nll, sum z), with all logits at once."""
    logits = (hidden @ head).astype(jnp.float32)
    log_p = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0] * weights
    z = jax.nn.logsumexp(logits, -1) ** 2 * weights
    return nll.sum() + z_loss * z.sum(), (nll.sum(), z.sum())


def example(batch, length, vocab, width=4, dtype=jnp.float32):
    rng = np.random.default_rng(length)
    hidden = jnp.asarray(rng.normal(size=(batch, length, width)), dtype)
    head = jnp.asarray(rng.normal(size=(width, vocab)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, vocab, (batch, length)), jnp.int32)
    weights = jnp.asarray(rng.integers(0, 3, (batch, length)), jnp.float32)
    return hidden, head, targets, weights


def split(rows: int, columns: int):
    """Inside, a mesh splits sequences and their positions."""
    mesh = MeshConfig(data=rows, fsdp=1, tensor=1, context=columns)
    return jax.set_mesh(make_mesh(mesh, jax.devices()[: rows * columns]))


# A vocabulary of 11 makes one chunk, of 2^20 several. They do not divide 7 and 5 positions.
@pytest.mark.parametrize(
    ("vocab", "length", "z_loss", "rows", "columns"),
    [
        (11, 1, 0.0, 1, 1),
        (11, 7, 0.3, 2, 1),
        (11, 12, 0.0, 3, 1),  # four sequences are not split three ways
        (11, 12, 0.3, 2, 3),
        (11, 14, 0.0, 1, 4),  # positions that cannot be split evenly
        (2**20, 1, 0.0, 1, 1),
        (2**20, 7, 0.0, 1, 1),
        (2**20, 5, 0.3, 2, 1),
        (2**20, 12, 0.3, 1, 2),
    ],
)
def test_values_and_gradients_are_those_of_log_softmax(vocab, length, z_loss, rows, columns):
    hidden, head, targets, weights = example(4, length, vocab)

    def chunked(hidden, head):
        total, sums = cross_entropy(hidden, head, targets, weights, z_loss)
        return 1.7 * total, (sums.nll, sums.z, sums.weight)  # a cotangent other than 1

    def expected(hidden, head):
        total, (nll, z) = plain(hidden, head, targets, weights, z_loss)
        return 1.7 * total, (nll, z, weights.sum())

    with split(rows, columns):
        got, wanted = (
            jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(hidden, head)
            for f in (chunked, expected)
        )
        # Without a gradient, other code runs.
        total, sums = jax.jit(functools.partial(cross_entropy, z_loss=z_loss))(
            hidden, head, targets, weights
        )
    tiny.assert_close(got, wanted, 2e-5)
    tiny.assert_close((1.7 * total, (sums.nll, sums.z, sums.weight)), wanted[0], 2e-5)


def test_without_weights_every_target_counts_once():
    hidden, head, targets, _ = example(3, 5, 11)
    total, sums = cross_entropy(hidden, head, targets)
    wanted, _ = plain(hidden, head, targets, jnp.ones((3, 5)), 0.0)
    np.testing.assert_allclose(total, wanted, rtol=1e-5)
    np.testing.assert_allclose(sums.nll, wanted, rtol=1e-5)
    assert sums.weight == 15


def test_a_target_of_weight_zero_has_no_influence():
    hidden, head, targets, weights = example(2, 6, 11)
    hidden = hidden.at[0, 2].set(1e4)
    weights = weights.at[0, 2].set(0.0)

    def total(hidden, targets):
        return cross_entropy(hidden, head, targets, weights, 0.1)[0]

    slope = jax.grad(total)(hidden, targets)
    assert (np.asarray(slope[0, 2]) == 0).all()
    other = targets.at[0, 2].add(1) % 11
    np.testing.assert_array_equal(total(hidden, targets), total(hidden, other))


def test_large_logits_stay_finite():
    hidden, head, targets, weights = example(2, 6, 11)
    value, slope = jax.value_and_grad(lambda h: cross_entropy(h, head, targets, weights)[0])(
        1e4 * hidden
    )
    assert np.isfinite(value)
    assert np.isfinite(slope).all()


def test_bfloat16_activations_give_float32_sums_and_head_gradients():
    hidden, head, targets, weights = example(2, 8, 64, width=32, dtype=jnp.bfloat16)

    def total(hidden, head):
        return cross_entropy(hidden, head, targets, weights)[0]

    value, (d_hidden, d_head) = jax.value_and_grad(total, argnums=(0, 1))(hidden, head)
    assert (value.dtype, d_hidden.dtype, d_head.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    wanted = plain(hidden.astype(jnp.float32), head, targets, weights, 0.0)[0]
    np.testing.assert_allclose(value, wanted, rtol=0.02)


def _largest_array(f, *args) -> int:
    """Elements of the largest array in the compiled program."""
    text = jax.jit(f).lower(*args).compile().as_text()
    shapes = re.findall(r"\b(?:f32|bf16|pred|s32)\[([\d,]+)\]", text)
    return max(math.prod(map(int, s.split(","))) for s in shapes)


def test_all_logits_never_exist_at_once():
    b, n, d, v = 4, 1024, 8, 32768
    hidden = jax.ShapeDtypeStruct((b, n, d), jnp.float32)
    head = jax.ShapeDtypeStruct((d, v), jnp.float32)
    targets = jax.ShapeDtypeStruct((b, n), jnp.int32)

    def chunked(hidden, head, targets):
        return cross_entropy(hidden, head, targets, None, 0.1)[0]

    def at_once(hidden, head, targets):
        return plain(hidden, head, targets, 1.0, 0.1)[0]

    def grad(f):
        return jax.value_and_grad(f, argnums=(0, 1))

    assert _largest_array(grad(at_once), hidden, head, targets) >= b * n * v
    assert _largest_array(grad(chunked), hidden, head, targets) <= b * n * v / 16
    assert _largest_array(chunked, hidden, head, targets) <= b * n * v / 16


def test_chunks_count_the_logits_of_one_device(monkeypatch):
    """Two ways for rows, four for the vocabulary. A device has 2 x 64 rows of 256 / 4 logits, and
    so 8 chunks of 1024, in place of the 64 that one device would need."""
    monkeypatch.setattr(loss, "CHUNK_LOGITS", {"cpu": 1024})
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=4))
    rows, columns = NamedSharding(mesh, P("data")), NamedSharding(mesh, P(None, "tensor"))
    hidden = jax.ShapeDtypeStruct((4, 64, 4), jnp.float32, sharding=rows)
    head = jax.ShapeDtypeStruct((4, 256), jnp.float32, sharding=columns)
    targets = jax.ShapeDtypeStruct((4, 64), jnp.int32, sharding=rows)

    def total(hidden, head, targets):
        return cross_entropy(hidden, head, targets)[0]

    assert loss.Split.of(hidden.shape).num_chunks(256) == 64
    with jax.set_mesh(mesh):
        assert loss.Split.of(hidden.shape).num_chunks(256) == 8
        assert (
            loss.Split.of(hidden.shape).num_chunks(254) == 32
        )  # it does not divide, so it is not split
        assert _largest_array(jax.value_and_grad(total, (0, 1)), hidden, head, targets) == 1024


def test_the_head_gradient_crosses_devices_once_and_not_with_every_chunk(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", {"cpu": 64})
    mesh = make_mesh(MeshConfig(data=8, fsdp=1, tensor=1))
    rows, everywhere = (NamedSharding(mesh, spec) for spec in (P("data"), P()))
    hidden, head, targets, _ = example(8, 16, 32)

    def total(hidden, head):
        return cross_entropy(hidden, head, targets)[0]

    step = jax.jit(
        jax.grad(total, argnums=(0, 1)),
        in_shardings=(rows, everywhere),
        out_shardings=(rows, everywhere),
    )
    with jax.set_mesh(mesh):
        text = step.lower(hidden, head).compile().as_text()
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    assert bodies, "there is no loop: the chunks are not what this test thinks they are"
    computations = re.findall(r"^%?([\w.\-]+) \(.*?^}", text, re.S | re.M)
    assert bodies <= set(computations)
    for name in bodies:
        body = re.search(rf"^%?{re.escape(name)} \(.*?^}}", text, re.S | re.M).group()
        assert "all-reduce" not in body
    assert "all-reduce" in text
    with jax.set_mesh(mesh):
        found = step(hidden, head)
    tiny.assert_close(found, jax.grad(total, argnums=(0, 1))(hidden, head), 2e-5)


@pytest.mark.parametrize(
    ("chunk_logits", "length", "rows", "columns"),
    [(2**22, 12, 3, 1), (64, 7, 2, 1), (64, 18, 2, 3)],
)
def test_scores_of_single_tokens_and_the_divergence(
    chunk_logits, length, rows, columns, monkeypatch
):
    """In one chunk, and in chunks that do not divide the positions."""
    monkeypatch.setitem(loss.CHUNK_LOGITS, "cpu", chunk_logits)
    hidden, head, targets, _ = example(4, length, 11)
    logits = hidden @ head
    targets = targets.at[:, ::2].set(logits.argmax(-1)[:, ::2])  # the others are hardly ever best
    log_p = jax.nn.log_softmax(logits)
    wanted = -jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    with split(rows, columns):
        nll, best = jax.jit(token_scores)(hidden, head, targets)
    np.testing.assert_allclose(nll, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(best, logits.argmax(-1) == targets)
    # The same chunks for the divergence of two predictions; padded positions add nothing.
    other, weights = hidden[::-1] + 1, example(4, length, 11)[3]
    log_q = jax.nn.log_softmax(other @ head)
    kl = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
    with split(rows, columns):
        found = jax.jit(divergence)(hidden, other, head, weights)
    np.testing.assert_allclose(found, (weights * kl).sum(), rtol=1e-5)
