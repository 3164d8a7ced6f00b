"""A comparison makes each run once, also after a kill, and its report is what the runs gave."""

import functools
import json
import random

import pytest
from absl import flags

from configs.studies import language
from experiments import cli
from tests import tiny
from yocou_jax.config import Config
from yocou_jax.errors import UserError
from yocou_jax.evaluation import report as reports
from yocou_jax.evaluation.compare import Comparison, RunFailed, overrides, report
from yocou_jax.evaluation.statistics import interval, smallest_effect
from yocou_jax.files import to_json
from yocou_jax.manifest import describe, read, write
from yocou_jax.study import AXES, Claim, Entry, Study, twins
from yocou_jax.training.evaluators import Validation
from yocou_jax.training.loop import Run

BASE = tiny.config("full*1", run={"steps": 20}, optimizer={"learning_rate": 0.1})
STUDY = Study(
    "Does <b> beat a?",
    {"a": Entry(), "b": Entry({"model.window": 3})},
    claims=(Claim("b", "a", "Table 3", expected=(0.0, 0.5)),),
    seeds=3,
    learning_rates=(0.3, 0.1, 0.2),
)
# What a run would reach, by entry and learning rate.
LOSSES = {"a": {0.1: 2.0, 0.2: 1.5, 0.3: 1.7}, "b": {0.1: 1.2, 0.2: 1.9, 0.3: None}}


@functools.cache
def about() -> dict:
    return describe({}, corpus="c", tokenizer="t")


def pretend(spec, **facts):
    """The files of a run that has ended, made up."""
    if (loss := LOSSES[spec.entry][spec.rate]) is None:
        raise RunFailed("the gradient was not finite")
    loss += 0.01 * spec.seed if spec.entry == "a" else 0.02 * spec.seed
    write(spec.workdir, about() | {"config": spec.config.to_dict()} | facts)
    tokens = AXES["tokens"].amount(spec.config) / 200
    rows = [{"step": n, "tokens": tokens * n, "bpb": loss + 1 / n} for n in range(1, 201)]
    rows[-1]["val_bpb"] = loss
    (spec.workdir / "metrics.jsonl").write_text("".join(to_json(row) + "\n" for row in rows))
    flops = AXES["flops"].amount(spec.config)
    summary = {"val_bpb": loss, "wall_s": 60.0, "train_flops": flops}
    (spec.workdir / "summary.json").write_text(to_json(summary))


def never(spec, task, options):
    raise AssertionError(f"The study has no task {task}.")


