"""Every config of the repository is valid, and invalid ones are refused in a sentence."""

import dataclasses
import importlib
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from pallas_kernels import api
from tests import tiny
from yocou_jax import accounting
from yocou_jax.config import (
    ATTENTION,
    END,
    FIELDS,
    FREE,
    PROFILE_FROM,
    Config,
    DataConfig,
    ModelConfig,
    resumable,
)
from yocou_jax.data.pipeline import Batch
from yocou_jax.errors import UserError, shown
from yocou_jax.program import ARCHITECTURES
from yocou_jax.training.step import set_up

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem != "__init__")


def get_config(name, *preset):
    return importlib.import_module(f"configs.{name}").get_config(*preset)


def trace_a_step(config: Config):
    """Shapes of a whole training step on one device. Nothing is allocated or compiled."""
    setup = set_up(config, jax.devices()[:1])
    shape = (config.data.batch_size, config.data.sequence_length)
    ints = jax.ShapeDtypeStruct(shape, jnp.int32)
    extra = (jax.ShapeDtypeStruct(shape, jnp.float32), ints, ints) if config.data.packing else ()
    batch = Batch(ints, ints, *(extra or (None,) * 3))
    state = jax.eval_shape(setup.init)
    return state, *jax.eval_shape(setup.step, state, batch)


@pytest.mark.parametrize("name", tiny.quick(CONFIGS, "yocou_small", "yocou_10b_moe"))
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


@pytest.mark.parametrize("size", ["300m", "500m", "870m", "1.3b", "3.4b", "6.4b", "10.8b"])
def test_the_sizes_of_table_7_have_the_parameters_of_their_names(size):
    config = Config.from_dict(get_config("paper", size))
    assert (
        config.model.program
        == Config.from_dict(get_config("paper", f"{size},yoco_u")).model.program
    )
    billions = accounting.parameters(config.model).non_embedding / 1e9
    named = float(size[:-1]) / (1000 if size.endswith("m") else 1)
    assert billions == pytest.approx(named, rel=0.05)
    assert config.data.batch_size * config.data.sequence_length == 2**20
    assert config.model.d_model == 128 * config.model.num_heads


@pytest.mark.parametrize("preset", ["", "1b", "1.3b:yoco", "yoco_u", ",yoco_u"])
def test_a_size_that_the_paper_does_not_have(preset):
    with pytest.raises(UserError, match=r"is not one of: 300m, 500m, "):
        get_config("paper", preset)


def test_the_dial_sets_everything_from_the_depth():
    """With the depth, everything grows but the learning rate."""
    configs = [Config.from_dict(get_config("dial", f"d{depth}")) for depth in range(2, 34, 2)]
    sizes = [accounting.parameters(config.model).non_embedding for config in configs]
    assert sizes == sorted(sizes)
    rates = [config.optimizer.learning_rate for config in configs]
    assert rates == sorted(rates, reverse=True)
    for size, config in zip(sizes, configs, strict=True):
        tokens = config.run.steps * config.data.batch_size * config.data.sequence_length
        assert tokens == pytest.approx(20 * size, rel=0.01)
        assert config.data.sequence_length == 4 * config.model.window
    other = Config.from_dict(get_config("dial", "d12,transformer")).model
    assert (str(other.program), other.d_model) == ("full*12", 768)


@pytest.mark.parametrize("preset", ["", "d", "d3", "12", "d0", "d66", "d-4", "d4.0", "D4"])
def test_a_dial_that_is_not_a_depth(preset):
    with pytest.raises(UserError, match="must be d and an even depth from 2 to 64, as d12"):
        get_config("dial", preset)


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


