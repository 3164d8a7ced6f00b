"""Prefill and decode of a whole model on the accelerators' kernels, in their interpreters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import interpret
from tests import tiny
from tests.kernels.cases import interpreted, needs_triton
from yocou_jax.inference import decode_step, prepare, score
from yocou_jax.model import logits as forward

# On a GPU, a transformer's layers call the same kernels as cross layers. Only the newest Python has
# these interpreters, and CI does not run slow tests there.
CASES = [
    ("pallas_tpu", "yoco_u"),
    pytest.param("pallas_tpu", "transformer", marks=pytest.mark.slow),
    pytest.param("pallas_gpu", "yoco_u", marks=interpreted),
    pytest.param("triton", "yoco_u", marks=needs_triton),
    pytest.param("triton", "transformer", marks=needs_triton),
]


@pytest.mark.parametrize(("implementation", "name"), CASES)
def test_a_ragged_prefill_and_decode_are_the_forward_pass_in_plain_xla(implementation, name):
    """With rings, a cache that is not full before a chunk of queries, and a length for each row."""
    plain = tiny.model(name, num_layers=2, num_loops=2 if name == "yoco_u" else None)
    kernels = tiny.compute(attention=implementation)
    tokens, lengths, rows = np.asarray(tiny.tokens(2, 16)), np.array([13, 6]), np.arange(2)
    full = jax.jit(forward, static_argnames=("config", "compute"))
    want = np.asarray(full(tiny.params(plain), plain, jnp.asarray(tokens), tiny.compute()))
    with interpret():
        model = prepare(tiny.params(plain), plain, kernels)
        cache, logits, found, _ = score(model, tokens[:, :13], lengths, capacity=20, chunk=7)
        for row, length in enumerate(lengths):
            logps = tiny.logprobs(want, tokens)[row, : length - 1]
            tiny.assert_close(found[row, 1:length], logps)
        tiny.assert_close(logits, want[rows, lengths - 1])
        for step in range(2):
            cache, logits = decode_step(model, cache, tokens[rows, lengths + step])
            tiny.assert_close(logits, want[rows, lengths + step])
