"""Eight virtual devices and one: same numbers, sharded arrays."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests import tiny
from yocou_jax.config import MeshConfig
from yocou_jax.data import load_data
from yocou_jax.errors import UserError
from yocou_jax.model import abstract_params, resolve_compute
from yocou_jax.program import ARCHITECTURES
from yocou_jax.sharding import (
    LOGICAL_AXES,
    MESH_AXES,
    SIZES,
    batch_sharding,
    make_mesh,
    spec_for,
    tree_shardings,
)
from yocou_jax.training.banner import banner
from yocou_jax.training.step import logical_axes, loss_fn, set_up

MESHES = [(d, f, 8 // (d * f)) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) if 8 % (d * f) == 0]

QUICK = {(2, 2, 2), (1, 1, 8)}
UNROLLED = (2, 2, 2)  # stages as in real runs on a CPU; on the other meshes and one device, loops


def config_on(mesh, architecture="yoco_u", **fields):
    sizes = dict(zip(MESH_AXES, mesh, strict=False))
    return tiny.config(architecture, mesh=sizes, **({"num_layers": 2, "num_loops": 2} | fields))


# --- The same numbers on every mesh ---------------------------------------------------------------


def gradients(config, batch, mesh):
    """Loss and gradients on a mesh, from the functions of a training step."""
    with jax.set_mesh(mesh):
        run = loss_and_gradients(config, batch, mesh)
        return jax.device_get(run(tiny.params(config.model), batch))


def loss_and_gradients(config, batch, mesh):
    """The function of parameters and a batch, jitted."""
    shardings = tree_shardings(abstract_params(config.model), mesh)
    targets = batch.targets.size if batch.loss_weights is None else batch.loss_weights.sum()

    @functools.partial(
        jax.jit,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(NamedSharding(mesh, PartitionSpec()), shardings),
    )
    def compute(params, batch):
        def objective(params):
            return loss_fn(
                params, batch, config, resolve_compute(config.compute), jnp.float32(targets)
            )[0]

        return jax.value_and_grad(objective)(params)

    return compute


@functools.cache
def on_one_device(config, packed):
    batch = tiny.packed_batch() if packed else tiny.batch()
    return gradients(config, batch, make_mesh(config.mesh, jax.devices()[:1]))


def check(mesh, architecture="yoco_u", packed=False, unroll=0, **extra):
    config = config_on(mesh, architecture, unroll=unroll, **extra)
    batch = tiny.packed_batch() if packed else tiny.batch()
    got = gradients(config, batch, make_mesh(config.mesh))
    expected = on_one_device(config_on((1, 1, 1), architecture, **extra), packed)
    tiny.assert_close(got, expected, 1e-5)


def test_there_are_ten_meshes_of_eight_devices():
    assert len(MESHES) == 10
    assert len(set(MESHES)) == 10


@pytest.mark.parametrize("mesh", tiny.quick(MESHES, *QUICK), ids=str)
def test_every_mesh_gives_the_loss_and_gradients_of_one_device(mesh):
    """tensor=4 and tensor=8 do not divide the heads: there are 4 query and 2 key/value heads."""
    check(mesh, unroll=tiny.UNROLL if mesh == UNROLLED else 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ((2, 2, 2), {"packed": True, "tie_embeddings": True, "qk_norm": True}),
        ((2, 2, 2), {"architecture": "window*1@2", **tiny.MOE}),
        ((1, 2, 4), {"architecture": "full*1, streams=2", "num_loops": None}),
    ],
    ids=["packed, tied, qk_norm", "experts", "streams"],
)
def test_options_on_a_mesh_give_the_gradients_of_one_device(mesh, options):
    check(mesh, **options)


# --- How arrays are sharded -----------------------------------------------------------------------


def _per_device(abstract):
    """Shapes of the parts on the first device, by the last keys of the path of each array."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    return {jax.tree_util.keystr(p): x.sharding.shard_shape(x.shape) for p, x in leaves}


