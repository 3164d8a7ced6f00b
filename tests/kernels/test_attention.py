"""xla compared with the dense reference: values and every gradient."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    MASKED,
    SegmentIds,
    api,
    cross_attention,
    join,
    window_attention,
)
from pallas_kernels.attention import flash, xla
from tests.kernels.cases import (
    Shape,
    assert_matches_reference,
    documents,
    empty_rows,
    inputs,
    operation,
    outputs_and_gradients,
)

SHAPES = {
    "full": Shape(24, 24),
    "full, odd": Shape(29, 29),
    "full, late queries": Shape(13, 40, q_offset=27),
    "full, keys after the last query": Shape(9, 40, q_offset=10),
    "full, more queries than keys": Shape(19, 11),
    "window, odd": Shape(29, 29, 5),
    "window, wider than a block": Shape(32, 32, 19),
    "window of 1": Shape(17, 17, 1),
    "window = N": Shape(17, 17, 17),
    "window > N": Shape(17, 17, 100),
    "window, late queries": Shape(13, 40, 9, q_offset=27),
    "window, queries that no longer see a key": Shape(20, 12, 6, q_offset=3),
    "one query": Shape(1, 20, 7, q_offset=19),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(shape, small_blocks):
    assert_matches_reference(shape)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_few_blocks_without_a_loop(shape, few_blocks):
    assert_matches_reference(shape)


@pytest.mark.parametrize("window", [None, 6])
def test_segments_without_a_loop(window, few_blocks):
    shape = Shape(29, 29, window, Q=2, K=1)
    got = assert_matches_reference(shape, segment_ids=documents(shape, 7, 11))
    assert empty_rows(got["lse"]) > 0


def test_few_blocks_with_few_scores_have_no_loop(few_blocks):
    """A loop costs time on a CPU; many blocks would take long to compile, and many scores much
    memory, because XLA keeps those of several blocks at a time."""
    for shape, loops in ((Shape(64, 64), 0), (Shape(65, 65), 1), (Shape(64, 64, B=1100), 1)):
        q, k, v, *_ = inputs(shape)
        program = str(jax.make_jaxpr(cross_attention)(q, k, v))
        assert ("while[" in program or "scan[" in program) == loops, shape


@pytest.mark.parametrize(("Q", "K"), [(3, 1), (6, 2), (4, 1), (8, 1)])
def test_groups_of_query_heads(Q, K, small_blocks):
    assert_matches_reference(Shape(19, 19, 6, Q=Q, K=K))


@pytest.mark.parametrize("window", [None, 6])
def test_blocks_of_the_table(window):
    """With the block sizes of blocks.py: several blocks, and a last one that is not full."""
    assert_matches_reference(Shape(300, 300, window, Q=2, K=1, B=1))


@pytest.mark.parametrize("window", [None, 6])
def test_segments_and_rows_that_see_nothing(window, small_blocks):
    shape = Shape(29, 29, window)
    one = documents(shape, 7, 7).q
    assert empty_rows(assert_matches_reference(shape, segment_ids=one)["lse"]) == 0
    got = assert_matches_reference(shape, segment_ids=documents(shape, 7, 11))
    empty = np.asarray(got["lse"]) == np.float32(MASKED)
    assert empty.any()
    assert not empty.all()
    assert not got["out"][empty].any()
    assert not got["dq"][empty].any()


def test_kv_lengths(small_blocks):
    shape = Shape(29, 29)
    got = assert_matches_reference(shape, kv_lengths=jnp.array([0, 13]))
    assert_matches_reference(Shape(29, 20, q_offset=3), kv_lengths=jnp.array([21, 200]))
    assert empty_rows(got["lse"]) == shape.N * shape.Q
    assert not got["dv"][0].any()
    assert not got["dk"][1, 13:].any()


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("window", [1, 5, 12, 30])
def test_exactly_w_keys_are_visible(implementation, window, small_blocks):
    """The test counts for which j out[i] depends on v[j]: exactly those with i - W < j <= i."""
    N = 20
    q, k, v, *_ = inputs(Shape(N, N, B=1, Q=1, K=1, H=1))

    def attend(v):
        out = window_attention(q, k, v, window=window, implementation=implementation)
        return out[0, :, 0, 0]

    weights = np.asarray(jax.jit(jax.jacrev(attend))(v))[:, 0, :, 0, 0]
    i, j = np.arange(N)[:, None], np.arange(N)[None, :]
    np.testing.assert_array_equal(weights > 0, (i - window < j) & (j <= i))
    np.testing.assert_array_equal((weights > 0).sum(1), np.minimum(np.arange(N) + 1, window))


@pytest.mark.parametrize("window", [None, 24])
def test_bf16_error_is_that_of_the_reference(window, small_blocks):
    """The root mean square of the errors is at most 1.5 times the reference's. Both are errors
    against the fp32 reference on fp32 inputs."""
    shape = Shape(96, 96, window, Q=4, K=2, H=32)
    exact = outputs_and_gradients(operation(shape, implementation="reference"), inputs(shape))
    args = inputs(shape, jnp.bfloat16)
    errors = {}
    for name in ("reference", "xla"):
        got = outputs_and_gradients(operation(shape, implementation=name), args)
        assert got["out"].dtype == got["dk"].dtype == jnp.bfloat16
        assert got["lse"].dtype == jnp.float32
        errors[name] = {
            key: float(np.sqrt(np.mean(np.square(np.float32(x) - exact[key]))))
            for key, x in got.items()
        }
    for key, error in errors["xla"].items():
        assert error <= 1.5 * errors["reference"][key], (key, errors)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_scores_of_any_size_stay_finite(implementation, small_blocks):
    """Scores of +-1e4. A masked score is far above the visible ones, and must not change them."""
    q, k, v, d_out, d_lse = inputs(Shape(19, 19, 4))
    k = (k * 1e4).at[:, -1].multiply(100.0)
    attend = operation(Shape(19, 19, 4), implementation=implementation)
    got = outputs_and_gradients(attend, (q, k, v, d_out, d_lse))
    assert all(np.isfinite(x).all() for x in got.values())
    assert np.abs(got["out"]).sum(-1).min() > 0


def test_heads_of_any_width_are_padded(monkeypatch):
    """The kernels of devices support some widths only. Heads are padded with zeros, which change no
    result."""
    shape = Shape(19, 19, 6, H=5)
    seen = []

    def forward(spec, q, *rest):
        seen.append(q.shape[-1])
        return xla.forward(spec, q, *rest)

    kernels = flash.Kernels(forward, xla.backward)
    attend = functools.partial(flash.attention, kernels, head_widths=(8, 16))
    implementation = api.Implementation(lambda call: None, attend)
    monkeypatch.setitem(api._REGISTRY, "xla", implementation)
    args = inputs(shape)
    want = outputs_and_gradients(operation(shape, implementation="reference"), args)
    got = outputs_and_gradients(operation(shape, implementation="xla"), args)
    assert set(seen) == {8}
    for name, x in want.items():
        np.testing.assert_allclose(got[name], x, atol=2e-5, rtol=2e-5, err_msg=name)


@pytest.mark.parametrize(("window", "kind"), [(6, "window"), (19, "full"), (None, "full")])
def test_profiles_show_which_attention_an_operation_belongs_to(window, kind):
    shape = Shape(19, 19, window)
    run = jax.grad(lambda *x: operation(shape)(*x).sum())
    text = jax.jit(run).lower(*inputs(shape)[:3]).as_text(debug_info=True)
    for what in ("forward", "backward"):
        assert f"attention_{kind}_{what}_xla" in text


def test_scale(small_blocks):
    q, k, v, *_ = inputs(Shape(19, 19))
    got = cross_attention(q, k, v, scale=0.25)
    np.testing.assert_allclose(got, cross_attention(q * 0.25, k, v, scale=1.0), atol=1e-6)
    np.testing.assert_allclose(cross_attention(q, k, v), cross_attention(q, k, v, scale=0.5))


def test_parts_of_the_keys_are_joined(small_blocks):
    """The result is that over all keys, even if some rows see no key of a part."""
    q, k, v, *_ = inputs(Shape(12, 24, q_offset=12))
    whole = cross_attention(q, k, v, q_offset=12, return_lse=True)

    def part(n):
        ids = jnp.broadcast_to(jnp.arange(24) // 8 == n, (2, 24)).astype(int)
        segments = SegmentIds(jnp.ones((2, 12), int), ids)
        return cross_attention(q, k, v, q_offset=12, segment_ids=segments, return_lse=True)

    parts = [part(n) for n in range(3)]
    assert empty_rows(parts[2][1]) == 2 * 4 * 2
    for order in itertools.permutations(parts):
        for got, want in zip(join(*order), whole, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5)
    nothing = jnp.zeros_like(q), jnp.full(q.shape[:3], MASKED)
    for got, want in zip(join(nothing, nothing), nothing, strict=True):
        np.testing.assert_array_equal(got, want)


def test_two_parts_are_joined_as_before_to_the_bit():
    """The sigmoid of the difference is the share of the first part, in bfloat16 too."""
    (q, k, *_), rng = inputs(Shape(12, 12), jnp.bfloat16), np.random.default_rng(1)
    a, b = (jnp.asarray(rng.standard_normal(q.shape[:3]), jnp.float32) for _ in range(2))
    share = jax.nn.sigmoid(a - b)[..., None]
    out, _ = join((q, a), (k, b))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, (share * q + (1 - share) * k).astype(jnp.bfloat16))
