"""Twins match on their axes, and entries that do not match cannot be compared."""

import dataclasses
import importlib
import re
from pathlib import Path

import pytest

from tests import tiny
from yocou_jax.config import Config
from yocou_jax.errors import UserError
from yocou_jax.program import ARCHITECTURES
from yocou_jax.study import (
    AXES,
    Claim,
    Entry,
    Study,
    check_changes,
    matched,
    ratios,
    twins,
    with_fields,
)

ROOT = Path(__file__).parent.parent
STUDIES = sorted(p.stem for p in (ROOT / "configs/studies").glob("*.py") if p.stem != "__init__")
# d_ff is large, so that one unit of it is far less than 1% of the parameters.
REFERENCE = tiny.config("yoco_u", d_model=32, d_ff=512, run={"steps": 1000})


def twin(fields: dict, *match: str) -> Config:
    study = Study("?", {"reference": Entry(), "twin": Entry(fields, match)}, match=match)
    return twins(study, REFERENCE)["twin"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("budget", ["tokens", "flops", "tokens_layers"])
def test_every_architecture_has_a_twin_of_equal_parameters_and_budget(architecture, budget):
    config = twin({"model.architecture": architecture}, "parameters", budget)
    assert {"parameters", budget} <= set(matched(config, REFERENCE))
    assert abs(ratios(config, REFERENCE)[budget] - 1) <= 1e-3  # half a step of 1,000
    assert config.run.steps == 1000 or budget != "tokens"


def test_the_sizes_of_a_transformer_by_hand():
    """D = 32, H = 8, 4 query and 2 key heads, 4 layers. yoco_u has two layers without W_k and W_v,
    and one global pair of them with a norm."""
    config = twin({"model.architecture": "transformer"}, "parameters")

    def count(d_ff, pairs, norms):
        return 4 * (2 * 32 * 32 + 3 * 32 * d_ff) + pairs * 2 * 32 * 16 + norms * 32

    assert AXES["parameters"].amount(REFERENCE) == count(512, 3, 4 * 2 + 2)
    assert AXES["parameters"].amount(config) == count(config.model.d_ff, 4, 4 * 2 + 1)
    # 509 would be nearest, but 512 has 0.5% too many and is a multiple of 64.
    assert config.model.d_ff == 512
    # With 8 layers 242 would be nearest: the multiples of 64 are 5% away, and 240 is 0.9% away.
    assert twin({"model.num_layers": 8}, "parameters").model.d_ff == 240


def test_tokens_times_layers_count_loops_and_streams():
    """A token passes through 2 * 3 + 2 = 8 layers of yoco_u, 4 of yoco, and 2 * 4 of parscale."""
    steps = {
        name: twin({"model.architecture": name}, "tokens_layers").run.steps
        for name in ("yoco", "parscale", "rins", "universal_transformer")
    }
    assert steps == {"yoco": 2000, "parscale": 1000, "rins": 1000, "universal_transformer": 1000}
    # 2 * 1 + 2 and 2 * 5 + 2 layers, each in half of the updates.
    assert twin({"model.num_loops": "1,5"}, "tokens_layers").run.steps == 1000
    assert twin({"data.batch_size": 16}, "tokens").run.steps == 500


def test_equal_kv_bytes_change_the_window():
    """16 positions once, and 4 for each of 6 runs of a window layer: 40 in yoco_u. So 12 for each
    of the 2 window layers of yoco."""
    config = twin({"model.architecture": "yoco"}, "kv_bytes")
    assert config.model.window == 12
    assert AXES["kv_bytes"].amount(config) == 40 * 2 * 2 * 8 * 2


def claims(*made: Claim) -> Study:
    return Study("?", {"a": Entry()}, made)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: twin({"model.architecture": "transformer"}, "kv_bytes"), "a ratio of 1.600"),
        (lambda: twin({"model.d_model": 1024}, "parameters"), "equal parameters without emb"),
        (lambda: twin({"model.num_loops": 1}, "tokens", "flops"), "equal training tokens"),
        (lambda: twin({}, "speed"), "no axis 'speed'"),
        (lambda: twin({"model.windw": 3}, "tokens"), "Did you mean 'model.window'"),
        (lambda: Study("?", {}), "at least one entry"),
        (lambda: Study("?", {"../a": Entry()}), "must have a name"),
        (lambda: Study("?", {"a": Entry()}, seeds=0), "seeds=0"),
        (lambda: Study("?", {"a": Entry()}, learning_rates=(0.1, 0.0)), "must be numbers above 0"),
        (lambda: Study("?", {"a": Entry({"run.seed": 1})}), "a sets run.seed, but"),
        (lambda: Study("?", {"a": Entry({"optimizer.learning_rate": 0.1})}), "learning rates and"),
        (lambda: claims(Claim("a", "b", "", (0, 1))), "names 'b'"),
        (lambda: claims(*[Claim("a", "a", "", (0, 1))] * 2), "2 claims with the name a_below_a"),
        (lambda: claims(Claim("a", "a", "", (0, 1), metric="evaluation.hops.x")), "are none"),
    ],
)
def test_what_is_refused(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_a_claim_about_entries_that_do_not_match_is_refused():
    entries = {"a": Entry(), "b": Entry({"model.num_loops": 1}, match=("flops",))}
    right = Study("?", entries, (Claim("a", "b", "", (0, 1), match=("flops",)),), ("tokens",))
    assert twins(right, REFERENCE)["b"].run.steps > 1000
    wrong = Study("?", entries, (Claim("a", "b", "", (0, 1)),), ("tokens",))
    with pytest.raises(UserError, match="b cannot be compared with a at equal training tokens"):
        twins(wrong, REFERENCE)


def test_a_flag_that_does_not_reach_all_entries_is_refused():
    study = Study("?", {"a": Entry(), "b": Entry({"model.num_loops": 1})})
    swept = dataclasses.replace(study, learning_rates=(0.1, 0.2))
    fields = {
        "run.seed": (study, 5, "the seeds are 0, 1, 2"),
        "data.seed": (study, 5, "the seeds are 0, 1, 2"),
        "optimizer.learning_rate": (swept, 0.3, "tries several learning rates"),
        "model.num_loops": (study, 2, "on b, because the study sets"),
    }
    for name, (one, value, words) in fields.items():
        with pytest.raises(UserError, match=rf"--config\.{name} would have no effect.*{words}"):
            check_changes(one, REFERENCE, with_fields(REFERENCE, {name: value}))
    changes = {"optimizer.learning_rate": 0.3, "run.steps": 7}
    check_changes(study, REFERENCE, with_fields(REFERENCE, changes))
    check_changes(swept, REFERENCE, REFERENCE)


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_can_be_made_and_says_what_is_expected(name):
    module = importlib.import_module(f"configs.studies.{name}")
    twins(module.STUDY, Config.from_dict(module.get_config()))  # or it raises
    assert module.STUDY.seeds >= 3
    assert f"python -m experiments.compare --config=configs/studies/{name}.py" in module.__doc__
    for words in ("Match: ", "Cost: "):
        assert words in module.__doc__
    # "the first run", or those that count, if a study was changed and made again.
    assert re.search(
        r"Expected, written before the (first run|runs of [\d,]+ updates)\. ", module.__doc__
    )


@pytest.mark.parametrize("name", STUDIES)
def test_the_numbers_of_the_paper_say_what_the_claim_says(name):
    """A claim of a table whose numbers say the reverse would be "reproduced" by the reverse."""
    for claim in importlib.import_module(f"configs.studies.{name}").STUDY.claims:
        assert bool(claim.paper) >= (claim.effect is not None)
        numbers = [float(number) for number in re.findall(r"\b\d+\.\d\d\b", claim.paper)]
        if len(numbers) == 2:
            better, worse = numbers if claim.more else reversed(numbers)
            assert better > worse, claim.name
            assert claim.effect is None or claim.effect > 0, claim.name