def test_a_float_field_takes_an_integer_but_not_the_reverse():
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
    ({"dtype": "float16"}, "compute.dtype='float16' is not one of"),
    ({"remat": "some"}, "compute.remat='some' is not one of"),
    ({"num_experts": 4, "experts_per_token": 5}, "experts_per_token=5 is more than"),
    ({"gate_floor": 1.0}, "gate_floor=1.0 must be less than 1"),
    ({"prefix_length": -1}, "prefix_length=-1 must be at least 0"),
    ({"architecture": "cross*2"}, "begins with a cross stage"),
    ({"architecture": "yoco", "num_loops": 2}, "has no looped stage"),
    ({"architecture": "yoco", "num_loops": "1,2"}, "has no looped stage"),
    ({"num_loops": "1,1"}, "model.num_loops='1,1' must be a whole number, 2 to 32 different ones"),
    ({"optimizer": {"loop_loss": "1,x"}}, "loop_loss='1,x' must be numbers from 0 to 1000"),
    ({"optimizer": {"loop_loss": "0,1,0"}}, "such as '0.1,0.2,1', the last one above 0"),
    ({"optimizer": {"loop_loss": "1,1"}}, "2 weights, but the stage 'window*2@3' runs 3 times"),
    (
        {"architecture": "window*1@2 | cross*1@2", "optimizer": {"loop_loss": "1,1"}},
        "needs a program with one looped stage, not 'window*1@2 | cross*1@2'",
    ),
    (
        {"num_loops": "1,2", "optimizer": {"loop_loss": "1,1"}},
        "so it needs one loop count, not model.num_loops='1,2'",
    ),
    (
        {"optimizer": {"loop_loss": "1,1,1", "backprop_loops": 1}},
        "loop_loss='1,1,1' cannot be combined with optimizer.backprop_loops=1",
    ),
    (
        {"optimizer": {"backprop_loops": 4}},
        "backprop_loops=4 is more than the 3 loops of the model; none means all of them",
    ),
    (
        {"architecture": "yoco", "optimizer": {"backprop_loops": 1}},
        "backprop_loops=1 needs a looped stage, but the program is 'window*2 | cross*2'",
    ),
    ({"optimizer": {"name": "sgd"}}, "optimizer.name='sgd'"),
    ({"optimizer": {"schedule": "linear"}}, "optimizer.schedule='linear'"),
    ({"optimizer": {"learning_rate": 0.0}}, "learning_rate=0.0 must be at least 1e-30"),
    ({"optimizer": {"decay_fraction": 0.0}}, "decay_fraction=0.0 must be more than 0"),
    ({"optimizer": {"warmup_steps": -1}}, "warmup_steps=-1 must be at least 0"),
    ({"optimizer": {"warmup_steps": 20}}, "warmup_steps=20 leaves no step of run.steps=20"),
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
    ({"architecture": "full*10001"}, "'full*10001' has 10001 layers; there can be at most 10000"),
    ({"architecture": "full*1@10001"}, "'full*1@10001' has 10001 loops; there can be at most"),
    ({"architecture": "full*1, streams=1025"}, "has 1025 streams; there can be at most 1024"),
    ({"architecture": "full*" + "9" * 4000}, "layers; there can be at most 10000"),
    ({"num_loops": 10**9}, "num_loops=1000000000 must be at most 10000"),
    ({"attention": "flash"}, "attention='flash' is not one of auto, pallas_tpu"),
    ({"data": {"bad_rows": "keep"}}, "data.bad_rows='keep' is not one of refuse, skip"),
    ({"data": {"seed": -1}}, "data.seed=-1 must be at least 0"),
    (
        {"data": {"source": "0.5*python+0.5*hops(p=2, letters=4)"}},
        "has hops(...), in which each letter must be a token of its own",
    ),
    ({"run": {"seed": 2**32}}, "run.seed=4294967296 must be at most 4294967295"),
    ({"run": {"seed": 10**20}}, "run.seed=100000000000000000000 must be at most"),
    ({"run": {"keep_checkpoints": 1}}, "run.keep_checkpoints=1 must be at least 2"),
    ({"data": {"batch_size": 2**18, "sequence_length": 2**13}}, "is 2147483648 tokens; a batch"),
    ({"run": {"profile_steps": 11}}, "run.profile_steps=11 steps cannot be traced"),
    ({"optimizer": {"beta2": 1 - 1e-9}}, "optimizer.beta2=0.999999999 must be at most"),
]


@pytest.mark.parametrize(("fields", "sentence"), IMPOSSIBLE, ids=[s for _, s in IMPOSSIBLE])
def test_an_impossible_config_is_refused_in_a_sentence(fields, sentence):
    with pytest.raises(UserError) as error:
        tiny.config(**fields)
    assert sentence in str(error.value)
    assert str(error.value).endswith(".")


# --- What every field may be ----------------------------------------------------------------------

NUMBERS = [name for name, kinds in FIELDS.items() if kinds[0] in (int, float)]
TEXTS = [name for name, kinds in FIELDS.items() if kinds[0] is str]


def config_with(name: str, value) -> Config:
    group, field = name.split(".")
    return tiny.config(**({field: value} if group == "model" else {group: {field: value}}))


def refusal(name: str, value) -> str:
    fields = tiny.config().to_dict()
    group, field = name.split(".")
    fields[group][field] = value
    with pytest.raises(UserError) as error:
        Config.from_dict(fields)
    sentence = str(error.value)
    assert sentence.startswith(f"{name}=")
    assert sentence.endswith(".")
    assert len(sentence) < 300
    return sentence


