"""What attention is after compilation: its memory, with remat, and inside loops."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels import cross_attention, window_attention
from tests.kernels.cases import Shape, documents, inputs, operation


def compile_with_gradients(attend, N: int, H: int):
    x = jax.ShapeDtypeStruct((1, N, 1, H), jnp.float32)

    def run(q, k, v, d_out):
        out, vjp = jax.vjp(attend, q, k, v)
        return out, vjp(d_out)

    return jax.jit(run).lower(x, x, x, x).compile()


def largest_array(compiled) -> int:
    """How many elements the largest array of the compiled program has."""
    shapes = re.findall(r"\b(?:f32|pred|s32)\[([\d,]+)\]", compiled.as_text())
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


@pytest.mark.parametrize("window", [None, 64])
def test_no_array_of_n_squared(window):
    N, H = 4096, 8
    shape = Shape(N, N, window)
    dense = compile_with_gradients(operation(shape, implementation="reference"), N, H)
    assert largest_array(dense) >= N * N  # the measure sees one where there is one
    blocked = compile_with_gradients(operation(shape, implementation="xla"), N, H)
    assert largest_array(blocked) <= N * max(H, 128)
    temp = [x.memory_analysis().temp_size_in_bytes for x in (blocked, dense)]
    assert temp[0] * 20 < temp[1]


def loops(function, *args) -> int:
    """How many loops the program has before XLA compiles it. On a CPU, XLA may merge the loop that
    remat repeats with the first one."""
    return str(jax.make_jaxpr(function)(*args)).count("scan[")


def test_remat_policy_keeps_the_output_and_does_not_run_attention_again(small_blocks):
    q, k, v, *_ = inputs(Shape(32, 32))

    def gradient(policy):
        def loss(q, k, v):
            return jnp.sin(window_attention(q, k, v, window=6)).sum()

        return jax.value_and_grad(jax.checkpoint(loss, policy=policy), (0, 1, 2))

    keep = jax.checkpoint_policies.save_only_these_names("attn_out", "attn_lse")
    assert loops(gradient(keep), q, k, v) == 2  # forward and backward
    assert loops(gradient(jax.checkpoint_policies.nothing_saveable), q, k, v) == 3


def test_inside_scan_and_checkpoint(small_blocks):
    q, k, v, *_ = inputs(Shape(21, 21))
    segments = documents(Shape(21, 21), 7, 7).q

    def layers(attend):
        def layer(x, _):
            return x + attend(x, k, v), None

        return lambda x: (lax.scan(jax.checkpoint(layer), x, None, length=3)[0] ** 2).sum()

    def attend(implementation):
        return lambda x, k, v: cross_attention(
            window_attention(
                x, k, v, window=5, segment_ids=segments, implementation=implementation
            ),
            k,
            v,
            implementation=implementation,
        )

    want, got = (jax.jit(jax.grad(layers(attend(x))))(q) for x in ("reference", "xla"))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