def test_parameters_and_optimizer_state_are_really_sharded():
    config = config_on((2, 2, 2))
    setup = set_up(config)
    with jax.set_mesh(setup.mesh):
        state = setup.init()
    shapes = {
        jax.tree_util.keystr(path): x.addressable_shards[0].data.shape
        for path, x in jax.tree_util.tree_leaves_with_path(state.params)
    }
    layer = "['stage_0_window']['layers']"
    # D = 16, V = 32, F = 24, 4 query and 2 key/value heads of 8; fsdp halves D, tensor the rest.
    assert shapes["['embedding']"] == (16, 8)
    assert shapes["['head']"] == (8, 16)
    assert shapes[f"{layer}['attention']['query']['project']['kernel']"] == (1, 8, 2, 8)
    assert shapes[f"{layer}['attention']['output']['project']['kernel']"] == (1, 2, 8, 8)
    assert shapes[f"{layer}['attention_norm']['scale']"] == (1, 16)
    assert shapes[f"{layer}['feed_forward']['down']['kernel']"] == (1, 12, 8)
    # Both moments of AdamW are sharded like their parameters. The rest of the state are scalars.
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    expected = [x.sharding for x in jax.tree.leaves(state.params)] * 2
    assert [x.sharding for x in moments] == expected
    distinct = {x.sharding.spec for x in moments}
    assert len(distinct) > 3


def test_muon_state_is_sharded_like_the_parameters():
    config = config_on((1, 4, 2), optimizer={"name": "muon"})
    setup = set_up(config)
    named = {
        path: x.sharding
        for path, x in jax.tree_util.tree_leaves_with_path(setup.abstract_state.params)
    }
    count = 0
    for path, x in jax.tree_util.tree_leaves_with_path(setup.abstract_state.opt_state):
        for start in range(len(path)):
            if path[start:] in named:
                assert x.sharding == named[path[start:]]
                count += 1
    assert count >= len(named)
    embedding = [x for x in jax.tree.leaves(setup.abstract_state.opt_state) if x.shape == (32, 16)]
    assert {x.sharding.spec for x in embedding} == {next(iter(named.values())).spec}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_of_every_architecture_fits_every_mesh(architecture):
    """No collision and no unknown name, and fsdp splits every array that has the model width."""
    config = tiny.model(architecture, qk_norm=True, **tiny.MOE)
    boxed = abstract_params(config)
    for sizes in MESHES:
        mesh = make_mesh(MeshConfig(*sizes))
        for sharding, x, axes in zip(
            jax.tree.leaves(tree_shardings(boxed, mesh)),
            jax.tree.leaves(boxed),
            jax.tree.leaves(logical_axes(boxed), is_leaf=lambda x: isinstance(x, tuple)),
            strict=True,
        ):
            held = math.prod(sharding.shard_shape(x.shape))
            assert held * (sizes[1] if "embed" in axes else 1) <= x.size


def test_every_matrix_is_split_over_fsdp_and_tensor():
    """If the sizes divide, each device of fsdp=2, tensor=2 has a quarter (of a router a half)."""
    boxed = abstract_params(tiny.model("yoco_u", **tiny.MOE))
    shardings = jax.tree.leaves(tree_shardings(boxed, make_mesh(MeshConfig(2, 2, 2))))
    matrices = 0
    for (path, leaf), where in zip(
        jax.tree_util.tree_leaves_with_path(nn.unbox(boxed)), shardings, strict=True
    ):
        name = jax.tree_util.keystr(path)
        ways = 1 if name.endswith("['scale']") else 2 if "['router']" in name else 4
        assert math.prod(where.shard_shape(leaf.shape)) * ways == leaf.size, name
        matrices += ways == 4
    assert matrices > 20


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device of a TPU's torus, as `jax.make_mesh` sees it."""

    id: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    core_on_chip: int = 0
    process_index: int = 0
    slice_index: int = 0


