"""Every config of the repository is possible, and impossible ones are refused in a sentence."""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from configs import base
from tests import tiny
from yocou_jax.config import Config
from yocou_jax.data.pipeline import Batch
from yocou_jax.errors import UserError
from yocou_jax.program import ARCHITECTURES
from yocou_jax.train import set_up

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem != "__init__")


def get_config(name, *preset):
    return importlib.import_module(f"configs.{name}").get_config(*preset)


def trace_a_step(config: Config):
    """Shapes of a whole training step on one device, without an array or a compilation."""
    setup = set_up(config, jax.devices()[:1])
    shape = (config.data.batch_size, config.data.sequence_length)
    ints = jax.ShapeDtypeStruct(shape, jnp.int32)
    extra = (jax.ShapeDtypeStruct(shape, jnp.float32), ints, ints) if config.data.packing else ()
    batch = Batch(ints, ints, *(extra or (None,) * 3))
    state = jax.eval_shape(setup.init)
    return state, *jax.eval_shape(setup.step, state, batch)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_traces_a_training_step(name):
    state, new, metrics = trace_a_step(Config.from_dict(get_config(name)))
    described = jax.tree.map(lambda x: (x.shape, x.dtype), (state, new))
    assert described[0] == described[1]
    assert metrics["loss"].shape == ()
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_a_preset_of_the_small_config(architecture):
    config = Config.from_dict(get_config("yocou_small", architecture))
    assert config.model.architecture == architecture
    if not (architecture == "parscale" and config.data.packing):
        trace_a_step(config)


def test_the_paper_presets():
    for name in ("yocou_1b", "yocou_1b_deep", "yocou_10b_moe"):
        for architecture in ARCHITECTURES:
            Config.from_dict(get_config(name, architecture))
    model = Config.from_dict(get_config("yocou_1b")).model
    assert str(model.program) == "window*10@3 | cross*10"
    assert (model.d_model, model.window, model.num_kv_heads * model.head_dim) == (2560, 512, 512)
    deep = Config.from_dict(get_config("yocou_1b_deep")).model
    assert (deep.num_layers, deep.d_model, deep.num_kv_heads * deep.head_dim) == (40, 1792, 512)
    moe = Config.from_dict(get_config("yocou_10b_moe")).model
    experts = (moe.num_experts, moe.experts_per_token, moe.num_shared_experts, moe.expert_width)
    assert experts == (64, 8, 1, 1024)


def test_configs_say_what_they_are_for():
    for name in CONFIGS:
        assert importlib.import_module(f"configs.{name}").__doc__


def test_round_trip():
    config = Config.from_dict(base.get_config())
    assert Config.from_dict(config.to_dict()) == config


def test_an_integer_is_a_number_but_not_the_other_way_round():
    assert tiny.config(optimizer={"weight_decay": 0}).optimizer.weight_decay == 0.0
    fields = base.get_config().to_dict()
    fields["model"]["d_model"] = 16.0
    with pytest.raises(UserError, match=r"model.d_model=16.0 must be of type int"):
        Config.from_dict(fields)
    fields["model"]["d_model"] = True
    with pytest.raises(UserError, match="must be of type int"):
        Config.from_dict(fields)


def test_unknown_and_missing_fields():
    fields = base.get_config().to_dict()
    fields["model"]["windw"] = 3
    with pytest.raises(UserError, match=r"no field 'model.windw'. Did you mean 'model.window'"):
        Config.from_dict(fields)
    del fields["model"]["windw"], fields["run"]["steps"]
    with pytest.raises(UserError, match=r"lacks the fields run.steps"):
        Config.from_dict(fields)


IMPOSSIBLE = [
    ({"num_layers": 0}, "model.num_layers=0 must be at least 1"),
    ({"window": 0}, "model.window=0 must be at least 1"),
    ({"num_heads": 4, "num_kv_heads": 3}, "num_heads=4 must be a multiple of"),
    ({"head_dim": 7}, "head_dim=7 must be even"),
    ({"dtype": "float16"}, "model.dtype='float16' is not one of"),
    ({"remat": "some"}, "model.remat='some' is not one of"),
    ({"num_experts": 4, "experts_per_token": 5}, "experts_per_token=5 is more than"),
    ({"gate_floor": 1.0}, "gate_floor=1.0 must be less than 1"),
    ({"prefix_length": -1}, "prefix_length=-1 must be at least 0"),
    ({"architecture": "cross*2"}, "begins with a cross stage"),
    ({"architecture": "yoco", "num_loops": 2}, "has no looped stage"),
    ({"optimizer": {"name": "sgd"}}, "optimizer.name='sgd'"),
    ({"optimizer": {"schedule": "linear"}}, "optimizer.schedule='linear'"),
    ({"optimizer": {"learning_rate": 0.0}}, "learning_rate=0.0 must be at least 1e-30"),
    ({"optimizer": {"decay_fraction": 0.0}}, "decay_fraction=0.0 must be more than 0"),
    ({"optimizer": {"warmup_steps": -1}}, "warmup_steps=-1 must be at least 0"),
    ({"optimizer": {"warmup_steps": 20}}, "warmup_steps=20 leaves nothing of run.steps=20"),
    (
        {"optimizer": {"accumulation_steps": 3}},
        "does not divide into optimizer.accumulation_steps=3",
    ),
    ({"data": {"batch_size": 0}}, "data.batch_size=0 must be at least 1"),
    ({"data": {"validation_fraction": 1.0}}, "validation_fraction=1.0 must be less than 1"),
    ({"mesh": {"data": 0}}, "needs sizes of at least 1"),
    ({"mesh": {"data": -1, "fsdp": -1}}, "at most one -1"),
    ({"run": {"steps": 0}}, "run.steps=0 must be at least 1"),
    ({"architecture": "parscale", "data": {"packing": True}}, "packing=True cannot be used"),
]


@pytest.mark.parametrize(("fields", "sentence"), IMPOSSIBLE, ids=[s for _, s in IMPOSSIBLE])
def test_an_impossible_config_is_refused_in_a_sentence(fields, sentence):
    with pytest.raises(UserError) as error:
        tiny.config(**fields)
    assert sentence in str(error.value)
    assert str(error.value).endswith(".")
