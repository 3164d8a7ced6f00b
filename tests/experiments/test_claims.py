"""CLAIMS.md says what the results give, and nothing else."""

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
import shutil
import sys
import types
from pathlib import Path

import pytest

from experiments import claims as command
from tests.studies import BASE, STUDY, train
from yocou_jax.errors import UserError
from yocou_jax.evaluation import claims, findings
from yocou_jax.evaluation.compare import Comparison
from yocou_jax.evaluation.findings import report
from yocou_jax.files import to_json
from yocou_jax.study import Claim, Entry, Study, with_fields

ROOT = Path(__file__).parents[2]
OTHER = Study("?", {"c": Entry(), "d": Entry()}, (Claim("c", "d", "Figure 6", (0.0, 1.0)),))
README = "What came: <!-- headline -->x<!-- end of the headline -->\n\n3.7378 nats/token\n"


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    comparison = Comparison(STUDY, BASE, tmp_path_factory.mktemp("runs"))
    train(comparison)
    words = "python -m experiments.compare --config=configs/studies/one.py --seeds=3"
    names = {"study": "configs/studies/one.py", "command": words, "changed": ["--seeds=3"]}
    return json.loads(to_json(report(comparison) | names))


@pytest.fixture
def place(tmp_path, monkeypatch, found) -> Path:
    """A repository with a README and the results of one of two studies."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "studies", lambda: {"one": STUDY, "two": OTHER})
    monkeypatch.setattr(claims, "HEADLINES", {"one.b_below_a": "longer", "two.c_below_d": ""})
    Path("README.md").write_text(README)
    Path("results/cpu/studies").mkdir(parents=True)
    Path("results/cpu/studies/one.json").write_text(to_json(found))
    Path("results/cpu/train.json").write_text('{"loss": [3.73781, null, "x", true]}')
    return tmp_path


def test_the_table_has_every_claim(place, capsys):
    assert command.main(["", "check"]) == 1
    assert command.main(["", "table"]) is None
    page = Path("CLAIMS.md").read_text()
    assert (
        "| `b` below `a`, at equal parameters, tokens | Table 3: 1.5 and 2.5 | +0 to +0.5 | "
        "1.2400 and 1.5200 | +0.2800 | +0.2552 to +0.3048 | 3 | 0.0326 | 0.005 | reproduced | "
        "2.74K parameters without embeddings, 2.56K tokens (0.94 per parameter) | 11 | "
        "`one.b_below_a` | the best learning rate of b is the lowest of those tried |"
    ) in page
    assert "| 11 | 11 | `python -m experiments.compare --config=configs/studies/one.py" in page
    assert "## one with --seeds=3, on cpu" in page
    assert "## two: not run" in page
    line = "| `c` below `d`, at equal parameters, tokens | Figure 6 | +0 to +1 | `two.c_below_d` |"
    assert line in page
    headline = (
        "What came: <!-- headline -->At equal parameters and training tokens, "
        "`b` has 0.2800 bits/byte less than `a` (longer) (95% interval 0.2552 to 0.3048; 3 seeds; "
        "2.74K parameters without embeddings, 2.56K tokens (0.94 per parameter); cpu). The claim "
        "that it has less: reproduced. `c` below `d`: not run yet.<!"
    )
    assert Path("README.md").read_text().startswith(headline)
    capsys.readouterr()
    assert command.main(["", "check"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("file", ["README.md", "CLAIMS.md", "results/cpu/studies/one.json"])
def test_the_check_finds_what_has_changed(place, file, capsys):
    command.main(["", "table"])
    text = Path(file).read_text()
    Path(file).write_text(text.replace("0.28", "0.29"))
    assert command.main(["", "check"]) == 1
    assert "is not what results/ gives" in capsys.readouterr().out


def test_without_results_every_claim_is_listed_as_not_run(place):
    shutil.rmtree("results/cpu/studies")
    command.main(["", "table"])
    assert command.main(["", "check"]) == 0
    assert "## one: not run" in Path("CLAIMS.md").read_text()
    assert "-->`b` below `a`: not run yet. `c` below `d`: not run yet.<!--" in (
        Path("README.md").read_text()
    )


def changed(found: dict, **difference) -> dict:
    (claim,) = (c for c in found["claims"] if c["name"] == "b_below_a")
    claim = claim | {"difference": claim["difference"] | difference}
    return found | {"claims": [claim, *found["claims"][1:]]}


def test_what_was_not_expected_is_marked_and_said(place, found):
    other = changed(found, mean=-0.3, low=-0.4, high=-0.2)
    next(c for c in other["claims"] if c["name"] == "b_below_a")["verdict"] = "not at this scale"
    Path("results/cpu/studies/one.json").write_text(to_json(other))
    command.main(["", "table"])
    page = Path("CLAIMS.md").read_text()
    assert "| -0.3000 (outside) | -0.4000 to -0.2000 |" in page
    assert "not at this scale (the reverse holds) |" in page
    assert (
        "`b` has 0.3000 bits/byte more than `a` (longer) (95% interval 0.2000 to 0.4000; 3 seeds;"
        in Path("README.md").read_text()
    )
    Path("results/cpu/studies/one.json").write_text(to_json(changed(found, mean=-0.1, low=-0.2)))
    command.main(["", "table"])
    readme = Path("README.md").read_text()
    assert "more than `a` (longer) (95% interval -0.3048 to 0.2000" in readme


def test_what_the_paper_has_and_what_was_added_later(place, found, monkeypatch):
    """The interval is 0.2552 to 0.3048."""
    for effect, doubts, words in (
        (0.26, [], ""),
        (0.2, [], "the paper's difference is outside of the interval; "),
        (0.2, ["fewer than 9 seeds"], "fewer than 9 seeds; "),  # so the interval decides nothing
    ):
        new = {"effect": effect, "added": True}
        claim = dataclasses.replace(STUDY.claims[0], **new)
        study = dataclasses.replace(STUDY, claims=(claim,), notes="One run was lost.")
        monkeypatch.setattr(command, "studies", lambda study=study: {"one": study, "two": OTHER})
        stored = found | {"claims": [found["claims"][0] | new | {"doubts": doubts}]}
        Path("results/cpu/studies/one.json").write_text(to_json(stored))
        command.main(["", "table"])
        page = Path("CLAIMS.md").read_text()
        assert f"| `one.b_below_a` | {words}the best learning rate" in page
        assert f"| Table 3: 1.5 and 2.5 ({effect:+.4f}) | added later |" in page
        assert "| One run was lost. |" in page
        said = ". The paper has 1.5 and 2.5, on another text: 0.200 less in this unit, which is "
        readme = Path("README.md").read_text()
        assert (f"{said}outside of the interval." in readme) == words.startswith("the paper")


def test_a_share_has_no_effect_above_1(place, found, monkeypatch):
    for metric, effect, words in (
        ("evaluation.needle.scalars.accuracy_single", 1.5, "> 1"),
        ("evaluation.needle.scalars.accuracy_single", 0.5, "0.5000"),
        ("evaluation.loops.scalars.nats_1", 1.5, "1.5000"),
    ):
        claim = dataclasses.replace(STUDY.claims[0], metric=metric)
        tasks = {"needle": (), "loops": ()}
        study = dataclasses.replace(STUDY, claims=(claim,), evaluations=tasks)
        monkeypatch.setattr(command, "studies", lambda study=study: {"one": study, "two": OTHER})
        monkeypatch.setattr(claims, "HEADLINES", {})
        old = found["claims"][0]
        difference = old["difference"] | {"smallest_effect": effect}
        stored = old | {"name": claim.name, "metric": metric, "difference": difference}
        Path("results/cpu/studies/one.json").write_text(to_json(found | {"claims": [stored]}))
        command.main(["", "table"])
        assert f"| 3 | {words} | 0.005 |" in Path("CLAIMS.md").read_text()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"claims": (Claim("b", "a", "Table 3", (0.1, 0.5)),)}, "had expected .0.0, 0.5. before"),
        ({"learning_rates": (0.1, 0.2)}, "no run of a with seed 0 and the learning rate 0.3"),
        ({"entries": {"b": Entry(), "a": Entry()}}, "changed since these runs: model.window"),
        ({"entries": {"a": Entry()}, "claims": ()}, "changed since these runs: its entries"),
        ({"evaluations": {"loops": ()}}, "Only 0 of 6 runs of a have what the study asks"),
        ({"entries": {"a": Entry(), "b": Entry({"model.window": 5})}}, "b: model.window: 3 -> 5"),
        ({"claims": (dataclasses.replace(STUDY.claims[0], added=True),)}, "had added False before"),
        (
            {"claims": (dataclasses.replace(STUDY.claims[0], match=()),)},
            r"had match .* and not \[\]",
        ),
    ],
)
def test_runs_of_another_study_are_no_evidence_for_its_claims(
    change, words, place, found, monkeypatch
):
    study = dataclasses.replace(STUDY, **change)
    monkeypatch.setattr(command, "studies", lambda: {"one": study})
    module = types.ModuleType("one", "What it asks.")
    base = BASE if next(iter(study.entries)) == "a" else with_fields(BASE, {"model.window": 3})
    module.get_config = base.to_dict
    monkeypatch.setitem(sys.modules, "configs.studies.one", module)
    path = Path("results/cpu/studies/one.json")
    path.write_text(to_json(found | {"changed": []}))
    before = path.read_text()
    with pytest.raises(UserError, match=words):
        command.main(["", "update", str(path)])
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.window": 64}, "window_16: model.window: 16 -> 64"),
        ({"data.source": "0.5*hops(p=2,length=128)"}, "window_16: data.source: '1.0.* -> '0.5"),
        ("--lengths=64", "the task hops: --lengths=128 -> --lengths=64"),
        (64, "batch_size: 32 -> 64"),
    ],
)
def test_the_results_of_a_study_that_has_changed_are_refused(change, words, monkeypatch):
    """Its numbers would be shown as those of another window, text or evaluation."""
    found = command.studies()
    study, base, settings = found["hops"], command.settings("hops"), command.settings
    if isinstance(change, dict):
        entry = study.entries["window_16"]
        entry = dataclasses.replace(entry, fields=entry.fields | change)
        study = dataclasses.replace(study, entries=study.entries | {"window_16": entry})
    elif isinstance(change, str):
        study = dataclasses.replace(study, evaluations={"hops": (change,)})
    else:
        base = with_fields(base, {"data.batch_size": change})
    old = json.loads((ROOT / "results/cpu/studies/hops.json").read_text())
    with pytest.raises(UserError, match=f"changed since these runs: .*{words}"):
        findings.claims_again(study, base, old)
    with pytest.raises(UserError, match=rf"hops\.json is of another study .*{words}"):
        claims.read_results(
            ROOT / "results",
            found | {"hops": study},
            lambda name: base if name == "hops" else settings(name),
        )


def test_the_gains_of_long_text_are_those_of_its_runs():
    """CLAIMS.md has two means of `gain_1024`: here they are made from the losses of the runs."""
    found = json.loads((ROOT / "results/cpu/studies/long_text.json").read_text())
    (claim,) = (c for c in found["claims"] if c["name"] == "yoco_u_above_transformer.gain_1024")
    for name, mean in zip(("yoco_u", "transformer"), claim["means"], strict=True):
        runs = [
            run["evaluation"]["perplexity"]["scalars"] for run in found["entries"][name]["runs"]
        ]
        gains = [run["nats_seeing_256"] - run["nats_seeing_1024"] for run in runs]
        assert sum(gains) / len(gains) == pytest.approx(mean["mean"])


def test_what_a_claim_expects_is_not_changed_after_its_runs(found):
    old = found["claims"][0]
    for change in ({"match": ["flops"]}, {"more": True}, {"added": True}, {"least": 1.0}):
        (name,) = change
        with pytest.raises(UserError, match=f"b_below_a had {name} "):
            claims.changes([old], [old | change])
    older = {name: value for name, value in old.items() if name != "added"}
    assert claims.changes([older], [old]) == []


def test_a_claim_that_more_is_better(place, found, monkeypatch, capsys):
    """`update` writes the claims again: from the runs that the file has."""
    more = Claim("a", "b", "Table 3", (0.0, 0.5), more=True)
    study = dataclasses.replace(STUDY, claims=(more,))
    monkeypatch.setattr(command, "studies", lambda: {"one": study, "two": OTHER})
    monkeypatch.setattr(claims, "HEADLINES", {"one.a_above_b": ""})
    module = types.ModuleType("one", "What it asks.\n")
    module.get_config = BASE.to_dict
    monkeypatch.setitem(sys.modules, "configs.studies.one", module)
    path = Path("results/cpu/studies/one.json")
    with pytest.raises(UserError, match="has other settings than its study"):
        command.main(["", "update", str(path)])
    path.write_text(to_json(found | {"changed": []}))
    command.main(["", "update", str(path)])
    assert capsys.readouterr().out == "- b_below_a\n+ a_above_b\n"
    new = json.loads(path.read_text())
    assert new["text"] == "What it asks."
    for part in found.keys() - {"claims", "changed", "text"}:
        assert new[part] == found[part]
    command.main(["", "table"])
    page = Path("CLAIMS.md").read_text()
    assert "| `a` above `b`, at equal" in page
    assert "| 1.5200 and 1.2400 | +0.2800 | +0.2552 to +0.3048 |" in page
    assert "`a` has 0.2800 bits/byte more than `b`" in (readme := Path("README.md").read_text())
    assert "The claim that it has more: reproduced." in readme


def test_claims_without_a_study_are_listed(place):
    command.main(["", "table"])
    page = Path("CLAIMS.md").read_text()
    assert "| Table 10: bytes of the KV cache at 8K to 256K |" in page
    assert "| exact in 24 of 24 cells |" in page
    assert "not run: needs an H100" in page


def test_a_figure_without_a_result_is_found(place):
    folder = Path("results")
    text = "3.74 nats/token, 3.7377 nats/token, 77.7x, 3.7 times, 0.28 bits/byte, 2,560 tokens/s"
    # The results of studies, which have 0.28 and 2,560, do not count.
    unknown = ["3.7377 nats/token", "77.7x", "0.28 bits/byte", "2,560 tokens/s"]
    assert claims.unknown_figures(text, folder) == unknown
    Path("results/cpu/plan.json").write_text('{"bytes": 3961974272, "seconds": [0.37676, 286.7]}')
    text = "tpu7x, 3.69 GiB, 3.7 GiB, 3.6 GiB, 0.377\ns, 0.38 s, 0.37 s, 4:47, 4:46, v5e:16x16"
    assert claims.unknown_figures(text, folder) == ["3.6 GiB", "0.37 s", "4:46"]


def test_results_of_another_study_or_another_version(place, found):
    path = Path("results/cpu/studies/one.json")
    path.write_text(to_json(found | {"study": "/home/me/own.py"}))
    assert claims.read_results(Path("results"), command.studies(), command.settings) == []
    for other in (
        *({"least": 0.1}, {"expected": [0.1, 0.5]}, {"against": "x"}, {"within": [0, 1]}),
        *({"effect": 0.1}, {"source": "not in the paper"}, {"added": True}),
    ):
        path.write_text(to_json(found | {"claims": [found["claims"][0] | other]}))
        with pytest.raises(UserError, match=r"b_below_a, which is absent .* or differs there"):
            command.main(["", "check"])
    path.write_text(to_json(found | {"claims": [found["claims"][0] | {"paper": "other words"}]}))
    command.main(["", "check"])


def test_one_claim_is_run_with_the_flags_of_its_results(place, found, monkeypatch, capsys):
    started = []
    now = changed(found, mean=0.27)
    now["environments"] = [found["environments"][0] | {"corpus": "other", "git": "new"}]

    class Compare(contextlib.nullcontext):
        """It ends at once with such results."""

        def __init__(self, words):
            started.append(words[words.index("experiments.compare") + 1 :])
            Path(words[-1].removeprefix("--out=")).write_text(to_json(now))
            self.enter_result, self.returncode = self, [0, 0, 0, 2, 1][len(started) - 1]

    monkeypatch.setattr("subprocess.Popen", Compare)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    for name in ("one.b_below_a", "two.c_below_d"):
        command.main(["", "run", name])
    assert started == [
        [
            *("--config=configs/studies/one.py", "--seeds=3", "--only=b,a"),
            *("--workdir=runs/claims/one", "--out=runs/claims/one.json"),
        ],
        [
            *("--config=configs/studies/two.py", "--only=c,d"),
            *("--workdir=runs/claims/two", "--out=runs/claims/two.json"),
        ],
    ]
    real = importlib.metadata.version
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"{real(name)}.1")
    capsys.readouterr()
    assert command.main(["", "run", "one.b_below_a"]) == 0
    said = f"one.json is of Python and jax ('{platform.python_version()}', "
    assert said in (printed := capsys.readouterr().out)
    start = "At equal parameters and training tokens, `b` has 0.2{}00 bits/byte"
    assert printed.count(f"So far: {start.format(8)} less than `a`") == 2
    assert f"Now: {start.format(7)} less than `a`" in printed
    assert "one.json is of another text.\n" in printed
    assert "one.json is of another revision of the code.\n" in printed
    assert "another tokenizer" not in printed
    assert command.main(["", "run", "one.b_below_a"]) == 2
    assert "Now:" not in capsys.readouterr().out
    assert command.main(["", "run", "one.b_below_a"]) == 1  # a run has failed
    assert "Now:" in capsys.readouterr().out
    for words, error in ((["run", "one.x"], "no claim 'one.x'"), ([], "Say `table`")):
        with pytest.raises(UserError, match=error):
            command.main(["", *words])
