"""The name and the work of a kernel, which profiles and compilers show."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels import Mask, api, decode_cross, decode_window, window_attention
from pallas_kernels.attention import flash
from pallas_kernels.call import Call
from pallas_kernels.device import Device
from tests.kernels.cases import Shape, inputs, operation, outputs_and_gradients

DEVICES = {
    "pallas_tpu": Device("tpu", "TPU v6 lite"),
    "pallas_gpu": Device("gpu", "NVIDIA H200"),
    "xla": Device("cpu", "cpu"),
}
GRADIENTS = {"pallas_tpu": ("dq", "dkv"), "pallas_gpu": ("dq", "dkv"), "xla": ("backward",)}


def traced(implementation: str, function, *args):
    """The jaxpr of the function on the implementation's device. This machine need not have it."""
    device = DEVICES[implementation]
    if reason := api.unsupported_reason(implementation, Call("cross_attention", device)):
        pytest.skip(reason)
    abstract = AbstractDevice(device_kind=device.kind, num_cores=1, platform=device.platform)
    types = (AxisType.Auto,)
    mesh = AbstractMesh((1,), ("x",), axis_types=types, abstract_device=abstract)
    shapes = jax.eval_shape(lambda: args)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.make_jaxpr(function)(*shapes).jaxpr


def names(jaxpr) -> set[str]:
    return set(re.findall(r"\battention_\w+", jaxpr.pretty_print(name_stack=True)))


@pytest.mark.parametrize("implementation", DEVICES)
@pytest.mark.parametrize(("kind", "window"), [("window", 100), ("full", None), ("full", 256)])
def test_attention(implementation, kind, window):
    """A window that hides no key runs as full attention."""
    shape = Shape(256, 256, window, H=64, B=1)
    attend = operation(shape, implementation=implementation)
    jaxpr = traced(
        implementation,
        lambda *x: outputs_and_gradients(attend, x),
        *inputs(shape, jnp.bfloat16),
    )
    parts = ("forward", *GRADIENTS[implementation])
    assert names(jaxpr) == {f"attention_{kind}_{part}_{implementation}" for part in parts}


@pytest.mark.parametrize("implementation", DEVICES)
@pytest.mark.parametrize("decode", [decode_window, decode_cross])
def test_decode_has_one_name_for_the_ring_and_the_cache(implementation, decode):
    q, k, v, *_ = inputs(Shape(1, 256, H=64), jnp.bfloat16)
    jaxpr = traced(
        implementation,
        lambda q, k, v, lengths: decode(q, k, v, lengths, implementation=implementation),
        q[:, 0],
        k,
        v,
        jnp.array([7, 256]),
    )
    assert names(jaxpr) == {f"attention_decode_{implementation}"}


def test_work_counts_visible_pairs():
    """Matrix products: forward has s and p v; dq has s, dp and ds k; dkv has s, dp, dk and dv."""
    q, k = jax.ShapeDtypeStruct((2, 29, 4, 8), float), jax.ShapeDtypeStruct((2, 20, 2, 8), float)
    age = 3 + np.arange(29)[:, None] - np.arange(20)[None, :]
    pairs = 2 * 4 * int(((age >= 0) & (age < 6)).sum())
    for kernel, products in (("forward", 2), ("dq", 3), ("dkv", 4)):
        work = flash.work(kernel, q, k, Mask(window=6, q_offset=3))
        assert work == (2 * products * pairs * 8, pairs)


def test_the_compiler_is_told_the_work_of_the_tpu_kernels():
    """The length is not a multiple of a block, and there are fewer K/V heads than query heads."""
    shape = Shape(300, 300, 60, Q=4, K=2, H=64, B=3)
    q, k, *_ = arrays = inputs(shape, jnp.bfloat16)

    def gradients(*args):
        return outputs_and_gradients(
            lambda *x, **options: window_attention(
                *x, window=60, implementation="pallas_tpu", **options
            ),
            args,
        )

    told = {}

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "pallas_call":
                told[eqn.params["name"].split("_")[2]] = eqn.params["cost_estimate"]
            else:
                for inner in jaxprs_in_params(eqn.params):
                    walk(inner)

    walk(traced("pallas_tpu", gradients, *arrays))
    assert sorted(told) == ["dkv", "dq", "forward"]
    for kernel, estimate in told.items():
        work = flash.work(kernel, q, k, Mask(window=60))
        assert (estimate.flops, estimate.transcendentals) == work
