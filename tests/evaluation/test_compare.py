"""A comparison makes each run once, also after a kill, and its report is what the runs gave."""

import dataclasses
import json

import pytest
from absl import flags

from configs.studies import language
from experiments import cli
from tests import tiny
from tests.studies import BASE, LOSSES, REVISION, STUDY, about, pretend, train
from yocou_jax import accounting
from yocou_jax.config import Config
from yocou_jax.errors import UserError
from yocou_jax.evaluation import figure, findings
from yocou_jax.evaluation import report as reports
from yocou_jax.evaluation.compare import Comparison, RunFailed, overrides, with_gains
from yocou_jax.evaluation.findings import report
from yocou_jax.evaluation.statistics import interval, smallest_effect
from yocou_jax.study import Claim, Entry, Study, twins


def test_the_sweep_comes_first_and_then_the_other_seeds_at_the_best_rate(tmp_path):
    made = train(Comparison(STUDY, BASE, tmp_path))
    assert made == [
        *("a lr=0.1 seed=0", "a lr=0.2 seed=0", "a lr=0.3 seed=0"),
        *("b lr=0.1 seed=0", "b lr=0.2 seed=0", "b lr=0.3 seed=0"),
        *("a lr=0.2 seed=1", "b lr=0.1 seed=1", "a lr=0.2 seed=2", "b lr=0.1 seed=2"),
        *("a lr=0.2 seed=3", "b lr=0.1 seed=3"),
    ]
    # The same command again: only the run that failed is made again.
    again = Comparison(STUDY, BASE, tmp_path)
    ended = []
    assert train(again, ended=ended.append) == ["b lr=0.3 seed=0"]
    assert [again.outcome(spec) for spec in ended] == ["failed: the gradient was not finite"]
    # The clock of a run counts all of its processes, and wall_s (60 s here) the last one.
    again.spec("a", 0.2, 1).clock.write_text("180.0\n")
    again.spec("a", 0.2, 2).clock.write_text("30.0\n")
    again.spec("a", 0.2, 3).clock.unlink()
    found = report(Comparison(STUDY, BASE, tmp_path))
    a, b = found["entries"]["a"], found["entries"]["b"]
    assert (a["learning_rate"], a["rate_at_edge"], a["swept"]) == (0.2, None, True)
    assert (b["learning_rate"], b["rate_at_edge"], b["swept"]) == (0.1, "lowest", True)
    assert b["sweep"] == {"0.1": 1.2, "0.2": 1.9, "0.3": None}
    assert b["failures"] == {"b lr=0.3 seed=0": "the gradient was not finite"}
    assert len(a["runs"]) == 6
    # a - b with the seeds 1, 2, 3, not with that of the sweep
    claim = found["claims"][0]
    effect = claim["difference"].pop("smallest_effect")
    assert claim["difference"] == pytest.approx(interval([0.29, 0.28, 0.27])._asdict())
    assert effect == pytest.approx(smallest_effect(interval([0.29, 0.28, 0.27])))
    assert claim["verdict"] == "reproduced"
    assert [side["mean"] for side in claim["means"]] == pytest.approx([1.24, 1.52])
    assert claim["remarks"] == [
        "the best learning rate of b is the lowest of those tried",
        "runs whose minutes are only those of their last process: 1",
    ]
    assert b["difference"]["mean"] == pytest.approx(0.28)
    assert found["minutes"] == claim["minutes"] == 13
    run = a["runs"][0]
    assert run["curve"] == [(20 * 8 * 16, 2.0)]
    assert len(run["training"]) <= 64
    assert run["training"][0] == (
        20 * 8 * 16 / 50,
        pytest.approx(2.0 + (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4),
    )


def test_the_sweep_goes_on_until_the_best_rate_has_worse_neighbors(tmp_path, monkeypatch):
    """It begins in the middle. A run that failed is worse than all others."""
    losses = {0.1: 2.0, 0.2: 1.5, 0.3: 1.7, 0.4: 1.4, 0.5: 1.0, 0.6: None, 0.7: 3.0}
    monkeypatch.setitem(LOSSES, "a", losses)
    monkeypatch.setitem(LOSSES, "b", {rate: rate for rate in losses})
    study = dataclasses.replace(STUDY, learning_rates=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6), seeds=1)

    def tried(name, comparison):
        made = train(comparison, only=[name])
        return [float(words.split()[1].removeprefix("lr=")) for words in made[:-1]]

    comparison = Comparison(study, BASE, tmp_path)
    assert not comparison.swept("a")
    assert tried("a", comparison) == [0.2, 0.3, 0.4, 0.5, 0.6]
    assert (comparison.best_rate("a"), comparison.at_edge("a")) == (0.5, None)
    assert comparison.swept("a")
    assert tried("b", comparison) == [0.2, 0.3, 0.4, 0.1]
    assert (comparison.best_rate("b"), comparison.at_edge("b")) == (0.1, "lowest")
    # All of the first rates are too high.
    monkeypatch.setitem(LOSSES, "b", {0.1: 2.0} | dict.fromkeys((0.2, 0.3, 0.4, 0.5, 0.6)))
    low = Comparison(
        dataclasses.replace(study, learning_rates=(0.1, 0.2, 0.3, 0.4)), BASE, tmp_path / "low"
    )
    assert tried("b", low) == [0.1, 0.2, 0.3]
    high = Comparison(study, BASE, tmp_path / "high")
    assert tried("b", high) == [0.2, 0.3, 0.4, 0.1]
    assert (high.best_rate("b"), high.swept("b")) == (0.1, True)
    monkeypatch.setitem(LOSSES, "b", {rate: rate for rate in losses})
    # Rates at the end of the old ones are tried if they may be better.
    wider = dataclasses.replace(study, learning_rates=(0.05, *study.learning_rates))
    monkeypatch.setitem(LOSSES["b"], 0.05, 9.0)
    assert train(Comparison(wider, BASE, tmp_path), only=["a", "b"]) == [
        "a lr=0.6 seed=0",
        "b lr=0.05 seed=0",
    ]


