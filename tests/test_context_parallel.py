"""Sequences that a mesh splits: the loss and the gradients of one device, and how little moves."""

import re

import jax
import numpy as np
import pytest

from tests import tiny
from tests.test_sharding import check, config_on, loss_and_gradients
from yocou_jax.config import MeshConfig
from yocou_jax.errors import UserError
from yocou_jax.model import context_parallel
from yocou_jax.sharding import length_ways, make_mesh
from yocou_jax.training.step import set_up

# data, fsdp, tensor, context: of 16 positions with a window of 4, four devices have 4 each, and
# eight have 2, so that a window layer needs the positions of two neighbors.
MESHES = [(1, 1, 1, 8), (2, 1, 1, 4), (1, 2, 2, 2), (1, 2, 1, 4), (1, 1, 4, 2)]


@pytest.mark.parametrize("mesh", tiny.quick(MESHES, (1, 1, 1, 8), (1, 1, 4, 2)), ids=str)
def test_loss_and_gradients_are_those_of_one_device(mesh):
    check(mesh)


CASES = {
    "packed": ((2, 1, 1, 4), {"packed": True}),
    "packed over two neighbors": ((1, 1, 1, 8), {"packed": True, "window": 7}),
    "full": ((2, 1, 1, 4), {"architecture": "transformer", "num_loops": None}),
    "full, packed": ((1, 1, 2, 4), {"architecture": "rins", "packed": True}),
    "streams": ((2, 1, 1, 4), {"architecture": "full*1, streams=2", "num_loops": None}),
    "upper loop": ((2, 1, 1, 4), {"architecture": "upper_loop"}),
    "upper loop, unshared": ((2, 1, 1, 4), {"architecture": "upper_loop_unshared"}),
    "looped full": ((2, 1, 1, 4), {"architecture": "universal_transformer"}),
    "without loops": ((2, 1, 1, 4), {"architecture": "yoco", "num_loops": None}),
    "cross_rope": ((1, 1, 1, 8), {"cross_rope": True, "qk_norm": True, "tie_embeddings": True}),
    "experts": ((1, 2, 2, 2), {"architecture": "window*1@2 | cross*1", **tiny.MOE}),
    "heads of two groups on a device": (
        (1, 2, 2, 2),
        {"num_heads": 6, "num_kv_heads": 3, "architecture": "window*1@2 | cross*2"},
    ),
    "more copies than heads": (
        (1, 2, 2, 2),
        {"num_heads": 12, "num_kv_heads": 3, "architecture": "window*1@2 | cross*2"},
    ),
    "window of two": ((1, 1, 1, 8), {"window": 2}),
    "window of everything": ((1, 1, 1, 8), {"window": 40}),
    "remat": ((1, 1, 2, 4), {"remat": "attention"}),
    "unrolled": ((2, 1, 1, 4), {"unroll": tiny.UNROLL}),
    "three loops of three kinds": ((2, 1, 1, 4), {"architecture": "window*1@2 | full*1 | cross*1"}),
    "a loss after each loop": ((1, 1, 1, 8), {"optimizer": {"loop_loss": "1,2"}}),
}
QUICK = ("packed over two neighbors", "full, packed", "heads of two groups on a device")


@pytest.mark.parametrize("name", tiny.quick(CASES, *QUICK))
def test_options_give_the_gradients_of_one_device(name):
    mesh, options = CASES[name]
    check(mesh, **options)


@pytest.mark.parametrize(
    ("mesh", "architecture", "kinds"),
    [
        ((1, 1, 1, 8), "full*1, streams=2", 2),  # keys of the text, and learned ones
        ((1, 1, 4, 2), "window*1@2 | cross*1", 2),  # in window layers, each has both K/V heads
        ((4, 1, 1, 1, 2), "full*1", 1),  # sums of experts, in a group that gathers
    ],
    ids=str,
)
def test_sums_over_devices_are_in_float32(mesh, architecture, kinds):
    """Of keys, values and experts, in the program before XLA changes it. (XLA's CPU backend sums in
    float32 whatever it is told, so values would show nothing.)"""
    experts = tiny.MOE if len(mesh) > 4 else {}
    config = config_on(mesh, architecture, num_loops=None, dtype="bfloat16", **experts)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        run = loss_and_gradients(config, batch := tiny.batch(), mesh)
        text = run.lower(tiny.params(config.model), batch).as_text()
    found = set()
    for kind in ("reduce_scatter", "all_reduce"):
        for types in re.findall(rf"stablehlo\.{kind}.*?\}}\) : \((.*?)\) ->", text, re.S):
            # Residual streams and the gradients of matrices have fewer axes; these are all-reduced.
            if kind == "reduce_scatter" or types.count("x") >= 4:
                assert "bf16" not in types
                found.add(kind)
    assert len(found) == kinds


# --- How little moves -----------------------------------------------------------------------------


COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


