"""The TPU kernels in Pallas's interpreter, compared with the dense reference. A CPU host that
compiles for a TPU gets them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels import (
    MASKED,
    Partition,
    block_sizes,
    cross_attention,
    decode_cross,
    decode_window,
    interpret,
    window_attention,
)
from pallas_kernels.attention import mask as masks
from pallas_kernels.attention import tpu
from pallas_kernels.attention.blocks import TPU_VMEM, TpuBlocks, tpu_form
from pallas_kernels.attention.tpu_bands import Bands, Ceilings
from tests.kernels.cases import (
    Shape,
    assert_matches_reference,
    documents,
    empty_rows,
    inputs,
    operation,
    outputs_and_gradients,
)

matches_reference = functools.partial(assert_matches_reference, implementation="pallas_tpu")

V5, V6E, TPU7X = (tpu_form(kind, 128) for kind in ("TPU v5", "TPU v6 lite", "TPU7x"))

SHAPES = {
    "full, odd, groups of 3": Shape(150, 150, Q=3, K=1, H=64, B=1),
    "full, several steps, late queries": Shape(140, 1300, q_offset=1160, H=64, B=1),
    "full, more queries than keys": Shape(300, 130, q_offset=5, H=64, B=1),
    "window, odd, groups of 2": Shape(150, 150, 70, Q=2, K=1, H=64, B=1),
    "window, several tiles and blocks": Shape(600, 600, 200, Q=1, K=1, H=128, B=1),
    "window, late queries": Shape(140, 400, 130, q_offset=260, H=64, B=1),
    "window, queries that no longer see a key": Shape(300, 140, 60, q_offset=30, H=64, B=1),
    "window of 1, groups of 8": Shape(130, 130, 1, Q=8, K=1, H=64, B=1),
    "heads of 256": Shape(130, 130, 60, Q=1, K=1, H=256, B=1),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(shape):
    matches_reference(shape)


def test_no_kernel_takes_more_vmem_than_a_device_has():
    megabytes = {"TPU v5 lite": 128, "TPU v5": 128, "TPU v6 lite": 128, "TPU7x": 64}
    assert TPU_VMEM.keys() == megabytes.keys()
    assert all(TPU_VMEM[kind] < size * 2**20 for kind, size in megabytes.items())


def test_the_form_of_v5():
    """The other tests take the form of an unknown device, which is that of tpu7x."""
    assert len({V5, V6E, TPU7X}) == 3
    shape = Shape(300, 300, 130, Q=2, K=1, H=64, B=1)
    blocks = TpuBlocks(128, 128, 128)
    with block_sizes(tpu_form=lambda *_: V5, tpu_blocks=lambda *_: blocks):
        matches_reference(shape, segment_ids=documents(shape, 170, 170))


@pytest.mark.parametrize("window", [None, 1, 100, 500, 512, 1000])
@pytest.mark.parametrize("remainder", [0, 3])
def test_ceilings_have_the_mask_of_every_tile(window, remainder):
    bq, bc = 128, 256
    ceilings = Ceilings(window, bq, bc, remainder)
    assert ceilings.shape[1] <= 128 + 2 * bq + 3 * bc + 256  # however long the window is

    def tile(distance_ref, filled_ref, tile_ref):
        tile_ref[...] = ceilings.of(filled_ref, distance_ref[0])

    filled = pl.pallas_call(
        ceilings.fill, jax.ShapeDtypeStruct(ceilings.shape, jnp.float32), interpret=True
    )()
    tile = jax.jit(
        pl.pallas_call(tile, jax.ShapeDtypeStruct((bq, bc), jnp.float32), interpret=True)
    )
    age = np.arange(bq)[:, None] - np.arange(bc)
    nearest, farthest = -bq, (window or 1024) + bc - 2  # of the tiles in which some key is seen
    for distance in range(nearest + remainder, farthest + 1, 128):
        got = tile(jnp.array([distance]), filled)
        want = masks.visible(age + distance, 0, window)
        np.testing.assert_array_equal(got, np.where(want, np.inf, np.float32(MASKED)))


@pytest.mark.parametrize("window", [None, 60])
def test_segments_and_rows_that_see_nothing(window):
    shape = Shape(150, 150, window, Q=2, K=2, H=64)
    got = matches_reference(shape, segment_ids=documents(shape, 70, 90))
    empty = np.asarray(got["lse"]) == np.float32(MASKED)
    assert empty.any()
    assert not empty.all()
    assert not got["out"][empty].any()
    assert not got["dq"][empty].any()


@pytest.mark.parametrize("window", [None, 200])
def test_tiles_of_other_documents_are_skipped_and_those_of_one_need_no_mask(window):
    """Tiles of 128 x 128; documents of 256, 128 and 144; the third has an id of the first. A NaN
    makes each product with it a NaN, also the product with 0. It must not reach the second
    document."""
    blocks = TpuBlocks(128, 128, 128)
    shape = Shape(528, 528, window, Q=1, K=1, H=64, B=1)
    ids = jnp.repeat(jnp.array([[7, 3, 7]]), jnp.array([256, 128, 144]), axis=1)
    with block_sizes(tpu_blocks=lambda *_: blocks):
        matches_reference(shape, segment_ids=ids)
    q, k, v, *_ = inputs(shape)
    v = v.at[:, :256].set(jnp.nan)
    with interpret(), block_sizes(tpu_blocks=lambda *_: blocks):
        attend = operation(shape, implementation="pallas_tpu", segment_ids=ids)
        out = jax.jit(attend)(q, k, v)
    assert np.isnan(out[:, :256]).all()
    assert np.isfinite(out[:, 256:384]).all()


def test_kv_lengths():
    """Rows have no key, exactly a block or all keys. Lengths may be larger than the array, and
    queries may be after the last key."""
    beyond = Shape(150, 130, Q=2, K=2, H=64, q_offset=60)
    matches_reference(beyond, kv_lengths=jnp.array([131, 1300]))
    shape = Shape(150, 150, Q=2, K=2, H=64, B=3)
    got = matches_reference(shape, kv_lengths=jnp.array([0, 128, 150]))
    assert empty_rows(got["lse"]) == shape.N * shape.Q
    assert not got["dk"][1, 128:].any()


def test_a_chunk_of_queries_after_a_cache_that_is_not_full():
    """As in prefill: causality hides no key, and each row has some of the keys."""
    shape = Shape(40, 2300, Q=2, K=1, H=64, B=4, q_offset=2300)
    matches_reference(shape, kv_lengths=jnp.array([0, 700, 1024, 2300]))
    bands = Bands.plan(128, 512, 2560, 2300, None, 0)
    for limit, blocks in ((0, 1), (1, 1), (512, 1), (513, 2), (1024, 2), (2304, 5)):
        starts = [int(bands.start(0, j, limit)) for j in range(bands.steps)]
        assert len(set(starts)) == blocks  # a start that stays the same is not read again
        assert starts == sorted(starts)


@pytest.mark.parametrize(
    ("H", "form"),
    [
        (64, V6E),
        *(pytest.param(*c, marks=pytest.mark.slow) for c in ((64, V5), (64, TPU7X), (128, V6E))),
    ],
)
def test_bf16_error_is_that_of_the_reference_and_runs_repeat_bit_for_bit(H, form):
    """The root mean square of the errors is at most 1.5 times the reference's. Both are errors
    against the fp32 reference on fp32 inputs."""
    shape = Shape(256, 256, 100, Q=2, K=1, H=H, B=1)
    exact = outputs_and_gradients(operation(shape, implementation="reference"), inputs(shape))
    args = inputs(shape, jnp.bfloat16)
    bf16 = outputs_and_gradients(operation(shape, implementation="reference"), args)
    with interpret(), block_sizes(tpu_form=lambda *_: form):
        attend = operation(shape, implementation="pallas_tpu")
        got, again = (outputs_and_gradients(attend, args) for _ in range(2))

    def error(x, key):
        return float(np.sqrt(np.mean(np.square(np.float32(x[key]) - exact[key]))))

    for key in got:
        assert error(got, key) <= 1.5 * error(bf16, key), key
        np.testing.assert_array_equal(got[key], again[key])


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
def test_gradients_of_fp32_keys_are_not_rounded(implementation):
    """q is bf16, k and v are fp32, as in cross layers, which share k and v: the gradients of k and
    v are sums in fp32. If bf16 can hold the inputs, these are the gradients of the bf16 call before
    they are rounded."""
    shape = Shape(130, 130, Q=2, K=1, H=64, B=1)
    q, k, v, d_out, d_lse = inputs(shape, jnp.bfloat16)
    with interpret():
        attend = operation(shape, implementation=implementation)
        low = outputs_and_gradients(attend, (q, k, v, d_out, d_lse))
        wide = [x.astype(jnp.float32) for x in (k, v)]
        high = outputs_and_gradients(attend, (q, *wide, d_out, d_lse))
    np.testing.assert_array_equal(low["out"], high["out"])
    for key in ("dk", "dv"):
        assert high[key].dtype == jnp.float32
        np.testing.assert_array_equal(high[key].astype(jnp.bfloat16), low[key])
        assert (high[key] != low[key].astype(jnp.float32)).any()


def test_no_race():
    """Two cores share the work, in the interpreter that compares their reads and writes."""
    interpreter = pytest.importorskip(
        "jax._src.pallas.mosaic.interpret.interpret_pallas_call", reason="not public, moved"
    )
    shape = Shape(200, 200, 60, Q=2, K=1, H=64, B=1)
    args = inputs(shape)
    with interpret(detect_races=True):
        got = outputs_and_gradients(operation(shape, implementation="pallas_tpu"), args)
        jax.block_until_ready(got)
        q, k, v = args[0][:, 0], *args[1:3]
        decode_cross(q, k, v, jnp.array([77]), implementation="pallas_tpu").block_until_ready()
    assert interpreter.races is not None
    assert not interpreter.races.races_found


# With H = 64 the slots are the columns of the cache; heads of 256 have two parts.
@pytest.mark.parametrize(
    ("G", "K", "H"), [(1, 2, 64), (3, 3, 64), (1, 2, 128), (2, 2, 256), (1, 16, 256)]
)
def test_decode(G, K, H):
    """Lengths of 0, 1, exactly a block, and all slots. No slot after the length is read."""
    lengths = jnp.array([0, 1, 128, 300])
    q, k, v, *_ = inputs(Shape(1, 300, Q=K * G, K=K, H=H, B=4))
    options = {"lengths": lengths, "return_lse": True}
    want, lse = decode_cross(q[:, 0], k, v, **options, implementation="reference")
    beyond = (jnp.arange(300)[None] >= lengths[:, None])[:, :, None, None]
    k, v = (jnp.where(beyond, jnp.nan, x) for x in (k, v))
    with interpret(), block_sizes(tpu_decode_rows=lambda H: 256):
        got, got_lse = decode_cross(q[:, 0], k, v, **options, implementation="pallas_tpu")
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(got_lse, lse, rtol=1e-5)
    assert not got[0].any()


def test_decode_over_a_ring():
    q, k, v, *_ = inputs(Shape(1, 60, Q=2, K=1, H=64))
    lengths = jnp.array([17, 1000])
    want = decode_window(q[:, 0], k, v, lengths, implementation="reference")
    with interpret():
        got = decode_window(q[:, 0], k, v, lengths, implementation="pallas_tpu")
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("window", [1, 100, 512, 700])
@pytest.mark.parametrize("q_offset", [0, 3, 500])
def test_a_band_holds_every_visible_key_and_one_step_reads_it(window, q_offset):
    block, length = 256, 1536
    bands = Bands.plan(block, 0, length, q_offset, window - 1, 0)
    assert bands.steps == 1
    assert bands.size < window + block + 2 * 128
    for i in range(4):
        first = q_offset + i * block
        start = int(bands.start(i, 0))
        assert start % 128 == 0
        assert start <= min(max(first - window + 1, 0), length - bands.size)
        assert start + bands.size >= min(first + block, length)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 2)])
def test_a_cpu_host_that_compiles_for_a_tpu_gets_the_tpu_kernels(shape):
    """The abstract mesh has TPUs, so the program has the TPU kernels, in a shard_map over the whole
    mesh. experiments.compile_kernels then compiles them to machine code."""
    device = AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu")
    types = (AxisType.Auto,) * 2
    mesh = AbstractMesh(shape, ("data", "tensor"), axis_types=types, abstract_device=device)
    x = jax.ShapeDtypeStruct((2, 256, 2, 64), jnp.bfloat16)
    partition = Partition(batch=("data",), heads=("tensor",))

    def run(q, k, v):
        out = window_attention(q, k, v, window=100, partition=partition)
        return (out + cross_attention(q, k, v, partition=partition)).astype(jnp.float32).sum()

    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(jax.grad(run)).trace(x, x, x).lower(lowering_platforms=("tpu",))
    text = lowered.as_text()
    for what in ("window", "full"):
        for kernel in ("forward", "dq"):
            assert f"attention_{what}_{kernel}_pallas_tpu" in text


@pytest.mark.parametrize(
    ("positions", "size"), [(1, 128), (128, 128), (129, 256), (333, 512), (512, 512), (513, 1024)]
)
def test_a_block_is_a_power_of_two(positions, size):
    """Mosaic does not compile the gradients with a block of 384."""
    assert tpu.whole_block(positions) == size
