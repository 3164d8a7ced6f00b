"""The host loop: a changed end of the schedule, weights of other runs, samples that fail."""

import io
import json
import random

import jax
import jax.numpy as jnp
import pytest
import rich.console

from tests import tiny
from tests.test_device_memory import too_much
from yocou_jax import pretrained
from yocou_jax.checkpoint import Checkpointer, params_sha256
from yocou_jax.config import PROFILE_FROM
from yocou_jax.errors import UserError
from yocou_jax.manifest import CODE
from yocou_jax.training import metrics
from yocou_jax.training.console import Console
from yocou_jax.training.evaluators import Sample, Validation
from yocou_jax.training.loop import Run, facts
from yocou_jax.training.resume import compare_starts, new_end


def config(steps, schedule, **optimizer):
    return tiny.config(
        optimizer={"schedule": schedule, "warmup_steps": 2, "decay_fraction": 0.5} | optimizer,
        run={"steps": steps},
    )


def test_runs_of_a_sweep_differ_in_the_first_columns():
    """TensorBoard shows the first five."""
    config = tiny.config(num_loops="1,2")
    first = sorted(facts(config))[:5]
    assert {"1 program", "2 loops", "3 learning rate", "4 FLOPs", "5 tokens"} == set(first)
    assert facts(config)["2 loops"] == "1,2"
    assert facts(tiny.config(num_loops=2))["2 loops"] == 2
    assert facts(config)["5 tokens"] == 16 * config.data.batch_size * config.run.steps


@pytest.mark.parametrize(
    ("old", "new", "first"),
    [
        (config(10, "constant"), config(20, "constant"), 10),
        (config(20, "constant"), config(10, "constant"), 10),
        (config(20, "wsd"), config(40, "wsd"), 10),  # updates 0 to 9 are before the decay
        (config(20, "constant"), config(20, "wsd"), 10),
        (config(20, "wsd"), config(20, "wsd", final_fraction=0.5), 10),
        (config(20, "cosine"), config(30, "cosine"), 2),  # these are the warm-up
    ],
)
def test_an_end_that_no_update_depends_on(old, new, first):
    words, exact = new_end(old, new, first)
    assert "no update so far depends on it" in words
    assert exact


def test_a_new_end_after_the_decay_began_gives_a_notice():
    words, exact = new_end(config(20, "wsd"), config(40, "wsd"), 20)
    assert not exact
    assert "run.steps: 20 -> 40" in words
    assert "update 21 is 0.000955; in the old schedule it is 0.0001" in words
    words, _ = new_end(config(20, "wsd"), config(20, "constant"), 11)
    assert "optimizer.schedule: 'wsd' -> 'constant'" in words
    assert "A run with the new values from its start would differ" in words
    words, _ = new_end(config(20, "wsd"), config(15, "wsd"), 15)  # nothing is left to train
    assert "learning rate" not in words


def test_a_jump_of_the_learning_rate_is_not_forgotten(tmp_path):
    """A later change of the end that is exact by itself does not make the run exact."""
    before = {"config": config(40, "wsd").to_dict(), "resumes": [{"exact": False}]}
    words, exact = compare_starts(tmp_path, before, config(60, "wsd"), 20, None)
    assert not exact
    assert "no update so far depends on it" in words[0]
    assert "an earlier change" in words[1]
    before["resumes"] = [{"exact": True}]
    words, exact = compare_starts(tmp_path, before, config(60, "wsd"), 20, None)
    assert exact
    assert len(words) == 1
    assert compare_starts(tmp_path, before, config(40, "wsd"), 20, None) == ([], True)


@pytest.mark.parametrize(
    ("old", "new", "first", "words"),
    [
        (config(20, "cosine"), config(30, "cosine"), 3, "--init_from"),
        (config(20, "cosine"), config(20, "wsd"), 20, "the cosine falls over the whole"),
        (config(20, "wsd"), config(20, "cosine"), 20, "constant or wsd"),
        (config(20, "constant"), config(10, "constant"), 11, "11 updates already"),
    ],
)
def test_a_new_end_that_is_refused(old, new, first, words):
    with pytest.raises(UserError, match=words):
        new_end(old, new, first)