def test_every_field_has_a_range_or_choices():
    """Except fields that are true or false."""
    groups = [field.type for field in dataclasses.fields(Config)]
    assert ModelConfig in groups
    assert DataConfig in groups
    for group in groups:
        for field in dataclasses.fields(group):
            assert field.type is bool or callable(field.metadata.get("rule")), field


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_a_range_and_the_sentence_names_its_ends(name):
    kind = FIELDS[name][0]
    for huge, words in ((-(10**40), "at least|more than"), (10**40, "at most|less than")):
        sentence = refusal(name, huge)
        match = re.search(rf"must be ({words}) (\S+)\.$", sentence)
        end = kind(float(match[2]))
        over = math.nextafter(end, huge) if kind is float else end + (1 if huge > 0 else -1)
        if abs(end) > 1e-300 and abs(end) < 2**53:
            assert match[0] in refusal(name, over)
        if match[1] in ("more than", "less than"):
            assert match[0] in refusal(name, end)
    if kind is float:
        assert refusal(name, math.nan) == f"{name}=nan must be a number."
        for infinite in (math.inf, -math.inf, 10**5000, -(10**5000)):
            assert "inf must be " in refusal(name, infinite)
    else:
        assert "bits> must be at most" in refusal(name, 10**5000)


@pytest.mark.parametrize("name", TEXTS)
def test_every_text_has_a_format_or_choices(name):
    for wrong in ("\0", "a\0b", "\udcff", "a" * 16_385):
        refusal(name, wrong)
    if name in ("run.sample_prompt", "data.end_of_text", "optimizer.loop_loss"):  # may be empty
        assert config_with(name, "")
        return
    for wrong in ("", " \n"):
        refusal(name, wrong)


def test_the_names_of_attention_are_those_of_the_kernels():
    assert ATTENTION == api.IMPLEMENTATIONS


def test_a_profile_must_end_within_the_run():
    assert tiny.config(run={"profile_steps": 20 - PROFILE_FROM})
    with pytest.raises(UserError, match=r"run.profile_steps=1 steps cannot be traced"):
        tiny.config(run={"steps": PROFILE_FROM, "profile_steps": 1})


def test_the_largest_model_can_be_traced():
    sizes = dict.fromkeys(("d_model", "d_ff", "expert_width"), 2**20)
    sizes |= dict.fromkeys(("num_heads", "num_kv_heads", "head_dim"), 65_536)
    sizes |= {"num_experts": 65_536, "experts_per_token": 8, "num_shared_experts": 1024}
    sizes |= {"vocab_size": 10_000_000, "window": 2**30}
    run = {"steps": 2**31 - 1, "seed": 2**32 - 1}
    trace_a_step(tiny.config("window*5000@10000 | cross*5000", **sizes, run=run))


def test_data_vocab_size_follows_model_vocab_size_but_not_the_reverse():
    c = base.get_config()
    c.model.vocab_size = 1000
    assert c.data.vocab_size == 1000
    c.data.vocab_size = 300
    assert (c.model.vocab_size, c.data.vocab_size) == (1000, 300)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": 3}, "model=3 must be a group of fields."),
        ({"model": None}, "model=None must be a group of fields."),
        ({"model": []}, "model=[] must be a group of fields."),
        (
            {"mesh": {}},
            "The config lacks the fields mesh.data, mesh.fsdp, mesh.tensor, "
            "mesh.context, mesh.expert.",
        ),
        ({"modle": {}}, "The config has no field 'modle'."),
        ({3: {}}, "The config has no field '3'."),
        ({"steps": 3}, "The config has no field 'steps'. Did you mean 'run.steps'?"),
    ],
)
def test_a_wrong_nesting_is_refused(change, sentence):
    with pytest.raises(UserError) as error:
        Config.from_dict(base.get_config().to_dict() | change)
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize("nothing", [None, 3, "model", [1], ["model"]])
def test_a_value_that_is_not_a_config_is_refused(nothing, unchecked):
    with pytest.raises(UserError, match=r"^The config .* must be a group of fields\.$"):
        Config.from_dict(nothing)


@pytest.mark.parametrize(
    ("value", "found"),
    [(np.int64(3), "int64"), ([3], "list"), ("3", "str"), (3.0, "float"), (None, "none")],
    ids=str,
)
def test_a_value_of_another_type_is_refused_by_name(value, found):
    assert refusal("run.steps", value).endswith(f"must be of type int, not {found}.")


def test_long_values_are_shown_in_part():
    assert shown("a" * 99_999) == "'" + "a" * 59 + " ... " + "a" * 19 + "'"
    assert shown(10**9999) == "<a number of 33216 bits>"
    assert shown("full*2") == "'full*2'"


def test_fields_that_may_change_when_a_run_is_resumed():
    """All other fields change the mathematics or the data of a run."""
    assert set(resumable(END)) == {
        *("run.steps", "optimizer.schedule", "optimizer.decay_fraction"),
        "optimizer.final_fraction",
    }
    assert set(resumable(FREE)) == {
        *("compute.attention", "compute.remat", "compute.scan", "compute.unroll"),
        *("data.cache_dir", "data.verify", "data.validation_sequences"),
        *("mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.context", "mesh.expert"),
        *("optimizer.max_skipped_updates", "run.log_every", "run.eval_every", "run.sample_every"),
        *("run.sample_prompt", "run.sample_tokens", "run.checkpoint_every"),
        *("run.keep_checkpoints", "run.profile_steps", "run.analysis"),
    }
