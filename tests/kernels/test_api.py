"""The choice of an implementation, and the sentences for calls that cannot run."""

import logging

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels import (
    IMPLEMENTATIONS,
    OPERATIONS,
    Call,
    SegmentIds,
    UnsupportedCall,
    api,
    choose_implementation,
    cross_attention,
    decode_cross,
    decode_window,
    interpret,
    window_attention,
)
from pallas_kernels.device import Device, target_device

q, k = jnp.ones((2, 6, 4, 8)), jnp.ones((2, 6, 2, 8))
ids = jnp.zeros((2, 6), int)
length = jnp.array([1, 2])
DEVICES = (
    Device("cpu", "cpu"),
    Device("tpu", "TPU v5 lite"),
    Device("gpu", "NVIDIA H200"),
    Device("gpu", "NVIDIA A100-SXM4-80GB"),
    Device("gpu", "NVIDIA L4"),
    Device("gpu", "AMD Instinct MI300X"),
)

CALLS = {
    "is not one of: auto, pallas_tpu, pallas_gpu, triton, cudnn, xla, reference": lambda: (
        cross_attention(q, k, k, implementation="flash")
    ),
    "window=0 to be at least 1": lambda: window_attention(q, k, k, window=0),
    "q_offset=-1 to be at least 0": lambda: cross_attention(q, k, k, q_offset=-1),
    r"multiple of the number of key/value heads; got 3 and 2": lambda: cross_attention(
        q[:, :, :3], k, k
    ),
    r"k and v of one shape .* k \(2, 6, 2, 8\), v \(2, 5, 2, 8\)": lambda: cross_attention(
        q, k, k[:, :5]
    ),
    r"agree in batch and head width; got q \(2, 6, 4, 7\)": lambda: cross_attention(
        q[..., :7], k, k
    ),
    "no axis of length 0": lambda: cross_attention(q, k[:, :0], k[:, :0]),
    r"q as \[B, N, Q, H\]; got shape \(2, 4, 8\)": lambda: cross_attention(q[:, 0], k, k),
    "k and v in float32; got float32, bfloat16": lambda: cross_attention(
        q, k.astype(jnp.bfloat16), k.astype(jnp.bfloat16)
    ),
    r"SegmentIds\(q=\[B, N\], kv=\[B, S\]\) when there are 5 queries and 6 keys": lambda: (
        cross_attention(q[:, :5], k, k, segment_ids=ids)
    ),
    r"integer segment ids of shape \(2, 6\) for kv": lambda: cross_attention(
        q, k, k, segment_ids=SegmentIds(ids, ids[:, :5])
    ),
    r"kv_lengths as 2 integers": lambda: cross_attention(q, k, k, kv_lengths=jnp.array([1])),
    r"lengths as 2 integers, one per row; got float32\(2,\)": lambda: decode_cross(
        q[:, 0], k, k, length * 1.0
    ),
    r"q as \[B, Q, H\], one query per row": lambda: decode_window(q, k, k, length),
}


@pytest.mark.parametrize("sentence", CALLS)
def test_a_wrong_call_is_answered_with_a_sentence(sentence, unchecked):
    with pytest.raises(ValueError, match=sentence) as error:
        CALLS[sentence]()
    assert str(error.value).endswith(".")


@pytest.mark.parametrize(
    ("name", "why"),
    {
        "pallas_tpu": "needs a TPU; this computation is for cpu",
        "pallas_gpu": "",  # the files of the GPU implementations test their sentences
        "triton": "",
        "cudnn": "",
    }.items(),
)
def test_a_named_implementation_runs_or_raises(name, why):
    with pytest.raises(UnsupportedCall, match=f"cannot run with implementation='{name}': .*{why}"):
        window_attention(q, k, k, window=2, implementation=name)


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"q_shape": (1, 8, 2, 300)}, "heads of width 64, 128, 256; got 300"),
        (
            {
                "q_shape": (1, 2**16, 8, 256),
                "k_shape": (1, 2**16, 1, 256),
                "dtype": jnp.bfloat16,
                "window": 2**15,
            },
            "MB of VMEM for a window of 32768 and 8 heads of 256 per group; TPU v6 lite",
        ),
        ({"dtype": jnp.float16}, "take bfloat16 or float32; got float16"),
    ],
)
def test_what_the_tpu_kernels_do_not_take(facts, why):
    device = Device("tpu", "TPU v6 lite")
    with pytest.raises(UnsupportedCall, match=why):
        choose_implementation(
            "cross_attention", implementation="pallas_tpu", device=device, **facts
        )
    assert choose_implementation("cross_attention", device=device).implementation == "pallas_tpu"
    assert choose_implementation("cross_attention", device=device, **facts).implementation == "xla"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_auto_resolves_to_xla_and_says_why(operation):
    choice = choose_implementation(operation)
    assert (choice.operation, choice.implementation) == (operation, "xla")
    assert choice.reason
    assert choose_implementation(operation, implementation="reference").reason


