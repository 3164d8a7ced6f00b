"""Runs the training command as a user does: kills, stops, damages, mistakes, two processes."""

import collections
import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from yocou_jax import accounting
from yocou_jax.config import ModelConfig
from yocou_jax.training.lock import WorkdirLock
from yocou_jax.training.preemption import EXIT_PREEMPTED

ROOT = Path(__file__).parent.parent
STEPS = 60
FIELDS = {
    "model.num_layers": 2,
    "model.num_loops": "1,2",
    "model.vocab_size": 258,
    "model.d_model": 32,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.head_dim": 16,
    "model.d_ff": 64,
    "model.window": 8,
    "compute.unroll": 0,  # loops compile faster
    "optimizer.learning_rate": 0.003,
    "optimizer.warmup_steps": 5,
    "data.tokenizer": "bytes",
    "data.batch_size": 8,
    "data.sequence_length": 32,
    "data.validation_fraction": 0.2,
    "data.validation_sequences": 8,
    "run.steps": STEPS,
    "run.log_every": 1,
    "run.eval_every": 20,
    "run.sample_every": STEPS,
    "run.sample_tokens": 4,
    "run.checkpoint_every": 10,
    "run.keep_checkpoints": 3,
}
# Metrics that depend on the clock. A repeated run has the same values of all others.
CLOCK = {"tokens_per_s", "data_wait_fraction", "mfu", "elapsed_s"}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with its own text. Runs share its token cache."""
    path = tmp_path_factory.mktemp("runs")
    rng = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "one", "two", "three", "def", "return", "if"]
    lines = (" ".join(rng.choices(words, k=12)) for _ in range(2500))
    (path / "text.txt").write_text("\n".join(lines))
    return path


def command(home: Path, workdir: str, *flags: str, **fields) -> list[str]:
    fields = FIELDS | {
        "data.source": home / "text.txt",
        "data.cache_dir": home / "cache",
        **{name.replace("__", "."): value for name, value in fields.items()},
    }
    return [
        *(sys.executable, "-m", "experiments.train", "--config=configs/yocou_small.py"),
        *(f"--config.{name}={value}" for name, value in fields.items()),
        f"--workdir={home / workdir}",
        *flags,
    ]


def environment(devices: int = 1) -> dict[str, str]:
    flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
    flags.append(f"--xla_force_host_platform_device_count={devices}")
    return os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu", "COLUMNS": "200"}


def start(line: list[str], devices: int = 1) -> subprocess.Popen:
    return subprocess.Popen(
        line,
        cwd=ROOT,
        env=environment(devices),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    try:
        output, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == code, output
    return output


def run(line: list[str], code: int = 0, devices: int = 1) -> str:
    return finish(start(line, devices), code)


def rows(workdir: Path) -> list[dict]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]


def summary(workdir: Path) -> dict:
    return json.loads((workdir / "summary.json").read_text())


def wait_for(process: subprocess.Popen, workdir: Path, steps: int) -> None:
    """Waits until the run has written `steps` rows of metrics."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if (workdir / "metrics.jsonl").read_text().count("\n") >= steps:
                return
        if process.poll() is not None:
            pytest.fail(f"The run ended before its step {steps}:\n{process.stdout.read()}")
        time.sleep(0.005)
    pytest.fail(f"The run did not reach step {steps}.")


def wait_for_folder(process: subprocess.Popen, folder: Path) -> None:
    while not folder.exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.002)


@pytest.fixture(scope="module")
def whole(home) -> Path:
    """A run that was not interrupted."""
    output = run(command(home, "whole"))
    assert "Finished" in output
    assert sorted(re.findall(r"Compiled the train step with loops=(\d)", output)) == ["1", "2"]
    assert "Resumed" not in output
    return home / "whole"


# --- The files of a run ---------------------------------------------------------------------------