def test_what_makes_a_difference_decide_nothing(tmp_path):
    def claim(within=None, source="Table 3", seeds=3, **fields):
        claims = (Claim("b", "a", source, (0.0, 0.5), within=within, **fields),)
        study = dataclasses.replace(STUDY, claims=claims)
        found = report(Comparison(study, BASE, tmp_path, seeds=seeds))["claims"][0]
        return found["verdict"], [*found["doubts"], *found["remarks"]][0]

    comparison = Comparison(STUDY, BASE, tmp_path)
    train(comparison)
    assert claim()[0] == "reproduced"
    assert claim(source="not in the paper")[0] == "holds"
    assert claim(within=(1.3, 1.5))[0] == "reproduced"  # b is below, a above
    assert claim(within=(1.6, 2.0)) == (
        "inconclusive",
        "neither of the two has learned the task",
    )
    assert claim(within=(0.5, 1.2)) == ("inconclusive", "the task is too easy for both")
    # The interval is below 5, but not below the difference in the paper.
    assert claim(least=5.0)[0] == "not at this scale"
    assert claim(least=5.0, effect=0.01)[0] == "reproduced"
    # The fourth seed has not run, or has failed: the other three alone do not decide.
    assert claim(seeds=4) == ("inconclusive", "b has no value with seed 4")


def test_seeds_that_have_learned_all_or_nothing_decide_nothing(tmp_path):
    claim = Claim("b", "a", "Table 4", (0.0, 1.0), within=(0.05, 0.98), more=True)

    def doubts(better, worse):
        comparison = Comparison(STUDY, BASE, tmp_path, seeds=len(better))
        values = [dict(zip(comparison.seeds, side, strict=True)) for side in (better, worse)]
        return findings._doubts(comparison, claim, values)

    words = "with {} seeds, both have learned the task wholly, or both not at all: fewer than 3 "
    words += "seeds are left"
    assert doubts((1.0, 0.99, 0.0), (0.98, 1.0, 0.05)) == [words.format("3 of 3")]
    # Two pairs of nearly 0 would only make the interval narrower.
    assert doubts((1.0, 1.0, 0.0), (1.0, 0.5, 0.0)) == [words.format("2 of 3")]
    assert doubts((1.0, 0.0, 0.9, 0.8, 0.9), (1.0, 0.0, 0.5, 0.6, 0.2)) == []
    assert doubts((1.0, 1.0, 0.9), (0.0, 0.0, 0.0)) == []  # one has learned it, the other not
    assert doubts((0.0, 0.0, 0.0), (0.0, 0.0, 0.0)) == ["neither of the two has learned the task"]
    same = "the difference is the same with each seed, so its spread is not known"
    assert doubts((1.0, 1.0, 1.0), (0.0, 0.0, 0.0)) == [same]


def test_both_numbers_of_a_run_must_be_there(tmp_path):
    """A claim about two numbers of one entry has a doubt if any of them is missing."""
    comparison = Comparison(STUDY, BASE, tmp_path, seeds=5)
    claim = Claim("b", "b", "Figure 8", (0.0, 1.0), metric="summary.x", against="summary.y")
    five, three = {1: 1.0, 2: 1.1, 3: 1.2, 4: 1.0, 5: 1.1}, {1: 2.0, 2: 2.2, 3: 2.1}
    words = ["b has no value with seed 4, 5"]
    assert findings._doubts(comparison, claim, [five, three]) == words
    assert findings._doubts(comparison, claim, [three, five]) == words
    assert findings._doubts(comparison, claim, [three, three]) == words
    assert findings._doubts(comparison, claim, [five, {n: 2 * n for n in five}]) == []