def test_a_mesh_that_splits_an_axis_of_a_torus(caplog):
    """A torus of 4 x 4 x 4 chips has no axis of 8: jax.make_mesh refuses two of them."""
    chips = [Chip(i, (i % 4, i // 4 % 4, i // 16)) for i in range(64)]
    found = make_mesh(MeshConfig(data=8, context=8), chips).devices
    assert found.shape == (8, 1, 1, 8, 1)
    assert sorted(chip.id for chip in found.reshape(-1)) == list(range(64))
    assert "The mesh data=8, context=8 splits an axis of the torus" in caplog.text


def test_heads_that_do_not_divide_are_replicated():
    mesh = make_mesh(MeshConfig(1, 2, 4))
    axes = ("embed", "kv_heads", "head_dim")
    assert spec_for(axes, (16, 2, 8), mesh) == PartitionSpec(("fsdp", "context"), None, None)
    assert spec_for(axes, (16, 4, 8), mesh) == PartitionSpec(("fsdp", "context"), ("tensor",), None)
    rows = ("data", "fsdp", "expert")
    assert spec_for(("batch", "keys"), (6, 16), mesh) == PartitionSpec(rows, "context")
    assert spec_for(("batch", "keys"), (7, 16), mesh) == PartitionSpec(("data",), "context")
    mesh = make_mesh(MeshConfig(fsdp=2, context=4))
    assert spec_for(("embed",), (16,), mesh) == PartitionSpec(("fsdp", "context"))
    assert spec_for(("embed",), (20,), mesh) == PartitionSpec(("fsdp",))


def test_two_dimensions_cannot_use_the_same_mesh_axis():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    with pytest.raises(ValueError, match=r"'heads' and 'mlp'.*'tensor'"):
        spec_for(("heads", "mlp"), (4, 4), mesh)
    with pytest.raises(ValueError, match=r"'experst'.*not in LOGICAL_AXES"):
        spec_for(("experst",), (4,), mesh)
    with pytest.raises(ValueError, match="do not match"):
        spec_for(("embed",), (4, 4), mesh)


def test_the_table_names_only_mesh_axes():
    assert {axis for axes in LOGICAL_AXES.values() for axis in axes} <= set(MESH_AXES)
    split = {"fsdp", "tensor", "expert"}
    parameters = {name for name, axes in LOGICAL_AXES.items() if split & set(axes)}
    assert SIZES.keys() == parameters - {"batch"}


def test_make_mesh_fills_an_axis_of_minus_one():
    def sizes(*given):
        shape = make_mesh(MeshConfig(*given)).shape
        assert tuple(shape) == MESH_AXES
        return tuple(shape.values())

    assert sizes(-1, 2, 1) == (4, 2, 1, 1, 1)
    assert sizes(2, 1, -1) == (2, 1, 4, 1, 1)
    assert sizes(-1, 2, 4) == (1, 2, 4, 1, 1)
    assert sizes(1, 2, 1, -1) == (1, 2, 1, 4, 1)
    assert sizes(2, 1, 1, 2, -1) == (2, 1, 1, 2, 2)
    with pytest.raises(UserError, match="at most one -1"):
        MeshConfig(-1, -1, 1)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ((3, 1, 1), "data is 3 and must be 8. mesh.data=-1 would take all that"),
        ((1, 1, 16), "tensor is 16 and must be 8. mesh.tensor=-1 would take"),
        ((3, 5, 1), "data * fsdp is 15 and must be 8."),
        ((2, 1, 1, 3, 1), "data * context is 6 and must be 8. mesh.context=-1 would take all"),
        ((1, 1, 1), "data is 1 and must be 8. mesh.data=-1 would take all"),
        ((-1, 3, 1), "fsdp is 3, which does not divide 8."),
        ((-1, 1, 16), "tensor is 16, which does not divide 8."),
        ((16, 16, -1), "data * fsdp is 256, which does not divide 8."),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_a_proposal(sizes, reason):
    with pytest.raises(UserError) as error:
        make_mesh(MeshConfig(*sizes))
    names = zip(MESH_AXES, sizes, strict=False)
    asked = ", ".join(f"{axis}={size}" for axis, size in names if size != 1) or "data=1"
    start = f"A mesh of {asked} does not fit 8 devices: {reason}"
    assert str(error.value).startswith(start)
    assert "to -1" not in str(error.value)
    if "would take" in reason:  # the proposal works
        axis = str(error.value).partition("mesh.")[2].partition("=")[0]
        make_mesh(dataclasses.replace(MeshConfig(*sizes), **{axis: -1}))
    elif -1 not in sizes:
        assert str(error.value).endswith(reason)


def test_a_mesh_axis_that_splits_no_parameter_is_refused():
    with pytest.raises(UserError, match=r"mesh.fsdp=8 would split no parameter: 8 does not divide "
                       r"12 \(model.d_model\)\. Choose another mesh"):  # fmt: skip
        set_up(config_on((1, 8, 1), d_model=12))
    fields = {"d_ff": 20, "vocab_size": 30}
    with pytest.raises(UserError, match=r"mesh.tensor=8 would split no parameter: 8 does not"
                       r" divide 30 \(model.vocab_size\), 2 \(model.num_kv_heads\), "
                       r"4 \(model.num_heads\), 20 \(model.d_ff or model.expert_width\)\."
                       ):  # fmt: skip
        set_up(config_on((1, 1, 8), **fields))
    set_up(config_on((8, 1, 1), d_model=12, **fields))


def test_the_banner_names_what_is_not_split(tmp_path):
    config = config_on((2, 1, 4), d_ff=30)
    (tmp_path / "a.txt").write_text("hello world\n" * 500)
    fields = {"source": f"{tmp_path}/a.txt", "tokenizer": "bytes", "cache_dir": str(tmp_path)}
    data = load_data(dataclasses.replace(config.data, **fields))
    shown = banner(config, data, make_mesh(config.mesh, jax.devices()[:8]), {}, tmp_path)
    assert shown["device"]["not split"] == (
        "model.num_kv_heads=2 over tensor, model.d_ff or model.expert_width=30 over tensor"
    )
    shown = banner(config, data, make_mesh(MeshConfig(8, 1, 1), jax.devices()[:8]), {}, tmp_path)
    assert "not split" not in shown["device"]


def test_a_mesh_axis_that_splits_only_a_part_gives_a_warning(caplog):
    """tensor=8 does not split the heads (4 and 2): 16 * 8 * (12 + 8) weights of attention in the
    two layers, 512 of the global K/V, and 96 of norms. It splits feed-forward (2304) and vocabulary
    (1024). 3168 of 6496 are 49%."""
    set_up(config_on((1, 1, 8)))
    assert "mesh.tensor=8 leaves 49% of the parameters whole on every device" in caplog.text
    assert "8 does not divide 2 (model.num_kv_heads), 4 (model.num_heads)." in caplog.text
    caplog.clear()
    # All devices of a context group have whole parameters, but they share the positions.
    set_up(config_on((1, 2, 1, 4), d_model=12))
    assert "mesh.context=4 leaves 100% of the parameters whole on every device" in caplog.text
    assert "8 does not divide 12 (model.d_model)." in caplog.text
    caplog.clear()
    set_up(config_on((1, 8, 1)))
    set_up(config_on((2, 2, 2)))
    assert not caplog.text


@pytest.mark.parametrize("batch_size", [6, 12])
def test_a_batch_that_does_not_divide_is_refused(batch_size):
    with pytest.raises(UserError, match=rf"data.batch_size={batch_size}.*must be a multiple of 8"):
        set_up(config_on((4, 2, 1), data={"batch_size": batch_size}))


def test_a_step_outside_its_mesh_is_refused():
    """Without the mesh in the context, activations would not be split, and nobody would see it."""
    setup = set_up(config_on((8, 1, 1)))
    state, batch = setup.abstract_state, tiny.batch()
    with jax.set_mesh(setup.mesh):
        jax.eval_shape(setup.step, state, batch)
    for call in (
        setup.init,
        lambda: setup.step(state, batch),
        lambda: setup.evaluate(state.params, batch),
    ):
        with pytest.raises(RuntimeError, match=r"inside `with jax.set_mesh\(setup.mesh\)`"):
            jax.eval_shape(call)
    with jax.set_mesh(make_mesh(MeshConfig(4, 2, 1))), pytest.raises(RuntimeError, match="inside"):
        jax.eval_shape(setup.init)
