"""The installed versions of other packages say what yocou_jax/foreign.py reads.

What TensorStore says on a full disk is in test_checkpoint.py.
"""

import errno
import os

import jax
import jax.numpy as jnp
import pytest
from absl import flags

from yocou_jax import foreign


@pytest.fixture
def command() -> flags.FlagValues:
    flag_values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "A folder.", flag_values=flag_values, required=True)
    flags.DEFINE_integer("seed", 0, "A number.", flag_values=flag_values)
    return flag_values


def refusal(command: flags.FlagValues, *words: str) -> flags.Error:
    with pytest.raises(flags.Error) as error:
        command(["command", *words])
    return error.value


def test_absl_names_the_nearest_flag(command):
    error = refusal(command, "--workdr=x")
    assert foreign.NEAREST_FLAG.search(str(error))[1] == "workdir"
    error = refusal(command, "--something_else=x")
    assert not foreign.NEAREST_FLAG.search(str(error))


def test_absl_names_a_required_flag_that_is_not_given(command):
    error = refusal(command, "--seed=3")
    assert foreign.REQUIRED_FLAG.match(str(error))[1] == "workdir"
    error = refusal(command, "--workdir=x", "--seed=three")
    assert not foreign.REQUIRED_FLAG.match(str(error))


def test_absl_repeats_a_value_that_is_refused(command):
    error = refusal(command, "--workdir=x", "--seed=a: b")
    assert foreign.refused_flag(str(error), error.__context__) == "--seed=a: b"


def test_xla_says_when_memory_is_used_up():
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        jnp.zeros(2**50).block_until_ready()  # 32 times what a process can address
    assert foreign.out_of_memory(error.value)
    assert foreign.asked_bytes(error.value) == 2**52
    assert foreign.out_of_memory(MemoryError())
    assert not foreign.out_of_memory(jax.errors.JaxRuntimeError("INVALID_ARGUMENT: shapes."))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1.50GiB.", 1.5 * 2**30),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4096 bytes.", 4096),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1.50TiB.", 1.5 * 2**40),
        ("RESOURCE_EXHAUSTED: Error allocating device buffer: Attempting to allocate 8.00G. That "
         "was not possible. There are 5.2G free.", 2**33),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 33.25G of 15.75G hbm. "
         "Exceeded hbm capacity by 17.50G.", 33.25 * 2**30),
        ("RESOURCE_EXHAUSTED", None),
    ],
)  # fmt: skip
def test_how_much_memory_was_asked_for_as_accelerators_say_it(text, size):
    assert foreign.asked_bytes(RuntimeError(text)) == size


def test_what_the_system_says_is_found_in_a_long_text():
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        words = os.strerror(code)
        assert foreign.no_room(ValueError(f"UNKNOWN: {words} [tensorstore ...]\nmore")) == words
    assert foreign.no_room(ValueError("NOT_FOUND: a file")) is None