@pytest.fixture
def make_run(tmp_path):
    """Makes runs of one tiny model with their own text. The console writes nowhere."""
    rng = random.Random(0)
    text = "\n".join("".join(rng.choices("abcd ", k=60)) for _ in range(400))
    (tmp_path / "text.txt").write_text(text)
    data = {
        "source": str(tmp_path / "text.txt"),
        "tokenizer": "bytes",
        "cache_dir": str(tmp_path / "cache"),
        "validation_sequences": 2,
        "validation_fraction": 0.3,
    }
    console = Console(rich.console.Console(file=io.StringIO()))

    def make(folder="run", init_from=None, model=(), tokenizer="bytes", **run):
        small = tiny.config(
            "full*1@2",
            data=data | {"tokenizer": tokenizer},
            run={"eval_every": 50, "sample_every": 50} | run,
            optimizer={"warmup_steps": 0, "max_skipped_updates": 3, "schedule": "constant"},
            **({"vocab_size": 300} | dict(model)),
        )
        return Run(small, tmp_path / folder, console, init_from=init_from)

    return make


def note_saves(monkeypatch):
    """A list that gets ("checkpoint", step) when a checkpoint begins to be saved. (Orbax makes its
    folder later, in a thread.)"""
    events, save = [], Checkpointer.save

    def noted(self, step, state):
        events.append(("checkpoint", step))
        return save(self, step, state)

    monkeypatch.setattr(Checkpointer, "save", noted)
    return events


@pytest.mark.slow
def test_a_sample_that_fails_comes_after_the_checkpoint_and_the_run_goes_on(
    make_run, monkeypatch, caplog
):
    run = make_run(steps=2, eval_every=2, sample_every=1, checkpoint_every=1, analysis=True)
    events = note_saves(monkeypatch)

    def fail(self, params, step):
        events.append(("sample", step))
        raise RuntimeError("out of memory\nand much more")

    monkeypatch.setattr(Sample, "show", fail)
    summary = run.train()
    assert events == [("checkpoint", 1), ("sample", 1), ("checkpoint", 2), ("sample", 2)]
    assert caplog.text.count("No sample at step") == 2
    assert "and much more" not in caplog.text
    assert summary["tokens"] == 2 * 8 * 16
    row = metrics.read_metrics(run.workdir / "metrics.jsonl")[-1]
    assert row["inside/loss_loop_2"] == pytest.approx(row["val_loss"])  # after the last loop
    assert row["inside/kl_loop_2"] == 0 < row["inside/kl_loop_1"]