def collectives(architecture, axes=(2, 1, 1, 4), **fields):
    """What devices send in one step, usually over four parts of a sequence: [(kind, shape, whether
    it is inside a loop, name of the operation)]. A result of several arrays has an entry for
    each."""
    config = config_on(axes, architecture, **fields)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        run = loss_and_gradients(config, batch := tiny.batch(), mesh)
        text = run.lower(tiny.params(config.model), batch).compile().as_text()
    found, inside = [], None
    for line in text.splitlines():
        if begin := re.match(r"(ENTRY )?%?[\w.\-]+ \(.*\{$", line):
            inside = begin.group(1) is None
        if made := re.search(rf"= (.*?) ({COLLECTIVES})(?:-start)?\(", line):
            name = re.search(r'op_name="([^"]*)"', line)
            for shape in re.findall(r"\w+\[([\d,]*)\]", made.group(1)):
                sizes = tuple(map(int, shape.split(","))) if shape else ()
                found.append((made.group(2), sizes, inside, name.group(1) if name else ""))
    assert found
    return found


# Two sequences of a device have rank 4 as heads and rank 3 as residual streams; weights have rank 2
# and the layer axis.
def test_the_self_decoder_sends_halos_and_the_cross_decoder_nothing():
    """W - 1 = 3 positions of 2 K/V heads, keys and values in one array; forward and backward. Each
    application of a layer runs the body of the loops, which has one permute."""
    found = collectives("yoco_u", num_layers=4)
    moved = [one for one in found if one[2] and one[1] and one[1][0] == 4 and len(one[1]) > 2]
    assert [one[:2] for one in moved] == [("collective-permute", (4, 3, 4, 8))] * 2
    assert all("stage_0_window" in name for *_, name in moved)


def test_the_global_keys_and_values_are_gathered_and_reduced_once():
    for layers in (2, 4):
        found = collectives("yoco_u", num_layers=layers)
        kinds = [(kind, inside) for kind, *_, inside, name in found if "begin_cross/sh" in name]
        # Keys and values. An all-reduce and a slice would be as good as a reduce-scatter.
        assert kinds.count(("all-gather", False)) == 2
        assert kinds.count(("collective-permute", False)) == 2  # `deal`, forward and backward
        assert len([kind for kind, _ in kinds if kind in ("all-reduce", "reduce-scatter")]) == 2
        assert len(kinds) == 6


@pytest.mark.parametrize("axes", [(1, 1, 4, 2), (2, 1, 4, 1)], ids=str)
def test_the_gradients_of_keys_that_several_devices_read_are_summed_once(axes):
    """Four devices split the query heads, but cannot split the two K/V heads. A cross layer sends
    nothing of them. Each device has the one head that its query head reads."""
    found = collectives("window*1@2 | cross*3", axes, num_loops=None)
    keys = [one for one in found if len(one[1]) >= 4 and one[1][-1] == 8]
    assert not [name for *_, name in keys if "stage_1_cross" in name]
    summed = [one for one in keys if one[0] == "all-reduce"]
    assert [inside for _, _, inside, _ in summed].count(False) == 2  # keys and values
    gathered = [size for kind, size, *_ in keys if kind == "all-gather"]
    assert gathered == ([(8, 16, 1, 8)] * 2 if axes[3] > 1 else [])


def test_full_layers_gather_their_keys_in_every_layer():
    """So the tests above could fail."""
    found = collectives("transformer", num_layers=4, num_loops=None)
    moved = [one[:2] for one in found if one[2] and len(one[1]) > 2 and one[1][0] == 4]
    assert moved.count(("all-gather", (4, 16, 2, 8))) >= 2


def test_dealt_rows_see_equally_many_keys():
    """What `deal` is worth: with consecutive rows, the last of 8 devices has 1.9 times the mean
    number of pairs of a query and a key that it sees; with dealt rows, each has the same number."""
    ways, length = 8, 64
    positions = np.arange(length, dtype=np.float32)[None]
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1, context=ways))
    with jax.set_mesh(mesh):
        dealt = np.asarray(jax.jit(context_parallel.deal)(positions))
        again = np.asarray(jax.jit(context_parallel.deal)(dealt))
    np.testing.assert_array_equal(again, positions)
    pairs, before = ((x.reshape(ways, -1) + 1).sum(axis=1) for x in (dealt, positions))
    assert len(set(pairs)) == 1
    assert before.max() / before.mean() > 1.8


def test_lengths_that_cannot_be_split():
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=1, tensor=1, context=8))):
        assert [length_ways(n) for n in (16, 32, 8, 12, 1)] == [8, 8, 1, 1, 1]
    config = config_on((1, 1, 1, 8), data={"sequence_length": 24})
    with pytest.raises(
        UserError, match=r"sequence_length=24 must be a multiple of 16.* example 32"
    ):
        set_up(config)


def test_an_analysis_needs_whole_sequences():
    config = config_on((1, 1, 1, 8), run={"analysis": True})
    with pytest.raises(UserError, match=r"run.analysis=True cannot .* mesh.context=8: it looks at"):
        set_up(config)