def test_what_a_longer_text_is_worth_follows_from_the_losses():
    scalars = {"nats": 9.0, "nats_seeing_8": 4.0, "nats_seeing_16": 3.5, "nats_seeing_32": None}
    record = {"evaluation": {"perplexity": {"scalars": scalars}, "loops": {}}}
    found = with_gains(record)["evaluation"]["perplexity"]["scalars"]
    assert found == scalars | {"gain_8": 0.0, "gain_16": 0.5, "gain_32": None}
    assert "gain_16" not in scalars  # the record stays as it is
    for other in ({}, {"evaluation": {}}, {"evaluation": {"loops": {"scalars": {"nats": 1}}}}):
        assert with_gains(other) == other


def test_claims_are_not_written_again_about_other_programs(tmp_path):
    comparison = Comparison(STUDY, BASE, tmp_path)
    train(comparison)
    old = report(comparison)
    assert findings.claims_again(STUDY, BASE, old)
    old["entries"]["b"]["program"] = "full*9"
    with pytest.raises(UserError, match=r"changed since these runs: b: full\*9 -> full\*1\. Make"):
        findings.claims_again(STUDY, BASE, old)


def test_a_comparison_that_was_killed_goes_on(tmp_path):
    made = []

    def killed(spec):
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(spec.name)
        pretend(spec)

    with pytest.raises(KeyboardInterrupt):
        train(Comparison(STUDY, BASE, tmp_path), train=killed)
    # Before its end, a report has what there is: no seed that counts, and so no interval.
    early = report(Comparison(STUDY, BASE, tmp_path))
    assert early["claims"][0]["remarks"] == ["not run"]
    assert early["claims"][0]["verdict"] == "inconclusive"
    rest = train(Comparison(STUDY, BASE, tmp_path))
    assert len(made + rest) == 12
    assert not set(made) & set(rest)


def test_only_some_entries_and_more_seeds(tmp_path):
    train(Comparison(STUDY, BASE, tmp_path), only=["a"])
    more = Comparison(STUDY, BASE, tmp_path, seeds=4)
    assert [row[-2:] for row in reports.plan(more).rows] == [["1 of 7", "1"], ["7 of 7", "7"]]
    assert train(more, only=["a"]) == ["a lr=0.2 seed=4"]
    with pytest.raises(UserError, match="no entry 'c'; the entries are a, b"):
        more.check_entries(["a", "c"])


def test_an_evaluation_that_is_missing_is_made_without_a_new_training(tmp_path):
    # Two numbers of one run.
    two = {
        "metric": "evaluation.loops.scalars.nats_2",
        "against": "evaluation.loops.scalars.nats_1",
    }
    claims = (Claim("a", "a", "Figure 6", (0, 1), **two),)
    study = Study("?", {"a": Entry()}, claims, seeds=1, evaluations={"loops": ("--loops=1,2",)})
    calls, said = [], ["--loops=1"]

    def evaluate(spec, task, options):
        calls.append((task, options))
        if len(calls) == 1:
            raise RunFailed("no memory")
        (spec.workdir / "evaluation").mkdir(exist_ok=True)
        rows = [{"loops": count, "bits_per_byte": 1 + 1 / count} for count in (1, 2)]
        scalars = {"nats_1": 1.75, "nats_2": 1.5}
        found = {"scalars": scalars, "tables": {"nats per token": rows}, "results": rows}
        found["step"] = 20
        found["command"] = f"python -m experiments.evaluate --task=loops --workdir=x {said[0]}"
        (spec.workdir / "evaluation/loops.json").write_text(json.dumps(found))

    for expected in (["a lr=0.1 seed=0"], [], [], []):
        comparison = Comparison(study, BASE, tmp_path)
        assert train(comparison, evaluate=evaluate) == expected
        # What was trained counts, although its evaluation failed, or was made with other flags.
        assert comparison.values("a") == {0: 2.0}
        said[0] = "--loops=1" if len(calls) == 1 else "--loops=1,2"
    assert calls == [("loops", ("--loops=1,2",))] * 3
    spec = comparison.spec("a", 0.1, 0)
    for path, value in (("scalars.nats_2", 1.5), ("results.1.bits_per_byte", 1.5)):
        assert comparison.value(spec, f"evaluation.loops.{path}") == value
    # A path that leads to no number is found as soon as a run of the claim has ended.
    for path, words in (
        ("scalars.nats_3", "evaluation.loops.scalars has nats_1, nats_2, and not nats_3"),
        ("results.2.bits_per_byte", "results has 0, 1, and not 2"),
        ("scalars.nats_2.x", "nats_2 has no names, and not x"),
        ("command", "is not a number: 'python -m"),
    ):
        for field in ("metric", "against"):
            claim = Claim("a", "a", "", (0, 1), **{field: f"evaluation.loops.{path}"})
            with pytest.raises(UserError, match=words):
                Comparison(dataclasses.replace(study, claims=(claim,)), BASE, tmp_path)
    # One entry alone has no curve against tokens, but it has a depth curve.
    found = report(comparison)
    ((kind, panel),) = figure.panels(found).items()
    assert kind.title == "validation, by loops"
    assert panel.curves == {"a": [[(1, 2.0), (2, 1.5)]]}
    assert found["claims"][0]["difference"]["mean"] == 0.25
    claims = next(table for table in reports.tables(found) if table.title == "Claims")
    assert claims.rows[0][0].endswith("scalars.nats_2 below evaluation.loops.scalars.nats_1")
    assert not spec.failure.exists()