def test_names_in_the_files_of_a_run(whole):
    found = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    names = {"loss", "grad_norm", "lr", "tokens_per_s", "data_wait_fraction", "bpb", "tokens"}
    assert all(names <= set(row) for row in found)
    evaluated = {row["step"] for row in found if {"val_loss", "val_bpb"} <= set(row)}
    assert evaluated == {20, 40, 60}
    got = summary(whole)
    for name in (
        *("params", "tokens", "train_flops", "val_loss", "val_bpb", "tokens_per_s", "wall_s"),
        *("kv_bytes_per_sequence", "final_params_sha256"),
    ):
        assert name in got, name
    assert got["tokens"] == STEPS * 8 * 32
    assert got["val_loss"] == found[-1]["val_loss"] == got["val_loss_loops_2"]
    assert got["val_loss"] != got["val_loss_loops_1"] == found[-1]["val_loss_loops_1"]
    counts = collections.Counter(row["loops"] for row in found)
    assert counts[1] + counts[2] == STEPS
    assert min(counts.values()) > STEPS / 4
    assert len(got["final_params_sha256"]) == 64
    manifest = json.loads((whole / "manifest.json").read_text())
    assert {"config", "git", "packages", "device", "corpus"} <= set(manifest)
    model = ModelConfig.from_dict(manifest["config"]["model"])
    one, two = (dataclasses.replace(model, num_loops=count) for count in (1, 2))
    flops = [accounting.train_flops_per_token(m, 32) for m in (one, two)]
    expected = 8 * 32 * (counts[1] * flops[0] + counts[2] * flops[1])
    assert got["train_flops"] == pytest.approx(expected)
    assert list(whole.glob("events.out.tfevents.*"))


def test_a_run_learns(whole):
    losses = [row["loss"] for row in rows(whole)]
    assert losses[0] > 5  # log 258 = 5.55
    assert losses[-1] < 2.8  # the entropy of the letters without context is 2.9 nats
    assert summary(whole)["val_loss"] < 2.8


# --- What the run has learned, measured again -----------------------------------------------------


def test_an_evaluation_gives_the_loss_of_the_validation(whole):
    """And a depth curve. Nothing else in the workdir changes."""
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()}
    flags = [f"--workdir={whole}", "--task=loops", "--loops=1", "--json"]
    output = run([sys.executable, "-m", "experiments.evaluate", *flags])
    report, _ = json.JSONDecoder().raw_decode(output, output.index("{"))  # with stderr
    for name in ("loops.json", "loops.png"):
        assert f"Wrote {whole}/evaluation/{name}\n" in output
    assert json.loads((whole / "evaluation/loops.json").read_text()) == report
    one, two = report["tables"]["nats per token by loop count"]
    assert (one["loops"], two["loops"], two["trained"]) == (1, 2, True)
    assert two["nats"] == pytest.approx(summary(whole)["val_loss"], rel=1e-6)
    assert two["bits_per_byte"] == pytest.approx(summary(whole)["val_bpb"], rel=1e-6)
    assert one["nats"] > two["nats"]
    after = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()}
    assert {p: after[p] for p in before} == before
    folders = {p.parent.relative_to(whole).as_posix() for p in after.keys() - before.keys()}
    assert folders == {"evaluation"}


# --- Interrupted runs end with the same parameters ------------------------------------------------


@pytest.mark.slow
def test_a_workdir_in_use_is_refused(home):
    with WorkdirLock(home / "held"):
        output = run(command(home, "held"), code=2)
        assert_one_sentence(output, f"{home / 'held'} is in use", f"process {os.getpid()} on")
        assert [p.name for p in (home / "held").iterdir()] == ["owner.json"]


