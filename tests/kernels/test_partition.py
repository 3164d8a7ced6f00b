"""Kernels under a mesh: every device computes its own rows and heads, without a collective."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import Partition, cross_attention, decode_cross, interpret
from pallas_kernels.sharding import layout
from tests.kernels.cases import Shape, documents, inputs, operation

PARTITION = Partition(batch=("data",), heads=("tensor",))
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def make_mesh(data: int, tensor: int):
    types = (AxisType.Auto,) * 2
    devices = jax.devices()[: data * tensor]
    return jax.make_mesh((data, tensor), ("data", "tensor"), axis_types=types, devices=devices)


def put(mesh, args, kv_heads="tensor"):
    heads = ("tensor", kv_heads, kv_heads, "tensor")
    specs = [P("data", None, x, None) for x in heads] + [P("data", None, "tensor")]
    return [
        jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(args, specs, strict=True)
    ]


def gradients(attend):
    def run(q, k, v, d_out, d_lse):
        out, vjp = jax.vjp(lambda *x: attend(*x, return_lse=True), q, k, v)
        return *out, *vjp((d_out, d_lse))

    return jax.jit(run)


def check(mesh, shape, args, attend, reference):
    with jax.set_mesh(mesh), interpret():
        compiled = gradients(attend).lower(*args).compile()
        for got, want in zip(compiled(*args), gradients(reference)(*args), strict=True):
            np.testing.assert_allclose(got, want, atol=2e-5, rtol=2e-5)
    return [x for x in COLLECTIVES if x in compiled.as_text()]


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
def test_no_collective(implementation):
    shape = Shape(40, 40, 12, Q=4, K=2, H=64)
    mesh = make_mesh(2, 2)
    args = put(mesh, inputs(shape))
    options = {"segment_ids": documents(shape, 15, 15).q}
    attend = operation(shape, implementation=implementation, partition=PARTITION, **options)
    reference = operation(shape, implementation="reference", **options)
    assert check(mesh, shape, args, attend, reference) == []


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
def test_lengths_and_the_segments_of_queries_and_keys_are_split_with_their_rows(implementation):
    """Lengths and segments differ between the two rows, which are on different devices. Segments
    also differ between q and k."""
    shape = Shape(24, 40, q_offset=16, Q=4, K=2, H=64)
    mesh = make_mesh(2, 2)
    args = put(mesh, inputs(shape))
    options = {"segment_ids": documents(shape, 15, 11), "kv_lengths": jnp.array([21, 33])}
    attend = operation(shape, implementation=implementation, partition=PARTITION, **options)
    reference = operation(shape, implementation="reference", **options)
    assert check(mesh, shape, args, attend, reference) == []


@pytest.mark.parametrize(("Q", "K"), [(4, 1), (4, 2), (12, 3)])
def test_kv_heads_that_do_not_divide_are_replicated(Q, K):
    """On 4 devices: all share one head, two share one head, or two share a part of a head. Only the
    backward needs a sum over devices."""
    shape = Shape(20, 20, Q=Q, K=K, H=8)
    mesh = make_mesh(1, 4)
    args = put(mesh, inputs(shape), kv_heads=None)
    attend = operation(shape, implementation="xla", partition=PARTITION)
    found = check(mesh, shape, args, attend, operation(shape, implementation="reference"))
    assert found == ["all-reduce"]


def test_axes_that_do_not_divide_are_left_out():
    """4 rows on 2 x 3 devices: 6 does not divide them, but the axis of 2 still splits them."""
    shape = Shape(20, 20, Q=2, K=2, H=8, B=4)
    mesh = make_mesh(2, 3)
    spec = NamedSharding(mesh, P("data"))
    args = [jax.device_put(x, spec) for x in inputs(shape)]
    partition = Partition(batch=("data", "tensor"))
    attend = operation(shape, implementation="xla", partition=partition)
    assert check(mesh, shape, args, attend, operation(shape, implementation="reference")) == []


def test_kv_heads_are_split_as_the_queries_are_or_not_at_all():
    partition = Partition(heads=("data", "tensor"))
    with jax.set_mesh(make_mesh(2, 2)):
        assert layout(partition, 2, 4, 4).kv_heads == ("data", "tensor")
        assert layout(partition, 2, 4, 2).kv_heads == ()
        assert layout(partition, 2, 2, 2).kv_heads == layout(partition, 2, 2, 2).heads == ("data",)


def test_what_cannot_be_split_is_a_sentence():
    q, k, v, *_ = inputs(Shape(20, 20, Q=4, K=2, H=8))
    explicit = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(explicit), pytest.raises(ValueError, match="data of it is of type Explicit"):
        cross_attention(q, k, v, implementation="xla", partition=PARTITION)
    mesh = make_mesh(2, 1)

    def run(q, k, v):
        with interpret():
            return cross_attention(q, k, v, implementation="pallas_tpu")

    with jax.set_mesh(mesh), pytest.raises(ValueError, match="check_vma=False"):
        jax.jit(jax.shard_map(run, in_specs=(P("data"),) * 3, out_specs=P("data")))(q, k, v)


def test_rows_and_heads_that_do_not_divide_are_not_split():
    shape = Shape(20, 20, Q=3, K=3, H=8, B=3)
    mesh = make_mesh(2, 2)
    args = inputs(shape)
    attend = operation(shape, implementation="xla", partition=PARTITION)
    assert check(mesh, shape, args, attend, operation(shape, implementation="reference")) == []


@pytest.mark.parametrize("K", [1, 2])
def test_decode(K):
    q, k, v, *_ = inputs(Shape(1, 20, Q=4, K=K, H=8))
    lengths = jnp.array([7, 20])
    mesh = make_mesh(2, 2)
    with jax.set_mesh(mesh):
        run = jax.jit(lambda *x: decode_cross(*x, implementation="xla", partition=PARTITION))
        got = run(q[:, 0], k, v, lengths)
    want = decode_cross(q[:, 0], k, v, lengths, implementation="reference")
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert got.sharding.shard_shape(got.shape) == (1, 2, 8)


@pytest.mark.parametrize("window", [None, 12])
def test_xla_needs_no_partition_and_inside_a_shard_map_there_is_nothing_left_to_split(window):
    """Neither XLA's own split of plain operations nor a shard_map around them communicates."""
    shape = Shape(40, 40, window, Q=4, K=2, H=8)
    mesh = make_mesh(2, 2)
    args = put(mesh, inputs(shape))
    specs = tuple(x.sharding.spec for x in args)
    plain = gradients(operation(shape, implementation="xla"))
    inside = gradients(operation(shape, implementation="xla", partition=PARTITION))
    out_specs = (specs[0], specs[4], *specs[:3])
    with jax.set_mesh(mesh):
        mapped = jax.jit(jax.shard_map(inside, in_specs=specs, out_specs=out_specs))
        runs = [f.lower(*args).compile() for f in (plain, mapped)]
        want = gradients(operation(shape, implementation="reference"))(*args)
        for run in runs:
            assert not any(x in run.as_text() for x in COLLECTIVES)
            for got, x in zip(run(*args), want, strict=True):
                np.testing.assert_allclose(got, x, atol=2e-5, rtol=2e-5)


def test_a_rematerialized_layer_under_a_mesh_does_not_run_attention_again():
    shape = Shape(32, 32, 6, Q=2, K=2, H=8)
    args = inputs(shape)[:3]
    attend = operation(shape, implementation="xla", partition=PARTITION)

    def loops(policy):
        def loss(*x):
            return jnp.sin(attend(*x)).sum()

        gradient = jax.value_and_grad(jax.checkpoint(loss, policy=policy), (0, 1, 2))
        with jax.set_mesh(make_mesh(2, 2)):
            return str(jax.make_jaxpr(gradient)(*args)).count("shard_map[")

    keep = jax.checkpoint_policies.save_only_these_names("attn_out", "attn_lse")
    assert loops(keep) == 2
    assert loops(jax.checkpoint_policies.nothing_saveable) == 3