def test_runs_of_another_text_are_refused(tmp_path):
    comparison = Comparison(STUDY, BASE, tmp_path)
    for entry, corpus in (("a", "c"), ("b", "d")):
        pretend(comparison.spec(entry, 0.1, 0), corpus=corpus)
    with pytest.raises(UserError, match="the corpus of one is 'd', that of the other 'c'"):
        Comparison(STUDY, BASE, tmp_path)


def test_runs_of_other_code_devices_and_versions_are_remarked(tmp_path):
    study = dataclasses.replace(STUDY, learning_rates=())
    comparison = Comparison(study, BASE, tmp_path)
    before = {key: about()[key] for key in ("git", "python", "packages", "device")}
    older = before | {"packages": before["packages"] | {"jax": "0.1"}}
    gpu = {"kind": "H100", "count": 2, "processes": 1}
    for seed in (0, 1, 2):
        pretend(comparison.spec("a", 0.1, seed))
    pretend(comparison.spec("b", 0.1, 0), git=f"{REVISION}+dirty")
    pretend(comparison.spec("b", 0.1, 1), device=gpu)
    # The last process of a run is not the only one that counts.
    pretend(comparison.spec("b", 0.1, 2), resumes=[{"before": older}])
    found, kind = report(Comparison(study, BASE, tmp_path)), before["device"]
    assert found["claims"][0]["remarks"] == [
        "learning rates not swept",
        "2 revisions of the code: 0123456789, 0123456789+dirty",
        "the code had changes that were not committed",
        f"2 devices: 2 x H100, {kind['count']} x {kind['kind']}",
        f"2 versions of jax: 0.1, {before['packages']['jax']}",
    ]
    assert found["remarks"] == found["claims"][0]["remarks"][1:]


def test_other_totals_at_equal_parameters_are_remarked(tmp_path):
    """A narrower twin has as many parameters outside of its embeddings, and fewer inside."""
    narrow = {"model.num_layers": 2 * BASE.model.num_layers, "model.d_model": 24}
    entries = {"a": Entry(), "b": Entry(narrow, match=("parameters",))}
    study = dataclasses.replace(STUDY, entries=entries, learning_rates=(), match=("parameters",))
    comparison = Comparison(study, BASE, tmp_path)
    for seed in (0, 1, 2):
        pretend(comparison.spec("a", 0.1, seed))
        pretend(comparison.spec("b", 0.1, seed))
    totals = [accounting.parameters(comparison.twins[name].model).total for name in "ba"]
    expected = f"with embeddings they have {totals[0]:,} and {totals[1]:,} parameters"
    assert expected in report(comparison)["claims"][0]["remarks"]


def test_a_workdir_with_other_settings_is_refused(tmp_path):
    train(Comparison(STUDY, BASE, tmp_path, seeds=1), only=["b"])
    longer = tiny.config("full*1", run={"steps": 21}, optimizer={"learning_rate": 0.1})
    with pytest.raises(UserError, match=r"other settings: run\.steps: 20 -> 21"):
        Comparison(STUDY, longer, tmp_path)


def test_the_flags_of_a_run_make_its_config():
    # In the file, data.vocab_size follows model.vocab_size.
    data = {"packing": True, "source": "a b", "vocab_size": 2048}
    reference = tiny.config(num_loops=2, vocab_size=300, data=data)
    study = Study(
        "?",
        {
            "a": Entry(),
            "b": Entry({"model.num_loops": None}),
            "c": Entry({"model.num_loops": "1,3"}),
        },
    )
    for config in twins(study, reference).values():
        flag_values = flags.FlagValues()
        holder = cli.config_file(language.get_config(), "", flag_values)
        words = overrides(language.get_config(), config)
        cli.parse(["command", *words], flag_values)
        assert Config.from_dict(holder.value) == config
    assert overrides(language.get_config(), Config.from_dict(language.get_config())) == []