@pytest.mark.slow
def test_a_run_that_is_made_longer_equals_the_longer_run(make_run, tmp_path):
    """Bit for bit, with a schedule whose past does not depend on its end. The workdir is older than
    the group `compute` and run.analysis."""
    make_run(steps=3).train()
    path = tmp_path / "run" / "manifest.json"
    old = json.loads(path.read_text())
    old["config"]["model"] |= old["config"].pop("compute")
    del old["config"]["run"]["analysis"]
    path.write_text(json.dumps(old))
    longer, at_once = make_run(steps=6).train(), make_run("at_once", steps=6).train()
    assert longer["final_params_sha256"] == at_once["final_params_sha256"]
    losses = [
        [row["loss"] for row in metrics.read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("run", "at_once")
    ]
    assert losses[0][-1] == losses[1][-1]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    (resume,) = manifest["resumes"]
    assert (resume["step"], resume["exact"]) == (3, True)
    assert "run.steps: 3 -> 6" in resume["changes"][0]
    assert len(resume["changes"]) == 1
    assert resume["before"] == {key: manifest[key] for key in CODE}  # of the steps before it
    with pytest.raises(UserError, match=r"6 updates already, more than run.steps=5"):
        make_run(steps=5).train()


@pytest.mark.slow
def test_a_run_from_the_weights_of_another_run(make_run, tmp_path):
    first = make_run("first", steps=2).train()
    source = tmp_path / "first"
    changed = {"model": {"num_loops": 3}, "init_from": source}
    tuned = make_run("tuned", steps=3, **changed)
    tuned.train()
    origin = json.loads((tmp_path / "tuned" / "manifest.json").read_text())["init_from"]
    assert origin == {"path": str(source), "step": 2}
    # After it has a checkpoint, it continues from there.
    again = make_run("tuned", steps=3, **changed).train()
    assert again["final_params_sha256"] != first["final_params_sha256"]
    for run, words in (
        (make_run("tuned", steps=3, **changed | {"init_from": tmp_path}), "was started from"),
        (make_run("bad", source, {"d_ff": 32}, steps=2), r"other arrays .*-> \[1, 16, 32\]"),
        (make_run("bad", source, tokenizer="bpe", steps=2), "tokenizer.json"),
        (make_run("bad", tmp_path / "nothing", steps=2), "does not exist"),
    ):
        with pytest.raises(UserError, match=words):
            run.train()
    assert not (tmp_path / "bad").exists()


@pytest.mark.slow
def test_init_from_does_not_change_the_parameters(make_run, tmp_path):
    make_run("first", steps=2).train()
    run = make_run("second", tmp_path / "first", steps=2)
    run._load_data()
    wanted = pretrained.load(tmp_path / "first").params
    with jax.set_mesh(run.setup.mesh):
        state = run._fresh({}, [])
    assert params_sha256(state.params) == params_sha256(wanted)
    assert int(state.step) == 0


@pytest.mark.parametrize("part", ["_begin", "_loop"])  # of the state, or of a step
def test_what_is_too_large_is_a_sentence(part, make_run, monkeypatch):
    run = make_run(steps=2)
    monkeypatch.setattr(run, part, too_much)
    with pytest.raises(UserError, match=r"Training does not fit into .* order: compute.remat="):
        run.train()


@pytest.mark.slow
def test_a_summary_of_a_shorter_run_is_removed(make_run, tmp_path):
    """A sweep treats a run with a summary as finished."""
    run = make_run(steps=2)
    old = run.train()
    path = tmp_path / "run" / "summary.json"
    assert run.train() == make_run(steps=2).train() == json.loads(path.read_text()) == old
    path.write_text(json.dumps(old | {"final_params_sha256": "another"}))
    assert make_run(steps=2).train()["final_params_sha256"] == old["final_params_sha256"]
    checkpointer = Checkpointer(tmp_path / "run" / "checkpoints")
    longer = make_run(steps=4)
    with jax.set_mesh(longer.setup.mesh), checkpointer:
        longer._load_data()
        longer._begin(checkpointer)
    assert not path.exists()


@pytest.mark.slow
def test_the_end_of_a_run(make_run, monkeypatch):
    """The last step is saved before a sample is shown, even if no checkpoint is due. A trace that
    ends with it has nothing of the evaluation."""
    events, measure = note_saves(monkeypatch), Validation.measure
    monkeypatch.setattr(Sample, "show", lambda self, params, step: events.append(("sample", step)))
    monkeypatch.setattr(
        Validation, "measure", lambda *args: events.append("validation") or measure(*args)
    )
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: events.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
    sizes = {"steps": PROFILE_FROM + 2, "profile_steps": 2, "checkpoint_every": 5}
    run = make_run(**sizes, sample_every=PROFILE_FROM + 2)
    run.train()
    last = PROFILE_FROM + 2
    due = [("checkpoint", step) for step in range(5, last, 5)]
    found = [event for event in events if event not in due]
    assert found == ["start", "stop", "validation", ("checkpoint", last), ("sample", last)]


@pytest.mark.slow
def test_a_gradient_that_stays_infinite_stops_the_run(make_run):
    run = make_run(steps=20)
    init = run.setup.init

    def broken():
        return jax.tree.map(lambda x: x * jnp.nan if x.dtype == jnp.float32 else x, init())

    run.setup = run.setup._replace(init=broken)
    words = "not finite for 3 updates in a row, the last one at step 3"
    with pytest.raises(UserError, match=words):
        run.train()
    assert run.writer._file.closed
