"""Memory that is used up is one sentence in every command."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from tests import tiny
from yocou_jax.device_memory import memory_errors, memory_of, training_hints
from yocou_jax.errors import UserError


def too_much(*_):
    jnp.zeros(2**50).block_until_ready()  # 32 times what a process can address


def test_one_sentence_says_what_was_asked_what_there_is_and_what_helps():
    there = memory_of(jax.devices()[0]) / 2**30
    with pytest.raises(UserError) as error, memory_errors("A step", ["this", "that", "more", "x"]):
        too_much()
    assert str(error.value) == (
        f"A step does not fit into the memory of the device ({there:.3g} GiB, no room for "
        "4.19e+06 GiB). It would help, in this order: this, that, more."
    )
    with (
        pytest.raises(UserError, match=r"memory of this machine\. It would"),
        memory_errors("", []),
    ):
        raise MemoryError  # of the host, which does not say how much was asked for


@pytest.mark.parametrize(
    ("stats", "size"),
    [({"bytes_limit": 7 * 2**30, "bytes_in_use": 2**30}, 7 * 2**30), ({}, None), (None, None)],
)
def test_the_memory_of_an_accelerator(stats, size):
    device = SimpleNamespace(platform="gpu", device_kind="x", memory_stats=lambda: stats)
    assert memory_of(device) == size
    h200 = SimpleNamespace(**vars(device) | {"device_kind": "NVIDIA H200"})
    assert memory_of(h200) == (size or 141 * 2**30)


def test_other_errors_pass():
    with pytest.raises(jax.errors.JaxRuntimeError, match="shapes"), memory_errors("A step", ["x"]):
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: shapes.")


def test_what_helps_depends_on_what_the_run_already_does():
    config = tiny.config(data={"batch_size": 8})
    first = ["compute.remat=full", "a larger optimizer.accumulation_steps"]
    assert training_hints(config, 1, 1)[:3] == [*first, "a shorter data.sequence_length"]
    assert training_hints(config, 8, 4)[:3] == [*first, "a larger mesh.fsdp (state)"]
    assert training_hints(config, 8, 8)[0] == "compute.remat=full"
    assert training_hints(config, 8, 8)[1] == "a larger mesh.fsdp (state)"
    least = tiny.config(remat="full", data={"batch_size": 1})
    assert training_hints(least, 1, 1) == ["a shorter data.sequence_length", "a smaller model"]
