"""The arguments that cuDNN gets. On the CPU, jax.nn's own implementation computes with them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Call, Mask, api, choose_implementation, interpret
from pallas_kernels.attention import cudnn, reference
from pallas_kernels.device import Device
from tests.kernels.cases import Shape, inputs

H100, L4 = Device("gpu", "NVIDIA H100 80GB HBM3"), Device("gpu", "NVIDIA L4")


@pytest.fixture
def no_cudnn(monkeypatch):
    original = jax.nn.dot_product_attention

    def answer(*args, implementation, **options):
        assert implementation == "cudnn"
        return original(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", answer)


@pytest.mark.parametrize(
    ("window", "lengths"), [(None, None), (1, None), (5, None), (None, [0, 9])]
)
def test_values_and_gradients(window, lengths, no_cudnn):
    args = inputs(Shape(11, 11, Q=4))[:4]
    mask = Mask(window, lengths=None if lengths is None else jnp.array(lengths))

    def run(attention):
        def gradients(q, k, v, d_out):
            out, vjp = jax.vjp(lambda *x: attention(*x, mask, scale=0.3)[0], q, k, v)
            return out, *vjp(d_out)

        return jax.jit(gradients)(*args)

    for got, want in zip(run(cudnn.attention), run(reference.attention), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_decode(no_cudnn):
    q, k, v, *_ = inputs(Shape(1, 12, Q=4, B=3))
    args = q[:, 0], k, v, jnp.array([0, 5, 12])
    (got, _), (want, _) = (f(*args, scale=0.5) for f in (cudnn.decode, reference.decode))
    np.testing.assert_allclose(got, want, atol=1e-5)


REASONS = {
    "needs an NVIDIA GPU; this computation is for cpu": {"device": Device("cpu", "cpu")},
    "8.0 .* or newer; got Tesla T4": {"device": Device("gpu", "Tesla T4")},
    "bfloat16 or float16; got float32": {"dtype": jnp.float32},
    "up to 128, a multiple of 8, on NVIDIA L4; got 256": {
        "device": L4,
        "q_shape": (1, 8, 2, 256),
    },
    "without segment ids": {"segments": True},
    "counts queries and keys from 0; got q_offset=3": {"q_offset": 3},
    "got 8 queries and 9 keys": {"q_shape": (1, 8, 2, 64), "k_shape": (1, 9, 2, 64)},
    "rounds cuDNN's lse": {"return_lse": True},
}


@pytest.mark.parametrize("sentence", REASONS)
def test_what_it_cannot_do_is_said_in_a_sentence(sentence, monkeypatch):
    monkeypatch.setattr("pallas_kernels.attention.cudnn.is_here", lambda device: True)
    choose = functools.partial(choose_implementation, "cross_attention", implementation="cudnn")
    assert choose(device=H100).implementation == "cudnn"
    with pytest.raises(ValueError, match=sentence) as error:
        choose(**{"device": H100, **REASONS[sentence]})
    assert str(error.value).endswith(".")


def test_it_needs_the_gpu_itself():
    reason = api.unsupported_reason("cudnn", Call("decode_cross", H100))
    assert "NVIDIA H100 80GB HBM3 is only named here, not present." in reason
    with interpret():
        assert "cannot be interpreted" in api.unsupported_reason(
            "cudnn", Call("decode_cross", H100)
        )