def test_auto_does_not_take_an_interpreted_kernel():
    with interpret():
        assert choose_implementation("cross_attention").implementation == "xla"
        named = choose_implementation("cross_attention", implementation="pallas_tpu")
    assert named.implementation == "pallas_tpu"


def test_unknown_operation():
    with pytest.raises(ValueError, match="operation='flash' is not one of: window_attention"):
        choose_implementation("flash")


def test_every_implementation_answers_for_every_operation():
    for name in IMPLEMENTATIONS[1:]:
        for operation in OPERATIONS:
            for device in DEVICES:
                reason = api.unsupported_reason(name, Call(operation, device))
                assert reason is None or reason.endswith(".")


def test_the_device_is_that_of_the_mesh():
    """The mesh may be abstract. Without a mesh, the device is jax's default."""
    assert target_device() == Device("cpu", "cpu")
    for device in DEVICES:
        abstract = AbstractDevice(device_kind=device.kind, num_cores=1, platform=device.platform)
        types = (AxisType.Auto,)
        mesh = AbstractMesh((2,), ("x",), axis_types=types, abstract_device=abstract)
        with jax.sharding.use_abstract_mesh(mesh):
            assert target_device() == device


def test_compute_capability():
    assert [device.compute_capability for device in DEVICES] == [None, None, 90, 80, 89, None]
    known = {"H100 PCIe": 90, "GH200": 90, "B200": 100, "L40S": 89, "A10": 86}
    assert {k: Device("gpu", f"NVIDIA {k}").compute_capability for k in known} == known


def test_an_implementation_that_is_added_is_chosen_by_auto(monkeypatch):
    """It gets the calls that it supports; xla gets the others."""

    def only_windows(call):
        return None if call.window else "It only does windows."

    fake = api.Implementation(only_windows, lambda q, *_, **__: (q + 41, q[..., 0]), None)
    monkeypatch.setitem(api._REGISTRY, "pallas_tpu", fake)
    assert (window_attention(q, k, k, window=2) == 42).all()
    assert not (cross_attention(q, k, k) == 42).any()
    with pytest.raises(UnsupportedCall, match="It only does windows"):
        cross_attention(q, k, k, implementation="pallas_tpu")


def test_kernels_get_lengths_within_the_array_and_windows_within_the_text(monkeypatch):
    """More than W positions were written to a ring of W slots, but kernels need not know this."""
    got = []

    def attention(q, k, v, mask, **_):
        got.append((mask.window, None if mask.lengths is None else mask.lengths.tolist()))
        return q, q[..., 0]

    def decode(q, k, v, valid, **_):
        got.append((None, valid.tolist()))
        return q, q[..., 0]

    fake = api.Implementation(lambda call: None, attention, decode)
    monkeypatch.setitem(api._REGISTRY, "pallas_tpu", fake)
    beyond = jnp.array([-1, 7])
    cross_attention(q, k, k, kv_lengths=beyond)
    for operation in (decode_window, decode_cross):
        operation(q[:, 0], k, k, beyond)
    assert got == [(None, [0, 6])] * 3
    got.clear()
    for window in (5, 6, 7, 2**31 - 1):
        window_attention(q, k, k, window=window)
    window_attention(q, jnp.ones((2, 9, 2, 8)), jnp.ones((2, 9, 2, 8)), window=9, q_offset=3)
    assert [window for window, _ in got] == [5, 6, 6, 6, 9]


def test_the_choice_is_logged_once(caplog):
    api._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="pallas_kernels"):
        for _ in range(3):
            cross_attention(q, k, k)
            decode_cross(q[:, 0], k, k, length)
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [
        "cross_attention runs on xla",
        "decode_cross runs on xla",
    ]
