"""What an evaluation writes, and that it changes nothing else in a workdir."""

import inspect
import json
import re
from types import SimpleNamespace

import jax
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.trained import model, workdir
from yocou_jax.config import MeshConfig
from yocou_jax.errors import UserError
from yocou_jax.evaluation import results, tasks
from yocou_jax.evaluation.options import Options
from yocou_jax.pretrained import export
from yocou_jax.sharding import make_mesh


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1])


@pytest.fixture
def quick(monkeypatch):
    """Tasks that compute nothing."""

    def run(loaded, mesh, options):
        row = {"loops": 3, "nats": 1.5, "stderr": float("nan"), "trained": True}
        return {"loops": [3], "scalars": {"nats": 1.5}, "tables": {"x": [row]}, "length": 8}

    task = SimpleNamespace(run=run, draw=lambda report: None, reads=(), one=())
    monkeypatch.setitem(tasks.TASKS, "quick", task)


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_a_report_in_a_workdir(tmp_path, mesh, quick):
    one = model(step=3)
    folder = workdir(tmp_path, one, 3)
    before = contents(folder)
    report = results.evaluate("quick", Options(folder), mesh, command="how")
    assert results.write(report, folder) == [folder / "evaluation/quick.json"]
    after = contents(folder)
    assert {name: after[name] for name in before} == before
    events, file = sorted(set(after) - set(before))
    assert file == "evaluation/quick.json"
    assert events.startswith("evaluation/events")
    stored = json.loads(after["evaluation/quick.json"], parse_constant=pytest.fail)
    assert stored["tables"]["x"][0]["stderr"] is None
    facts = ("task", "step", "trained_loops", "loops", "dtype", "command", "tokenizer")
    assert [stored[name] for name in facts] == [
        *("quick", 3, [3], [3], "float32", "how", one.tokenizer.fingerprint)
    ]
    assert stored["program"] == "window*2@3 | cross*2"
    assert stored["config"]["model"]["d_model"] == one.config.d_model
    assert {"git", "python", "packages", "device", "created"} <= stored.keys()
    assert set(stored["attention"]) == {"window", "cross"}
    assert all(kernel.startswith("xla") for kernel in stored["attention"].values())
    events = EventAccumulator(str(folder / "evaluation"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("evaluation/quick/nats")] == [(3, 1.5)]


def test_an_exported_folder_gets_no_events(tmp_path, mesh, quick):
    export(tmp_path / "a", model())
    report = results.evaluate("quick", Options(tmp_path / "a"), mesh)
    results.write(report, tmp_path / "a")
    assert not list((tmp_path / "a/evaluation").glob("events*"))
    (tmp_path / "a/evaluation/quick.json").rename(tmp_path / "a/moved")
    (tmp_path / "a/evaluation").rmdir()
    (tmp_path / "a/evaluation").write_text("")
    with pytest.raises(UserError, match="evaluation is not a folder"):
        results.write(report, tmp_path / "a")


def test_mistakes_and_too_little_memory(tmp_path, mesh, monkeypatch):
    with pytest.raises(UserError, match="--task=x is not one of perplexity, loops, "):
        results.evaluate("x", Options(tmp_path), mesh)
    export(tmp_path / "a", model())

    def run(*_):
        raise MemoryError

    monkeypatch.setitem(tasks.TASKS, "large", SimpleNamespace(run=run, reads=(), one=()))
    with pytest.raises(UserError, match="does not fit into the memory"):
        results.evaluate("large", Options(tmp_path / "a"), mesh)


@pytest.mark.parametrize(
    ("task", "given", "sentence"),
    [
        ("loops", {"seed": 1}, "The task loops does not read --seed. It is read by hops, needle, "),
        ("hops", {"few_shot": 0}, "not read --few_shot. It is read by harness."),
        ("perplexity", {"end_of_text": False}, "--end_of_text. It is read by harness."),
        ("loops", {"lengths": (8, 9)}, "--lengths=8,9 has 2 values, but the task loops takes one."),
        ("inside", {"loops": (2, 3)}, "--loops=2,3 has 2 values, but the task inside takes one."),
        ("loops", {"loops": (2, 3), "lengths": (8,), "seed": 0}, "does not exist"),
    ],
)
def test_options_without_an_effect(task, given, sentence, tmp_path, mesh):
    with pytest.raises(UserError, match=re.escape(sentence)):
        results.evaluate(task, Options(tmp_path / "nowhere", **given), mesh)


@pytest.mark.parametrize("task", tasks.TASKS.values(), ids=list(tasks.TASKS))
def test_the_table_says_what_a_task_reads(task):
    """What its module reads itself, and what the functions read that it gives all options to."""
    source = inspect.getsource(task._module)
    found = set(re.findall(r"\boptions\.(\w+)", source)) - {"folder"}
    for call, reads in (
        ("open_text(", {"source", "lengths", "samples"}),
        ("models(", {"loops"}),
        ("settings(options", {"source"}),
    ):
        found |= reads if f" {call}" in source else set()
    assert found == set(task.reads)


@pytest.mark.parametrize("task", ["perplexity", "loops"])
def test_figures(task):
    """They can be drawn, also with numbers that are not known."""
    loss = {"nats": 2.0, "stderr": float("nan"), "difference_stderr": float("nan")}
    report = {
        "config": {"model": {"architecture": "window*1@3 | cross*1"}},
        "program": "window*1@3 | cross*1",
        "last": 2,
        "as_trained": loss,
    }
    rows = {
        "perplexity": [[loss], [{"to": n, **loss} for n in (1, 2)], [{"length": 2, **loss}]],
        "loops": [[{"loops": n, "trained": n == 3, **loss} for n in (1, 3)]],
    }[task]
    figure = tasks.TASKS[task].draw(report | {"tables": dict(enumerate(rows))})
    lines = [line.get_xydata().tolist() for line in figure.axes[0].lines]
    assert [[1.0, 2.0], [2.0 if task == "perplexity" else 3.0, 2.0]] in lines
    if task == "loops":
        assert [[3.0, 2.0]] in lines  # the star