@pytest.mark.slow
def test_a_run_that_is_killed_stopped_and_resumed_equals_an_uninterrupted_run(home, whole):
    line, workdir = command(home, "disturbed"), home / "disturbed"
    process = start(line)
    wait_for(process, workdir, 22)
    wait_for_folder(process, workdir / "checkpoints" / "20")  # then that of step 10 is complete
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (workdir / "summary.json").exists()
    killed_at = rows(workdir)[-1]["step"]
    assert killed_at < STEPS

    process = start(line)
    wait_for(process, workdir, killed_at + 3)
    process.send_signal(signal.SIGTERM)
    output = finish(process, EXIT_PREEMPTED)
    assert "Resumed from the checkpoint" in output
    assert "Stopped on request" in output
    assert "Traceback" not in output
    stopped_at = rows(workdir)[-1]["step"]
    assert killed_at < stopped_at < STEPS

    output = run(line)
    assert f"Resumed from the checkpoint of step {stopped_at}" in output
    assert summary(workdir)["final_params_sha256"] == summary(whole)["final_params_sha256"]
    # Each step occurs once, with the loss and other metrics of the run that was not interrupted.
    again = {row["step"]: row for row in rows(workdir)}
    assert len(again) == len(rows(workdir))
    for row in rows(whole):
        got = again[row["step"]]
        assert {k: got[k] for k in row if k in got} == {k: row[k] for k in row if k in got}
        assert {"loss", "grad_norm", "lr"} <= set(got)


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_skipped(home, whole):
    workdir = home / "damaged"
    shutil.copytree(whole, workdir)
    (workdir / "summary.json").unlink()
    newest = max(
        (workdir / "checkpoints").iterdir(), key=lambda p: int(p.name) if p.name.isdigit() else -1
    )
    assert newest.name == str(STEPS)
    files = [p for p in newest.rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    output = run(command(home, "damaged"))
    assert f"Resumed from the checkpoint of step {STEPS - 10}" in output
    warning = next(
        line for line in output.splitlines() if "damaged" in line or "was skipped" in line
    )
    assert str(STEPS) in warning
    assert "Traceback" not in output
    assert summary(workdir)["final_params_sha256"] == summary(whole)["final_params_sha256"]
    assert rows(workdir) == rows(whole)


@pytest.mark.slow
def test_a_finished_run_is_not_run_again(home, whole):
    before = summary(whole)["final_params_sha256"]
    output = run(command(home, "whole"))
    assert f"Resumed from the checkpoint of step {STEPS}" in output
    assert summary(whole)["final_params_sha256"] == before
    assert len(rows(whole)) == STEPS


# --- Resumed runs with other settings ------------------------------------------------------------


@pytest.mark.slow
def test_a_resumed_run_may_change_how_it_is_computed(home, whole):
    shutil.copytree(whole, home / "recomputed")
    changed = {"compute__remat": "full", "compute__attention": "reference", "compute__scan": False}
    output = run(command(home, "recomputed", data__validation_sequences=4, **changed))
    assert f"Resumed from the checkpoint of step {STEPS}" in output
    for words in ("remat: 'none' -> 'full'", "scan: True -> False", "sequences: 8 -> 4"):
        assert words in output


@pytest.mark.slow
def test_empty_flags_are_refused(home):
    """If a script uses an unset variable, the default or the current folder must not be used."""
    for flag in ("--init_from=", "--workdir= "):
        assert_one_sentence(run(command(home, "bad", flag), code=2), flag.strip("= "), "is empty")


@pytest.mark.slow
def test_a_refusal_leaves_no_manifest(home, whole):
    """The checkpoints have no manifest. After a refused config, the right one can still resume."""
    shutil.copytree(whole, home / "moved")
    (home / "moved" / "manifest.json").unlink()
    before = sorted(p.name for p in (home / "moved").iterdir())
    output = run(command(home, "moved", model__d_ff=72), code=2)
    assert "has other arrays than this model (" in output
    assert sorted(p.name for p in (home / "moved").iterdir()) == before
    assert f"Resumed from the checkpoint of step {STEPS}" in run(command(home, "moved"))


# --- An error of the terminal never ends a run ----------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ascii", "no reader"])
def test_a_terminal_that_cannot_show_the_output(home, how):
    """A C locale, whose output is ASCII, and a pipe that nobody reads any more (`| head -1`)."""
    fields = {"run__steps": 12, "run__sample_every": 6}  # the samples are not ASCII
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    process = subprocess.Popen(
        command(home, f"shown_{how[:2]}", **fields),
        cwd=ROOT,
        env=environment() | (locale if how == "ascii" else {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    if how == "no reader":
        process.stdout.close()
        process.stdout = None
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert b"Traceback" not in errors
    assert b"Exception ignored" not in errors
    assert summary(home / f"shown_{how[:2]}")["tokens"] == 12 * 8 * 32


# --- One sentence for every mistake ---------------------------------------------------------------


def assert_one_sentence(output: str, *words: str) -> None:
    assert "Traceback" not in output
    lines = [line for line in output.splitlines() if line.strip()]
    assert len(lines) == 1, output
    assert lines[0].endswith((".", "?")), output
    for word in words:
        assert word in lines[0], output


def test_a_changed_config_is_refused_with_the_fields(home, whole):
    line = command(home, "whole", model__window=9, optimizer__learning_rate=0.5, run__log_every=2)
    output = run(line, code=2)
    assert_one_sentence(
        output, "model.window: 8 -> 9", "optimizer.learning_rate: 0.003 -> 0.5", str(whole)
    )
    assert "log_every" not in output  # it does not change the mathematics


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model__windw": 3}, ["windw", "Did you mean 'model.window'?"]),
        ({"model__architecture": "cross*2"}, ["cross*2", "begins with a cross stage"]),
        ({"model__architecture": "yocou"}, ["yocou", "yoco_u"]),
        ({"model__num_layers": 3}, ["num_layers=3", "odd"]),
        ({"model__d_model": "wide"}, ["--config.model.d_model", "wide"]),
        ({"data__batch_size": 9, "optimizer__accumulation_steps": 2}, ["batch_size=9", "2"]),
        ({"mesh__data": 3}, ["data=3", "1 devices"]),
        ({"data__source": "no/such/file.txt"}, ["no/such/file.txt"]),
        ({"model__vocab_size": 100}, ["258", "vocab_size=100"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_bad_config_is_answered_with_one_sentence(home, fields, words):
    output = run(command(home, "bad", **fields), code=2)
    assert_one_sentence(output, *words)
    assert not (home / "bad").exists()


@pytest.mark.slow
def test_a_batch_that_does_not_divide_over_the_devices(home):
    output = run(command(home, "bad", data__batch_size=9), code=2, devices=2)
    assert_one_sentence(output, "data.batch_size=9", "2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config=configs/nothing.py"], ["configs/nothing.py", "does not exist"]),
        ([], ["--config is missing"]),
        (["--config=configs/yocou_small.py", "--wrokdir=x"], ["--wrokdir", "workdir"]),
        (["--config=configs/yocou_small.py", "extra"], ["extra"]),
        (["--config=configs/yocou_small.py:trasnformer"], ["trasnformer"]),
    ],
    ids=["missing config", "no config", "wrong flag", "stray word", "wrong preset"],
)
def test_a_bad_command_line_is_answered_with_one_sentence(flags, words):
    output = run([sys.executable, "-m", "experiments.train", *flags], code=2)
    assert_one_sentence(output, *words)


@pytest.mark.slow
def test_an_unwritable_workdir_is_answered_with_one_sentence(home):
    """The path is a file. This test works for root too, who may write everywhere."""
    (home / "file").write_text("")
    output = run(command(home, "file/run"), code=2)
    assert_one_sentence(output, str(home / "file"))


# --- Two processes --------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_give_the_same_run_as_one(home, whole):
    """With the same draws of loop counts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ("--distributed", f"--coordinator=127.0.0.1:{port}", "--num_processes=2")
    both = [start(command(home, "two", *flags, f"--process_id={rank}")) for rank in (0, 1)]
    outputs = [finish(process) for process in both]
    assert "2 x cpu" in outputs[0]
    assert "Finished" not in outputs[1]  # only process 0 prints
    for one, two in zip(rows(whole), rows(home / "two"), strict=True):
        assert set(one) == set(two)
        assert one["loops"] == two["loops"]
        for name in ("loss", "grad_norm", "val_loss"):
            if name in one:
                assert two[name] == pytest.approx(one[name], rel=1e-5), (one["step"], name)
