"""Inference on a mesh that splits positions: what one device computes, and how little moves."""

import functools

import jax
import numpy as np
import pytest

from benchmarks.hlo import collectives
from tests import tiny
from tests.inference.test_inference import (
    LENGTHS,
    PROMPTS,
    TEXT,
    assert_equal,
    check_against_the_forward_pass,
    expected,
    model,
)
from yocou_jax.config import MeshConfig
from yocou_jax.inference import Sampling, default_sizes, generate, score
from yocou_jax.inference.forward import programs
from yocou_jax.sharding import make_mesh


def mesh(data=1, fsdp=1, tensor=1, context=1):
    return jax.set_mesh(make_mesh(MeshConfig(data, fsdp, tensor, context)))


# A chunk of 16 positions is split, so that eight devices have 2 each, fewer than the window has. A
# chunk of 5 cannot be split, but the caches are. 24 slots, or 32: then whole chunks fit. With two
# devices, a chunk of 4 fits into the slots of one, and may begin on one and end on the other.
CASES = {
    "yoco_u": ("yoco_u", {"context": 8}, 16, 24, {}),
    "whole chunks": ("yoco_u", {"context": 8}, 16, 32, {}),
    "chunks on both sides": ("yoco_u", {"tensor": 4, "context": 2}, 4, 36, {"num_kv_heads": 2}),
    "chunks that are not split": ("yoco_u", {"data": 2, "context": 4}, 5, 24, {}),
    "full": ("transformer", {"data": 2, "tensor": 2, "context": 2}, 8, 24, {"num_loops": None}),
    "full, whole chunks": ("transformer", {"context": 8}, 16, 32, {"num_loops": None}),
    "three kinds": ("window*1@2 | full*1 | cross*1", {"context": 8}, 16, 24, {"cross_rope": True}),
    "a long window": ("yoco_u", {"data": 2, "context": 4}, 8, 24, {"window": 7}),
    # 24 + 3 slots cannot be split over 8 devices, and 21 + 3 can.
    "streams": ("parscale", {"context": 8}, 16, 24, {}),
    "streams that are split": ("parscale", {"context": 8}, 16, 29, {}),
}
QUICK = ("yoco_u", "full", "streams that are split")


@pytest.mark.parametrize("name", tiny.quick(CASES, *QUICK))
def test_prefill_and_decode_are_the_forward_pass(name):
    architecture, sizes, chunk, capacity, fields = CASES[name]
    model(config := tiny.model(architecture, **fields))  # before there is a mesh: it is kept
    with mesh(**sizes):
        check_against_the_forward_pass(config, chunk=chunk, capacity=capacity, steps=3)


@pytest.mark.parametrize("name", tiny.quick(CASES, "whole chunks"))
def test_scores_are_the_forward_pass(name):
    architecture, sizes, chunk, capacity, fields = CASES[name]
    config = tiny.model(architecture, **fields)
    tokens, want = np.asarray(tiny.tokens(len(LENGTHS), TEXT)), expected(config)
    logps, run = tiny.logprobs(want, tokens), model(config)
    with mesh(**sizes):
        found = score(run, tokens[:, :17], LENGTHS, capacity=capacity, chunk=chunk)
    for row, length in enumerate(LENGTHS):
        scale = np.abs(want).max()
        assert_equal(found.logprobs[row, 1:length], logps[row, : length - 1], scale)
        assert_equal(found.logits[row], want[row, length - 1], scale)


def test_devices_that_share_positions_generate_what_one_does():
    config = tiny.model("yoco_u", num_layers=2)
    options = {"max_new_tokens": 6, "sampling": Sampling(temperature=0.7), "num_samples": 2}
    one = generate(run := model(config), PROMPTS, **options)
    with mesh(data=2, context=4):
        many = generate(run, PROMPTS, **options)
    np.testing.assert_array_equal(many.tokens, one.tokens)
    stored = many.memory.global_kv.k
    assert stored.addressable_shards[0].data.size == stored.size / 8  # rows and slots


def test_sizes_can_be_split():
    with mesh(context=8):
        assert default_sizes(1, 100_000, 64) == (114_688, 16_384)  # 2,048 positions on each device
        assert default_sizes(1, 17, 8) == (32, 32)
        assert default_sizes(1, 17, 20) == (40, 32)
        assert default_sizes(4, 90, 20, capacity=111, chunk=7) == (111, 7)


# --- How little moves -----------------------------------------------------------------------------


@functools.cache
def moved(program: str, architecture: str, layers: int, capacity: int):
    """The collectives of a program on eight devices that share the positions of one text."""
    config = tiny.model(architecture, num_layers=layers, num_loops=None)
    run = model(config)
    with mesh(context=8):
        lowered = programs(run, 1, capacity, 16)[program]()
        return collectives(lowered.compile().as_text(), 8)


def sent(*args) -> float:
    return sum(one.sent * one.times for one in moved(*args))


@pytest.mark.parametrize("architecture", ["window*2@2 | cross*2", "full*2"])
def test_a_decode_step_moves_no_keys(architecture):
    """So what it sends does not depend on the size of the cache."""
    assert sent("decode_step", architecture, 2, 64) == sent("decode_step", architecture, 2, 256) > 0


def test_prefill_gathers_the_global_keys_and_values_once_and_full_layers_gather_theirs():
    """Each of 8 devices sends its 2 of 16 positions to 7 others: keys and values of 2 heads of
    width 8, in float32. The model has window layers of 4 keys and cross layers, or full layers."""
    once = 2 * 7 * (2 * 2 * 8) * 4

    def gathered(architecture):
        found = moved("prefill_chunk", architecture, 2, 64)
        return sum(one.sent * one.times for one in found if one.kind == "all-gather")

    assert gathered("window*2@2 | cross*2") == gathered("window*2@4 | cross*2") == once
    assert gathered("full*4") == 2 * gathered("full*2") > 4 * once