def train(comparison, **changes):
    """Makes all runs that are left. Returns their names."""
    made = []

    def one(spec):
        made.append(spec.name)
        pretend(spec)

    comparison.train(**({"train": one, "evaluate": never} | changes))
    return made


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
    found = report(again)
    a, b = found["entries"]["a"], found["entries"]["b"]
    assert (a["learning_rate"], a["rate_at_edge"], a["swept"]) == (0.2, False, True)
    assert (b["learning_rate"], b["rate_at_edge"], b["swept"]) == (0.1, True, True)
    assert b["sweep"] == {"0.1": 1.2, "0.2": 1.9, "0.3": None}
    assert b["failures"] == {"b lr=0.3 seed=0": "the gradient was not finite"}
    assert len(a["runs"]) == 6
    # a - b with the seeds 1, 2, 3, not with that of the sweep
    claim = found["claims"][0]
    effect = claim["difference"].pop("smallest_effect")
    assert claim["difference"] == pytest.approx(interval([0.29, 0.28, 0.27])._asdict())
    assert effect == pytest.approx(smallest_effect(interval([0.29, 0.28, 0.27])))
    assert claim["verdict"] == "reproduced"
    assert b["difference"]["mean"] == pytest.approx(-0.28)
    assert found["minutes"] == 11
    run = a["runs"][0]
    assert run["curve"] == [(20 * 8 * 16, 2.0)]
    assert len(run["training"]) <= 64
    assert run["training"][0] == (
        20 * 8 * 16 / 50,
        pytest.approx(2.0 + (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4),
    )


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
    assert not early["claims"][0]["swept"]
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
    for path in ("scalars.nats_3", "results.2.bits_per_byte", "results.x", "scalars.nats_2.x"):
        assert comparison.value(spec, f"evaluation.loops.{path}") is None
    # One entry alone has no curve against tokens, but it has a depth curve.
    found = report(comparison)
    assert reports.panels(found) == {"loops": {"a": [(1, 2.0), (2, 1.5)]}}
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


@pytest.mark.slow
def test_two_entries_with_two_seeds(tmp_path):
    """The first of the four runs is a real one. Then the comparison is killed, and goes on."""
    rng = random.Random(0)
    text = "\n".join("".join(rng.choices("abcd ", k=60)) for _ in range(100))
    (tmp_path / "text.txt").write_text(text)
    base = tiny.config(
        "full*1",
        **{"num_layers": 1, "vocab_size": 258, "d_model": 8, "num_heads": 1, "num_kv_heads": 1},
        data={
            **{"source": str(tmp_path / "text.txt"), "tokenizer": "bytes"},
            **{"validation_sequences": 8, "cache_dir": str(tmp_path / "cache")},
        },
        run={"steps": 4, "eval_every": 2},
        optimizer={"learning_rate": 0.1},
    )
    study = Study(STUDY.question, STUDY.entries, STUDY.claims, seeds=2)
    specs = []

    def one(spec):
        if len(specs) == 1:
            specs.append(None)
            raise KeyboardInterrupt
        specs.append(spec)
        if len(specs) == 1:
            Run(spec.config, spec.workdir, evaluators=(Validation,)).train()
        else:
            real = read(specs[0].workdir)
            pretend(spec, corpus=real["corpus"], tokenizer=real["tokenizer"])

    with pytest.raises(KeyboardInterrupt):
        Comparison(study, base, tmp_path / "runs").train(one, never)
    comparison = Comparison(study, base, tmp_path / "runs")
    comparison.train(one, never)
    assert [spec and spec.name for spec in specs] == [
        *("a lr=0.1 seed=0", None, "b lr=0.1 seed=0", "a lr=0.1 seed=1", "b lr=0.1 seed=1")
    ]
    seeds = [(s.config.run.seed, s.config.data.seed) for s in specs if s]
    assert seeds == [(0, 0), (0, 0), (1, 1), (1, 1)]

    found = json.loads(to_json(report(comparison)))
    real = json.loads((specs[0].workdir / "summary.json").read_text())
    assert found["entries"]["a"]["values"] == {"0": real["val_bpb"], "1": 2.01}
    run = found["entries"]["a"]["runs"][0]
    assert [tokens for tokens, _ in run["curve"]] == [2 * 128, 4 * 128]
    assert run["curve"][-1][1] == real["val_bpb"]
    assert len(run["training"]) == 2
    assert run["environment"].keys() >= {"git", "packages", "device", "corpus"}
    assert not found["claims"][0]["swept"]

    curves = reports.panels(found)
    assert {axis: list(names) for axis, names in curves.items()} == {
        axis: ["a", "b"] for axis in ("tokens", "flops")
    }
    assert curves["tokens"]["a"] == [(512, pytest.approx(found["entries"]["a"]["mean"]["mean"]))]
    assert reports.draw(found, tmp_path / "plot.png")
    found |= {"text": "Why <a>?", "command": "compare", "commands": {"a": "train"}}
    page = reports.page(found, (tmp_path / "plot.png").read_bytes())
    assert "Does &lt;b&gt; beat a?" in page
    assert "Why &lt;a&gt;?" in page
    assert page.count('src="data:image/png;base64,') == page.count("src=") == 1
    for absent in ("<script", "http", "<b>"):
        assert absent not in page
    assert f"<td>{found['entries']['b']['mean']['mean']:.4f} [" in page
