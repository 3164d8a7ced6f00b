"""The Triton kernels in Triton's interpreter, compared with the reference, and the sentences for
calls that they cannot run. Without Triton, which requirements-gpu.txt installs, only the sentences
are tested."""

import functools
import importlib.metadata
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

import pallas_kernels
from pallas_kernels import (
    MASKED,
    api,
    choose_implementation,
    cross_attention,
    decode_cross,
    decode_window,
    window_attention,
)
from pallas_kernels.attention import triton
from pallas_kernels.attention.blocks import TritonBlocks
from pallas_kernels.device import Device
from tests.kernels.cases import (
    Shape,
    assert_equal_leaves,
    assert_matches_reference,
    documents,
    empty_rows,
    inputs,
    needs_triton,
    operation,
    outputs_and_gradients,
)

A100 = Device("gpu", "NVIDIA A100-SXM4-80GB")


# --- Where it cannot run --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        ({"device": Device("cpu", "cpu")}, "needs an NVIDIA GPU; this computation is for cpu"),
        ({"device": Device("gpu", "Radeon")}, "known compute capability; Radeon is not in"),
        ({"device": Device("gpu", "Tesla V100")}, r"8.0 \(A100\) or newer; Tesla V100 has 7.0"),
        ({"q_shape": (1, 8, 2, 300)}, "heads of width 64, 128, 256; got 300"),
        ({"dtype": jnp.float32}, "take bfloat16 or float16; got float32"),
    ],
)
def test_what_it_cannot_do_is_said_in_a_sentence(facts, sentence):
    for name in api.OPERATIONS:
        with pytest.raises(ValueError, match=sentence) as error:
            choose_implementation(name, implementation="triton", **{"device": A100, **facts})
        assert str(error.value).endswith(".")


@pytest.fixture
def fresh():
    """Before and after the test, triton.py forgets which packages it has found."""
    found = triton._missing_triton, triton._misfit
    for function in found:
        function.cache_clear()
    yield
    for function in found:
        function.cache_clear()


def _refused(match: str):
    with pytest.raises(ValueError, match=match):
        choose_implementation("cross_attention", implementation="triton", device=A100)
    assert choose_implementation("cross_attention", device=A100).implementation == "xla"


