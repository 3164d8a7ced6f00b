"""Compares the configs with arXiv 2604.01220: hyperparameters, sizes, figures in docstrings."""

import dataclasses
import importlib
import inspect
import re

import pytest

from tests import tiny
from yocou_jax import accounting, program
from yocou_jax.config import Config, ModelConfig
from yocou_jax.model import LanguageModel
from yocou_jax.program import ARCHITECTURES
from yocou_jax.training.optimizer import make_optimizer

NAMES = ("yocou_small", "yocou_125m", "yocou_1b", "yocou_1b_deep", "yocou_10b_moe")


def module(name: str):
    return importlib.import_module(f"configs.{name}")


def config(name: str, architecture: str = "yoco_u") -> Config:
    return Config.from_dict(module(name).get_config(architecture))


def figures(model: ModelConfig) -> dict[str, int]:
    """Parameters in the usual counts: all or active, with or without embedding and head."""
    found = accounting.parameters(model)
    ends = found.total - found.non_embedding
    return {
        "total": found.total,
        "active": found.active,
        "non_embedding": found.non_embedding,
        "active_non_embedding": found.active - ends,
    }


# --- Hyperparameters ------------------------------------------------------------------------------

# Section 4.1 and Table 6. Section 4.2 and appendix E use the same, except the fields below.
MODEL = {"num_heads": 20, "num_kv_heads": 4, "head_dim": 128, "window": 512, "cross_rope": False}
OPTIMIZER = {
    **{"name": "adamw", "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1},
    **{"learning_rate": 1e-3, "schedule": "constant", "warmup_steps": 0},
}
EXPERTS = {
    **{"num_experts": 64, "experts_per_token": 8, "num_shared_experts": 1, "expert_width": 1024},
    "vocab_size": 151_936,
}
WIDE = {"d_model": 2560, "num_layers": 20}
DEEP = {"d_model": 1792, "num_layers": 40, "num_heads": 16}  # the paper does not give the heads
# config: sizes that differ, updates, millions of tokens of each
PAPER = {
    "yocou_1b": (MODEL | WIDE, 20_000, 1),
    "yocou_1b_deep": (MODEL | DEEP, 20_000, 1),
    "yocou_10b_moe": (MODEL | WIDE | EXPERTS, 75_000, 4),
}


@pytest.mark.parametrize("name", PAPER)
def test_configs_have_the_hyperparameters_of_the_paper(name):
    sizes, steps, millions = PAPER[name]
    found = config(name)
    for group, expected in ((found.model, sizes), (found.optimizer, OPTIMIZER)):
        assert {field: getattr(group, field) for field in expected} == expected
    assert found.run.steps == steps
    assert found.data.sequence_length == 8192
    assert found.data.batch_size * found.data.sequence_length == millions * 2**20
    half = found.model.num_layers // 2
    assert str(found.model.program) == f"window*{half}@3 | cross*{half}"


def test_loop_counts_are_those_of_the_paper():
    """3 for the self-decoder, RINS and the upper loop (4.2, appendix E, Table 5), 2 for UT."""
    loops = {name: re.findall(r"@(\d+)", text) for name, text in ARCHITECTURES.items()}
    once = {name: [] for name in ("yoco", "transformer", "parscale")}
    thrice = {name: ["3"] for name in ("yoco_u", "rins", "upper_loop", "upper_loop_unshared")}
    assert loops == once | thrice | {"universal_transformer": ["2"]}
    assert "streams=2" in ARCHITECTURES["parscale"]


# --- Sizes ----------------------------------------------------------------------------------------

# Table 7: billions in the name, D, layers, heads. K/V heads are chosen here: 4 do not divide 18.
TABLE_7 = [
    (0.3, 1536, 12, 12),
    (0.5, 2048, 12, 16),
    (0.87, 2304, 16, 18),
    (1.3, 2560, 20, 20),
    (3.4, 4096, 20, 32),
    (6.4, 5120, 24, 40),
    (10.8, 6144, 28, 48),
]


def table_7(d: int, layers: int, heads: int, width: float) -> float:
    """Billions of parameters without embeddings, with a feed-forward of width * D."""
    model = dataclasses.replace(
        config("yocou_1b").model,
        **{"d_model": d, "num_layers": layers, "num_heads": heads, "d_ff": round(width * d)},
        num_kv_heads=3 if heads % 4 else 4,
    )
    return figures(model)["non_embedding"] / 1e9


@pytest.mark.parametrize(("name", "d", "layers", "heads"), TABLE_7)
def test_the_sizes_of_table_7_need_a_feed_forward_of_8_thirds(name, d, layers, heads):
    """Appendix C says 3 D; then every size is 7 to 14% larger than its name."""
    assert table_7(d, layers, heads, 8 / 3) == pytest.approx(name, rel=0.04)
    assert 1.07 < table_7(d, layers, heads, 3) / name < 1.14


def test_parameters_of_the_papers_configs():
    """In millions, as the docstrings round them."""
    dense, deep, experts = (figures(config(name).model) for name in PAPER)
    assert round(dense["non_embedding"] / 1e6) == 1313
    assert round(deep["non_embedding"] / 1e6) == 1323
    assert deep["non_embedding"] == pytest.approx(dense["non_embedding"], rel=0.01)
    assert round(experts["non_embedding"] / 1e6) == 10_518
    assert round(experts["active_non_embedding"] / 1e6) == 1710
    assert dense["active"] == dense["total"]


# --- What docstrings state ------------------------------------------------------------------------

SCALE = {"M": 1e6, "B": 1e9}
# Wiki perplexities and averages of Tables 2, 3 and 5. A docstring may quote them.
QUOTED = {
    *("22.52", "22.25", "21.56", "23.13", "20.98", "21.01", "22.04", "21.42", "22.15", "22.06"),
    *("41.78", "46.23", "47.08"),
}


def stated(text: str) -> list[tuple[str, str, bool, str]]:
    """For each figure such as 1.710B: (number, M or B, whether of tokens, steps in brackets)."""
    text = re.sub(r'"[^"]*"', "", " ".join(text.split()))  # quotes have the words of the paper
    pattern = r"(\d+(?:\.\d+)?)([MB])\b(?: (tokens)(?: \((\d+) steps)?)?"
    return [(n, unit, bool(of), steps) for n, unit, of, steps in re.findall(pattern, text)]


def agrees(number: str, unit: str, values) -> bool:
    """Whether one of the values, rounded to the digits of the number, is equal to it."""
    digits = len(number.partition(".")[2])
    return any(f"{value / SCALE[unit]:.{digits}f}" == number for value in values)


def test_stated_figures_are_found_and_judged():
    text = '1.5B parameters; "1.3B activated"; 75,000 steps of 4M tokens; 0.18M tokens (90 steps'
    assert stated(text) == [
        ("1.5", "B", False, ""),
        ("4", "M", True, ""),
        ("0.18", "M", True, "90"),
    ]
    assert agrees("1.71", "B", [1_709_941_760])
    assert not agrees("1.5", "B", [1_709_941_760])
    assert not agrees("1.71", "M", [1_709_941_760])


@pytest.mark.parametrize("name", NAMES)
def test_no_docstring_states_another_figure_than_the_accounting(name):
    """Figures of parameters (also for the feed-forward widths 3 D and 8/3 D) and of tokens."""
    found, text = config(name), module(name).__doc__
    widths = {found.model.d_ff, 3 * found.model.d_model, round(found.model.d_model * 8 / 3)}
    models = [dataclasses.replace(found.model, d_ff=width) for width in widths]
    parameters = [value for model in models for value in figures(model).values()]
    step = found.data.batch_size * found.data.sequence_length
    figure_list = stated(text)
    assert figure_list
    for number, unit, of_tokens, steps in figure_list:
        tokens = (int(steps) * step,) if steps else (step, found.run.steps * step)
        assert agrees(number, unit, tokens if of_tokens else parameters), (number, unit)
    if name in PAPER:
        quoted = re.findall(r"\b\d\d\.\d\d\b", text)
        assert set(quoted) <= QUOTED
        assert len(quoted) >= 2


# --- Where the code differs from its sources ------------------------------------------------------


def test_the_stream_gate_is_one_matrix_and_its_docstring_names_that_of_parscale():
    model = tiny.model("parscale")
    gate = tiny.params(model)["stream_gate"]
    assert {name: x.shape for name, x in gate.items()} == {"kernel": (2, model.d_model, 2)}
    for word in ("SiLU", "biases", "one matrix", "2505.10475"):
        assert word in LanguageModel._mix_streams.__doc__


def test_docstrings_name_contradictions_of_the_paper_and_the_variant_of_muon():
    dense = " ".join(module("yocou_1b").__doc__.split())
    for words in ("lists 3e-4 for 1.3B", "Appendix C says 3 D", "taken here", "Taken here is 6656"):
        assert words in dense
    line = re.search(r"# (.*appendix E.*)\n +\"rins\"", inspect.getsource(program))
    assert line
    assert "full*10 | full*10@3" in line[1]
    program.Program.parse("full*10 | full*10@3")
    muon = " ".join(make_optimizer.__doc__.split())
    for words in ("optax.contrib.muon", "b = momentum", "a bias correction", "AdamW use `eps`"):
        assert words in muon
