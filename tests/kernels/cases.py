"""Random inputs, the comparison and the marks that the kernel tests share."""

import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import MASKED, SegmentIds, cross_attention, interpret, window_attention
from pallas_kernels.attention import hopper

# For tests that need the interpreter of Mosaic GPU kernels.
interpreted = pytest.mark.skipif(
    not hasattr(hopper.plgpu, "InterpretGPUParams"),
    reason=f"jax {jax.__version__} has no interpreter for Mosaic GPU kernels; 0.11 has.",
)
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


class Shape(NamedTuple):
    N: int
    S: int
    window: int | None = None
    q_offset: int = 0
    Q: int = 2
    K: int = 2
    H: int = 4
    B: int = 2


def inputs(shape: Shape, dtype=jnp.float32):
    """q, k, v and the cotangents of the output and of lse."""
    B, N, S, Q, K, H = (getattr(shape, x) for x in ("B", "N", "S", "Q", "K", "H"))
    sizes = [(B, N, Q, H), (B, S, K, H), (B, S, K, H), (B, N, Q, H), (B, N, Q)]
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal(size), jnp.float32) for size in sizes]
    return [x.astype(dtype) for x in arrays[:4]] + arrays[4:]


def assert_equal_leaves(got, want):
    """An output, or an output and its lse."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


def operation(shape: Shape, **options) -> Callable:
    options = {"q_offset": shape.q_offset, **options}
    if shape.window is None:
        return functools.partial(cross_attention, **options)
    return functools.partial(window_attention, window=shape.window, **options)


def outputs_and_gradients(attend: Callable, args):
    """out, lse, dq, dk, dv; both results are differentiated."""
    q, k, v, d_out, d_lse = args

    def run(q, k, v, d_out, d_lse):
        (out, lse), vjp = jax.vjp(lambda *x: attend(*x, return_lse=True), q, k, v)
        return out, lse, *vjp((d_out, d_lse))

    names = ("out", "lse", "dq", "dk", "dv")
    return dict(zip(names, jax.jit(run)(q, k, v, d_out, d_lse), strict=True))


def assert_matches_reference(shape: Shape, implementation: str = "xla", **options):
    """Device kernels run in Pallas's interpreter. Returns out, lse, dq, dk, dv."""
    args = inputs(shape)
    want = outputs_and_gradients(operation(shape, implementation="reference", **options), args)
    with interpret():
        got = outputs_and_gradients(
            operation(shape, implementation=implementation, **options), args
        )
    for name, x in want.items():
        assert np.isfinite(got[name]).all(), name
        np.testing.assert_allclose(got[name], x, atol=2e-5, rtol=2e-5, err_msg=name)
    return got


def documents(shape: Shape, q_length: int, kv_length: int) -> SegmentIds:
    """Documents of constant length, which begin at other positions in each row. If the two lengths
    differ, some queries belong to a document without a key that they may see."""
    shift = jnp.arange(shape.B)[:, None]
    q_pos, k_pos = shape.q_offset + jnp.arange(shape.N)[None], jnp.arange(shape.S)[None]
    return SegmentIds((q_pos + shift) // q_length, (k_pos + shift) // kv_length)


def empty_rows(lse) -> int:
    return int((np.asarray(lse) == np.float32(MASKED)).sum())