def test_without_triton_auto_takes_the_next(fresh, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setitem(sys.modules, "triton.language", None)
    _refused("Triton cannot be imported .*requirements-gpu.txt")
    with pallas_kernels.interpret(), pytest.raises(ValueError, match="Triton cannot be imported"):
        cross_attention(*[jnp.ones((1, 4, 1, 4))] * 3, implementation="triton")


def test_a_jax_triton_that_does_not_fit_this_jax_is_skipped(fresh, monkeypatch):
    def fails(*args, **kwargs):
        raise TypeError("_dce_rule() takes 2 positional arguments but 3 were given")

    for name in ("triton", "triton.language", "jax_triton"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.4.1")
    monkeypatch.setattr(triton, "_on_gpu", fails)
    _refused(
        r"jax-triton 0.4.1 and triton .* do not work with jax .* \(TypeError: _dce_rule.* given\)"
    )


ASKED_FOR = """
import sys

class Recorder:
    asked = set()

    def find_spec(self, name, path=None, target=None):
        self.asked.add(name.split(".")[0])

sys.meta_path.insert(0, Recorder())
from pallas_kernels import choose_implementation
choose_implementation("cross_attention")
print("asked for:", *sorted(Recorder.asked & {"jax", "triton", "jax_triton"}))
"""


def test_nothing_imports_triton_before_it_is_needed():
    """Nothing even tries to import it, installed or not. To say that a CPU is not an NVIDIA GPU,
    triton.py needs no Triton."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", ASKED_FOR], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "asked for: jax\n", done.stderr[-2000:]


# --- Values and gradients -------------------------------------------------------------------------


@pytest.fixture
def small_blocks():
    """So small that few positions are enough for both edges of a window and blocks between them."""
    with pallas_kernels.block_sizes(triton_blocks=lambda *_: TritonBlocks(16, 8, 1, 1)):
        yield


def run(shape: Shape, args, **options):
    with pallas_kernels.interpret():
        return outputs_and_gradients(operation(shape, implementation="triton", **options), args)


matches_reference = functools.partial(assert_matches_reference, implementation="triton")


SHAPES = {
    "full, odd": Shape(37, 37, B=1),
    "full, whole blocks, three heads per group": Shape(48, 48, Q=3, K=1, B=1),
    "full, late queries": Shape(13, 40, q_offset=27, Q=4),
    "full, keys after the last query": Shape(9, 40, q_offset=10, B=1),
    "full, more queries than keys": Shape(21, 11, B=1),
    "window, odd": Shape(29, 29, 5, B=1),
    "window with blocks inside the band": Shape(75, 75, 42, Q=2, K=1, B=1),
    "window of whole blocks": Shape(64, 64, 32, Q=1, K=1, B=1),
    "window of 1": Shape(17, 17, 1, B=1),
    "window, late queries": Shape(13, 40, 9, q_offset=27, B=1),
    "window, queries that no longer see a key": Shape(40, 12, 6, q_offset=3, B=1),
    "one query": Shape(1, 20, 7, q_offset=19, B=1),
}


@needs_triton
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(shape, small_blocks):
    matches_reference(shape)


@needs_triton
@pytest.mark.parametrize("window", [None, 6])
def test_segments_and_rows_that_see_nothing(window, small_blocks):
    shape = Shape(29, 29, window)
    got = matches_reference(shape, segment_ids=documents(shape, 7, 11))
    empty = np.asarray(got["lse"]) == np.float32(MASKED)
    assert empty.any()
    assert not got["out"][empty].any()
    assert not got["dq"][empty].any()


@needs_triton
@pytest.mark.parametrize("length", [8, 13])
def test_kv_lengths(length, small_blocks):
    shape = Shape(29, 29)
    got = matches_reference(shape, kv_lengths=jnp.array([0, length]))
    assert empty_rows(got["lse"]) == shape.N * shape.Q
    assert not got["dv"][0].any()
    assert not got["dk"][1, length:].any()


@needs_triton
def test_keys_that_do_not_exist_are_not_read(small_blocks):
    q, k, v, *cotangents = inputs(Shape(21, 21))
    lengths = jnp.array([5, 16])
    missing = (jnp.arange(21)[None] >= lengths[:, None])[:, :, None, None]
    poisoned = [jnp.where(missing, jnp.nan, x) for x in (k, v)]
    want = run(Shape(21, 21), (q, k, v, *cotangents), kv_lengths=lengths)
    got = run(Shape(21, 21), (q, *poisoned, *cotangents), kv_lengths=lengths)
    for name, x in want.items():
        np.testing.assert_array_equal(got[name], x, err_msg=name)


@needs_triton
@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_scale(scale, small_blocks):
    matches_reference(Shape(29, 29, 12, B=1), scale=scale)


@needs_triton
@pytest.mark.parametrize("window", [5, 30])
def test_exactly_w_keys_are_visible(window, small_blocks):
    """v[j] is the unit vector of j. So out[i, j] > 0 says that i sees j, and the test counts."""
    N = 32
    q, k, *_ = inputs(Shape(N, N, B=1, Q=1, K=1, H=N))
    v = jnp.eye(N)[None, :, None]
    with pallas_kernels.interpret():
        out = window_attention(q, k, v, window=window, implementation="triton")
    i, j = np.arange(N)[:, None], np.arange(N)[None, :]
    np.testing.assert_array_equal(out[0, :, 0] > 0, (i - window < j) & (j <= i))


@needs_triton
def test_scores_of_any_size_stay_finite(small_blocks):
    """Scores of +-1e4, and a masked score far above the visible ones."""
    shape = Shape(19, 19, 4, B=1)
    q, k, v, *cotangents = inputs(shape)
    got = run(shape, (q, (k * 1e4).at[:, -1].multiply(100.0), v, *cotangents))
    assert all(np.isfinite(x).all() for x in got.values())
    assert np.abs(got["out"]).sum(-1).min() > 0


@needs_triton
def test_fp16_error_is_that_of_the_reference(small_blocks):
    """The root mean square of the errors is at most 1.5 times the reference's, and a second run
    gives the same bits. If k and v are float32 and q is float16, the gradients of k and v are not
    rounded to float16."""
    shape = Shape(40, 40, 20, Q=2, K=1, H=32, B=1)
    exact = outputs_and_gradients(operation(shape, implementation="reference"), inputs(shape))
    args = inputs(shape, jnp.float16)
    want = outputs_and_gradients(operation(shape, implementation="reference"), args)
    got, again = run(shape, args), run(shape, args)
    for name, x in exact.items():
        error, allowed = (np.sqrt(np.mean((np.float32(y[name]) - x) ** 2)) for y in (got, want))
        assert got[name].dtype == (jnp.float32 if name == "lse" else jnp.float16)
        assert error <= 1.5 * allowed, name
        np.testing.assert_array_equal(got[name], again[name])
    q, k, v, *cotangents = args
    wide = run(shape, (q, k.astype(jnp.float32), v.astype(jnp.float32), *cotangents))
    for name in ("dk", "dv"):
        assert wide[name].dtype == jnp.float32
        np.testing.assert_array_equal(wide[name].astype(jnp.float16), got[name])
        assert (wide[name] != wide[name].astype(jnp.float16)).any()


@needs_triton
def test_decode(small_blocks):
    """Rows have no key, one key, exactly a block of keys, or all keys."""
    q, k, v, *_ = inputs(Shape(1, 27, Q=3, K=1, H=8, B=4))
    k, v = (x.at[0].set(jnp.nan).at[1, 1:].set(jnp.nan) for x in (k, v))  # never read
    lengths = jnp.array([0, 1, 8, 27])
    for decode, options in ((decode_window, {}), (decode_cross, {"return_lse": True})):
        clean = [jnp.nan_to_num(x) for x in (k, v)]
        want = decode(q[:, 0], *clean, lengths, **options, implementation="reference")
        with pallas_kernels.interpret():
            got = decode(q[:, 0], k, v, lengths, **options, implementation="triton")
        assert_equal_leaves(got, want)
        assert not jax.tree.leaves(got)[0][0].any()


def test_the_interpreter_does_not_round_to_bf16():
    x = jnp.ones((1, 4, 1, 4), jnp.bfloat16)
    with pallas_kernels.interpret(), pytest.raises(ValueError, match="interpreter cuts bfloat16"):
        cross_attention(x, x, x, implementation="triton")


# --- Compiled for a GPU that is not here ----------------------------------------------------------


@needs_triton
def test_the_compiler_spills_nothing():
    shape = {"N": 1024, "S": 1024, "Q": 12, "K": 4, "H": 64, "window": 512}
    kernels = triton.compile_report(89, [shape, shape | {"N": 1}])
    names = [kernel["name"].split()[0] for kernel in kernels]
    attention = [f"attention_window_{x}_triton" for x in ("forward", "dq", "dkv")]
    assert names == [*attention, "attention_decode_triton"]
    for kernel in kernels:
        assert kernel["spills"] == 0
        assert 0 < kernel["registers"] <= 255
        assert 0 < kernel["shared_bytes"] <= 99 * 1024


@needs_triton
def test_a_cpu_host_lowers_for_an_a100():
    if reason := triton._misfit():
        pytest.skip(reason)
    device = AbstractDevice(device_kind=A100.kind, num_cores=108, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    q, k = (jax.ShapeDtypeStruct((1, 64, heads, 64), jnp.float16) for heads in (4, 2))

    with use_abstract_mesh(mesh):
        assert choose_implementation("decode_cross").implementation == "triton"
        traced = jax.jit(lambda *x: window_attention(*x, window=16)).trace(q, k, k)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@triton_kernel_call") == 1
