"""The Hopper kernels in Pallas's interpreter on the host: the kernels' own code, tiny blocks.

Most of the time goes into compiling the interpreted kernels, so each compiled function is asked
several questions, and segments and lengths that cut nothing off stand for their absence.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    MASKED,
    Call,
    SegmentIds,
    block_sizes,
    decode_cross,
    decode_window,
    interpret,
)
from pallas_kernels.attention import blocks, gpu, gpu_decode, hopper
from pallas_kernels.attention.gpu_plan import KeyVisits, Plan, QueryVisits
from pallas_kernels.attention.hopper import CONSUMERS
from pallas_kernels.attention.mask import Mask
from pallas_kernels.device import Device
from tests.kernels.cases import (
    Shape,
    assert_equal_leaves,
    documents,
    empty_rows,
    inputs,
    interpreted,
    operation,
    outputs_and_gradients,
)

SMALL = blocks.GpuBlocks(
    rows=8, kv=16, stages=2, dq_kv=8, dq_stages=3, dkv_q=8, dkv_stages=2,
    decode_kv=8, decode_stages=2,
)  # fmt: skip


@pytest.fixture(autouse=True)
def small_gpu_blocks():
    with block_sizes(gpu_blocks=lambda H: SMALL):
        yield


def both(shape: Shape, args, races: bool = False, **options):
    want = outputs_and_gradients(operation(shape, implementation="reference", **options), args)
    with interpret(detect_races=races):
        got = outputs_and_gradients(operation(shape, implementation="pallas_gpu", **options), args)
    return got, want


def assert_close(got, want):
    for name, x in want.items():
        assert np.isfinite(got[name]).all(), name
        np.testing.assert_allclose(got[name], x, atol=2e-5, rtol=2e-5, err_msg=name)


@interpreted
@pytest.mark.parametrize(
    "shape",
    [
        Shape(29, 29, Q=3, K=1, H=8, B=1),  # full, neither a multiple of a block
        Shape(20, 27, 9, q_offset=14, Q=2, K=1, H=8, B=1),  # the last queries see few keys
        Shape(19, 11, Q=2, K=2, H=8, B=1),  # more queries than keys
    ],
    ids=["full, G=3", "window, late queries, G=2", "more queries than keys, G=1"],
)
def test_values_and_gradients(shape):
    assert_close(*both(shape, inputs(shape)))


def with_masks(shape: Shape, attend_options):
    """A compiled function that takes the arrays, segment ids and lengths."""

    @jax.jit
    def run(args, segments, lengths):
        options = dict(attend_options, segment_ids=segments)
        if lengths is not None:
            options["kv_lengths"] = lengths
        return outputs_and_gradients(operation(shape, **options), args)

    return run


@interpreted
def test_window_with_segments_races_and_repetition(capfd):
    """If there is a race, jax 0.12 raises an error, and jax 0.11 prints a line."""
    shape = Shape(29, 29, 11, Q=2, K=1, H=8, B=1)
    args = inputs(shape)
    want = with_masks(shape, {"implementation": "reference"})
    got = with_masks(shape, {"implementation": "pallas_gpu"})
    one_document = SegmentIds(*[jnp.zeros((1, 29), int)] * 2)
    with interpret(detect_races=True):
        results = [got(args, x, None) for x in (one_document, documents(shape, 7, 11))]
        again = got(args, documents(shape, 7, 11), None)
    jax.block_until_ready(again)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())
    assert_close(results[0], want(args, one_document, None))
    assert_close(results[1], want(args, documents(shape, 7, 11), None))
    empty = np.asarray(results[1]["lse"]) == np.float32(MASKED)
    assert 0 < empty.sum() < empty.size
    assert not results[1]["out"][empty].any()
    assert not results[1]["dq"][empty].any()
    for name, x in results[1].items():
        np.testing.assert_array_equal(x, again[name], err_msg=name)


@interpreted
def test_full_with_lengths_and_segments():
    shape = Shape(13, 40, q_offset=21, H=8, B=2)
    args = inputs(shape)
    want = with_masks(shape, {"implementation": "reference"})
    got = with_masks(shape, {"implementation": "pallas_gpu"})
    one_document = SegmentIds(jnp.zeros((2, 13), int), jnp.zeros((2, 40), int))
    pieces = SegmentIds(*(ids % 2 for ids in documents(shape, 3, 19)))
    cases = [
        (one_document, jnp.array([0, 13])),
        (documents(shape, 7, 11), jnp.array([16, 40])),
        (pieces, jnp.array([37, 40])),
    ]
    with interpret():
        results = [got(args, *case) for case in cases]
    for case, result in zip(cases, results, strict=True):
        assert_close(result, want(args, *case))
    assert empty_rows(results[0]["lse"][0]) == shape.N * shape.Q
    assert not results[0]["dv"][1, 13:].any()


@interpreted
def test_bf16_error_and_fp32_gradients_of_shared_keys():
    """The error against fp32 is at most 1.5 times that of the bf16 reference. If k and v are
    float32, their gradients are those of the accumulators, not rounded."""
    shape = Shape(24, 24, 14, Q=2, K=1, H=32, B=1)
    exact = outputs_and_gradients(operation(shape, implementation="reference"), inputs(shape))
    q, k, v, d_out, d_lse = inputs(shape, jnp.bfloat16)
    args = (q, k.astype(jnp.float32), v.astype(jnp.float32), d_out, d_lse)
    got, _ = both(shape, args)
    assert got["out"].dtype == got["dq"].dtype == jnp.bfloat16
    assert got["dk"].dtype == got["dv"].dtype == jnp.float32
    assert (got["dk"] != got["dk"].astype(jnp.bfloat16).astype(jnp.float32)).any()
    # The reference's own error with everything in bf16, gradients of k and v included.
    args = (q, k, v, d_out, d_lse)
    want = outputs_and_gradients(operation(shape, implementation="reference"), args)
    for name in want:
        error, its = (
            np.sqrt(np.mean(np.square(np.float32(x[name]) - exact[name]))) for x in (got, want)
        )
        assert error <= 1.5 * its, (name, error, its)


@interpreted
@pytest.mark.parametrize(
    ("decode", "S", "Q", "K", "lengths", "races"),
    [
        (decode_cross, 32, 4, 2, [0, 1, 8, 32, 21], False),
        (decode_window, 21, 3, 1, [20, 500], True),  # not a multiple of the block
    ],
)
def test_decode(decode, S, Q, K, lengths, races, capfd):
    q, k, v, *_ = inputs(Shape(1, S, Q=Q, K=K, H=8, B=len(lengths)))
    lengths = jnp.array(lengths)
    options = {"return_lse": True} if decode is decode_cross else {}
    run = functools.partial(decode, q[:, 0], k, v, lengths, **options)
    with interpret(detect_races=races):
        got = jax.block_until_ready(run(implementation="pallas_gpu"))
    assert "RACE DETECTED" not in "".join(capfd.readouterr())
    assert_equal_leaves(got, run(implementation="reference"))
    assert not jax.tree.leaves(got)[0][lengths == 0].any()


def blocks_of_consumers(visits, mask, table):
    """[consumers blocks] booleans: which blocks the table visits, which have a visible pair of the
    tile, which blocks are without a mask, and in which all pairs of the consumer are visible."""
    seen = np.asarray(mask if visits.query_axis == 0 else mask.T)
    seen = seen.reshape(len(seen) // visits.rows, visits.rows, -1, visits.size)
    some, every = seen.any((1, 3)), seen.all((1, 3))
    some = some.reshape(-1, CONSUMERS, some.shape[1]).any(1).repeat(CONSUMERS, 0)
    first, low, high, last = np.asarray(table).T[..., None]
    assert (np.diff(table, axis=1) >= 0).all()
    block = np.arange(some.shape[1])
    return (first <= block) & (block < last), some, (low <= block) & (block < high), every


@pytest.mark.parametrize("window", [None, 1, 5, 16, 23])
@pytest.mark.parametrize("q_offset", [0, 3, 16])
def test_visits_are_exactly_the_blocks_that_hold_visible_pairs(window, q_offset):
    """Compared with the dense mask, also with a limit: no visible pair is outside the blocks, the
    first and the last block have some, and in the inner blocks all pairs are visible. Blocks of
    queries and of keys have different sizes."""
    N, S = 48, 40
    for limit in (0, 13, 40):
        plan = Plan(N, S, 1, window, q_offset, 1.0, limit < S)
        mask = Mask(window, q_offset, jnp.array([limit])).as_array(N, S)[0]
        for visits, length in ((KeyVisits(plan, 8, 8), N), (QueryVisits(plan, 4, 16), S)):
            table = []
            for start in range(0, length, visits.rows):
                tile = start // (CONSUMERS * visits.rows) * (CONSUMERS * visits.rows)
                first, last = visits.tile(jnp.int32(tile), limit)
                table.append([first, *visits.inside(jnp.int32(start), limit, first, last), last])
            visited, some, free, every = blocks_of_consumers(visits, mask, table)
            np.testing.assert_array_equal(visited, some)
            assert not (free & ~every).any()


@functools.partial(jax.jit, static_argnums=0)
def table_of_documents(visits, segments, lengths):
    return visits.documents(segments, lengths).table


def blocks_of_documents(q_ids, kv_ids, window, q_offset, length):
    """`blocks_of_consumers` for both kinds of tiles, in a row with these segment ids."""
    N, S = len(q_ids), len(kv_ids)
    segments = SegmentIds(*(jnp.array(ids, jnp.int32)[None] for ids in (q_ids, kv_ids)))
    lengths = None if length is None else jnp.array([length])
    plan = Plan(N, S, 1, window, q_offset, 1.0, length is not None)
    mask = Mask(window, q_offset, lengths, segments).as_array(N, S)[0]
    for visits in (KeyVisits(plan, 8, 8), QueryVisits(plan, 4, 16)):
        yield blocks_of_consumers(visits, mask, table_of_documents(visits, segments, lengths)[0])


late_and_short = pytest.mark.parametrize(
    ("window", "q_offset", "length"), [(None, 0, None), (37, 16, 90)]
)


@late_and_short
@pytest.mark.parametrize("padding", [0, 21])
def test_packed_documents_visit_exactly_the_blocks_that_hold_visible_pairs(
    window, q_offset, length, padding
):
    """And the blocks without a hidden pair are exactly those without a mask. The padding is a
    document at the end of the row, with an id that is lower than those before it."""
    ids = np.sort(np.random.default_rng(0).integers(1, 6, 128))
    ids[len(ids) - padding :] = 0
    for visited, some, free, every in blocks_of_documents(
        ids[q_offset : q_offset + 96], ids, window, q_offset, length
    ):
        np.testing.assert_array_equal(visited, some)
        np.testing.assert_array_equal(free, every)
        assert free.any()


@late_and_short
@pytest.mark.parametrize("pieces", [8, 32])
def test_documents_in_pieces_miss_no_visible_pair(window, q_offset, length, pieces):
    rng = np.random.default_rng(pieces)
    q_ids, kv_ids = (np.repeat(rng.integers(-2, 2, pieces), n // pieces) for n in (96, 128))
    for visited, some, free, every in blocks_of_documents(q_ids, kv_ids, window, q_offset, length):
        assert some.any()
        assert not (some & ~visited).any()
        assert not (free & ~every).any()


def test_decode_splits_fill_the_device():
    splits = gpu_decode._splits
    assert splits(4, 131072, 64) == 33  # 132 thread blocks
    assert splits(32, 131072, 64) == 4
    assert splits(4, 512, 64) == 4  # two blocks of keys each: one a consumer
    assert splits(1320, 131072, 64) == 1
    assert splits(1, 8, 64) == 1


def test_it_says_why_it_cannot_run():
    hopper_gpu = Device("gpu", "NVIDIA H200")

    def reason(device=hopper_gpu, operation="window_attention", **facts):
        return gpu.unsupported_reason(Call(operation, device, **facts))

    reasons = [
        reason(Device("gpu", "NVIDIA A100-SXM4-80GB")),
        reason(dtype=jnp.dtype("float32")),
        reason(q_shape=(1, 8, 4, 80), k_shape=(1, 8, 4, 80)),
        reason(operation="decode_cross", q_shape=(1, 144, 64), k_shape=(1, 8, 2, 64)),
    ]
    assert all(x.startswith("pallas_gpu") and x.endswith(".") for x in reasons)
    assert len(set(reasons)) == len(reasons) or not hasattr(hopper.plgpu, "InterpretGPUParams")
    if hasattr(hopper.plgpu, "InterpretGPUParams"):
        assert reason() is None
        assert reason(q_shape=(1, 8, 4, 128), k_shape=(1, 8, 4, 128), dtype=jnp.bfloat16) is None
        with interpret():
            assert reason(Device("cpu", "cpu"), dtype=jnp.dtype("float32")) is None
