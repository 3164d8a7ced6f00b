"""What a run writes for scripts and people: rows, events, the summary, the terminal."""

import contextlib
import io
import json
import math
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import rich.console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import browser
from yocou_jax.training import metrics
from yocou_jax.training.console import Console
from yocou_jax.training.metrics import MetricsWriter, mfu, read_metrics


def test_the_names_of_the_metrics():
    relied_on = {"loss", "bpb", "val_loss", "val_bpb", "grad_norm", "lr", "tokens_per_s", "mfu"}
    names = [v for k, v in vars(metrics).items() if k.isupper() and isinstance(v, str)]
    assert relied_on | {"data_wait_fraction", "step", "tokens"} <= set(names)
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"[a-z_0-9]+", name) for name in names)


def test_mfu_is_known_only_if_the_peak_is():
    assert mfu(312e12, "NVIDIA A100-SXM4-80GB", 4) == pytest.approx(0.25)
    assert mfu(312e12, "cpu", 1) is None


def scalars(workdir, tag="1 loss/loss"):
    events = EventAccumulator(str(workdir))
    events.Reload()
    return {e.step: e.value for e in events.Scalars(tag)}


def test_a_resume_drops_rows_after_the_checkpoint(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in range(10, 60, 10):
        writer.write(step, {"loss": np.float32(step), "tokens": step * 100})
    with (tmp_path / "metrics.jsonl").open("a") as file:  # the killed run has closed nothing
        file.write('{"step": 60, "lo')
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [10, 20, 30, 40, 50]

    resumed = MetricsWriter(tmp_path, resume_step=30)
    resumed.write(40, {"loss": 4.5})
    resumed.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 20, 30, 40]
    assert json.loads(lines[0]) == {"step": 10, "loss": 10.0, "tokens": 1000}
    assert scalars(tmp_path) == {10: 10.0, 20: 20.0, 30: 30.0, 40: 4.5}

    MetricsWriter(tmp_path).close()  # a new run removes the rows of the old one
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_steps_must_increase_and_nan_becomes_null(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"loss": float("nan"), "lr": 1e-3, "mfu": None})
    with pytest.raises(ValueError, match="Step 1 is written after step 1"):
        writer.write(1, {"loss": 1.0})
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "loss": None, "lr": 1e-3}
    assert np.isnan(scalars(tmp_path)[1])


def test_text_hparams_and_summary(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.events.text("sample", "def f():\n    return 1", step=7)
    writer.events.hparams({"Loops": 3, "model.num_loops": None}, ["validation/val_loss"])
    writer.summary({"val_loss": 1.5, "params": 10})
    writer.summary({"val_loss": float("nan"), "params": 10})
    writer.close()
    text = (tmp_path / "summary.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"val_loss": None, "params": 10}
    assert not list(tmp_path.glob("*.new"))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert "sample/text_summary" in events.Tags()["tensors"]
    (sample,) = events.Tensors("sample/text_summary")
    assert sample.step == 7
    assert sample.tensor_proto.string_val[0] == b"    def f():\n        return 1"
    hparams = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"Loops" in hparams
    assert b"model.num_loops" in hparams


def test_losses_by_tokens_and_gflops_survive_a_resume(tmp_path):
    """TensorBoard drops what a resume repeats by its step, and on these axes nothing is a step."""
    writer = MetricsWriter(tmp_path, gflops_per_token=0.5)
    for step in (10, 20, 30):
        writer.write(step, {"loss": step / 10, "tokens": step * 100, "lr": 1.0})
    writer.close()
    resumed = MetricsWriter(tmp_path, resume_step=20, gflops_per_token=0.5)
    resumed.write(30, {"loss": 9.0, "val_loss": 8.0, "tokens": 3000})
    resumed.close()
    assert scalars(tmp_path, "x_tokens/loss") == {1000: 1.0, 2000: 2.0, 3000: 9.0}
    assert scalars(tmp_path, "x_gflops/loss") == {500: 1.0, 1000: 2.0, 1500: 9.0}
    assert scalars(tmp_path, "x_gflops/val_loss") == {1500: 8.0}
    assert scalars(tmp_path, "5 optimizer/lr") == {10: 1.0, 20: 1.0}


def test_every_metric_has_a_group():
    names = {v for k, v in vars(metrics).items() if k.isupper() and isinstance(v, str)}
    grouped = [name for group in metrics.GROUPS.values() for name in group]
    assert len(grouped) == len(set(grouped))
    assert names - set(grouped) == {metrics.STEP, metrics.SKIPPED_IN_A_ROW}
    assert list(metrics.GROUPS) == sorted(metrics.GROUPS)  # so does TensorBoard


def test_a_metric_of_a_family_is_in_the_group_of_the_family():
    assert metrics.tag("inside/step_loop_1") == "3 loop/inside/step_loop_1"
    assert metrics.tag(metrics.at_loops(metrics.VAL_LOSS, 3)) == "2 validation/val_loss_loops_3"
    assert metrics.tag("mine") == "8 other/mine"


def plain(**options):
    out = io.StringIO()
    return out, Console(rich.console.Console(file=out, width=80), **options)


ROW = {"loss": 3.21987, "bpb": 1.5, "tokens_per_s": 45678.9, "mfu": 0.412}


def test_plain_lines_are_complete_and_throttled(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("yocou_jax.training.console.time.monotonic", lambda: clock[0])
    out, console = plain(plain_every_s=10)
    with console:
        console.start(1000)
        for step in range(100, 1001):
            console.update(step, ROW)
            clock[0] += 1.0
        console.notice("[bold] is not markup, and a long sentence " + "x" * 80)
    lines = out.getvalue().splitlines()
    assert len(lines) == 91 + 1  # the notice, and every tenth step with the first and the last one
    assert lines[0] == ("step  100/1000  loss 3.220  1.500 bits/byte  45,679 tokens/s  MFU 41.2%")
    assert lines[1].endswith("MFU 41.2%  14:50 left")
    assert lines[-1] == "[bold] is not markup, and a long sentence " + "x" * 80
    assert "\x1b" not in out.getvalue()


def test_unknown_values_are_not_shown():
    out, console = plain()
    console.start(10)
    console.update(1, {"loss": 2.0, "mfu": None})
    assert out.getvalue() == "step  1/10  loss 2.000\n"


def test_loop_counts_that_are_drawn_are_shown():
    out, console = plain()
    console.start(10)
    console.update(1, {"loss": 2.0, "loops": 3})
    losses = {"val_loss": 2.0, "val_bpb": 1.0, "val_loss_loops_1": 3.0, "val_bpb_loops_1": 1.5}
    console.evaluated(1, losses | {"val_loss_loops_12": 2.0, "val_bpb_loops_12": 1.0})
    assert out.getvalue().splitlines() == [
        "step  1/10  loops 3  loss 2.000",
        "step 1: validation loss 2.0000 nats/token, 1.0000 bits/byte; 3.0000 with 1, 2.0000 with "
        "12 loops",
    ]


def test_live_line_stays_below_notices_and_samples():
    out = io.StringIO()
    terminal = rich.console.Console(file=out, force_terminal=True, width=80, height=25)
    with Console(terminal) as console:
        console.start(100)
        console.update(1, ROW)
        console.notice("Resumed from step 1.")
        console.update(2, ROW | {"loss": 1.0})
        console.sample("def f(x): [red]", title="step 2")
        print("a stray print", file=sys.stderr)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.strip()]
    assert any(line.startswith("Resumed from step 1.") for line in lines)
    assert any("def f(x): [red]" in line for line in lines)
    assert lines[-1].startswith("step   2/100  loss 1.000")


def test_banner():
    out, console = plain()
    console.banner(
        "yocou_small",
        {
            "device": {"kind": "cpu x 8"},
            "model": {"parameters": 3141592, "FLOPs": 1.5e9, "tied": False},
        },
    )
    text = out.getvalue()
    for word in ("yocou_small", "device", "cpu x 8", "3,141,592", "1.5e+09", "False"):
        assert word in text


class Gone(io.StringIO):
    """A closed terminal, or a pipe that nobody reads any more."""

    encoding = "utf-8"

    def write(self, text):
        raise self.error

    def flush(self):
        raise self.error


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        BrokenPipeError(32, "Broken pipe"),
        OSError(5, "Input/output error"),
        ValueError("I/O operation on closed file."),
        UnicodeEncodeError("latin-1", "日", 0, 1, "ordinal not in range(256)"),
    ],
)
def test_an_error_of_the_terminal_never_ends_a_run(error, terminal, caplog, monkeypatch):
    monkeypatch.setattr(os, "dup2", lambda *_: None)  # rich would redirect the stdout of pytest
    out = Gone()
    out.error = error
    with Console(rich.console.Console(file=out, force_terminal=terminal)) as console:
        console.banner("title", {"a": {"b": 1}})
        console.start(10)
        console.update(1, ROW)
        console.notice("日本")
        console.sample("日本", "step 1")
    assert caplog.text.count("The run continues") == 1


def test_the_cursor_is_visible_while_a_line_is_live():
    """Rich hides it while a line is live. After SIGKILL, nothing would show it again."""
    out = io.StringIO()
    with Console(rich.console.Console(file=out, force_terminal=True, width=80)) as console:
        console.start(100)
        console.update(1, ROW)
        shown, hidden = (out.getvalue().rfind(f"\x1b[?25{end}") for end in "hl")
        assert shown > hidden >= 0


def test_a_loss_that_is_not_finite_logs_no_warning(tmp_path, caplog):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"loss": math.nan, "grad_norm": math.inf})
    writer.close()
    assert not caplog.records
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] is None


FACTS = {"2 loops": 3, "1 program": "window*2@3 | cross*2"}


@pytest.fixture(scope="module")
def tensorboard(tmp_path_factory):
    """The address of a real TensorBoard that has read the events of two runs."""
    folder = tmp_path_factory.mktemp("runs")
    for name, loss in (("a", 2.0), ("b", 3.0)):
        writer = MetricsWriter(folder / name, gflops_per_token=0.5)
        writer.events.hparams({"model.window": 64} | FACTS, [metrics.tag(metrics.VAL_LOSS)])
        row = {"loss": loss, "val_loss": loss, "tokens": 100, "tokens_per_s": 5.0}
        writer.write(10, row | {"inside/step_loop_1": 1.0})
        writer.close()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    flags = [f"--logdir={folder}", f"--port={address.rpartition(':')[2]}", "--load_fast=false"]
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", *flags], stderr=subprocess.DEVNULL
    )
    end, runs = time.monotonic() + 120, {}
    try:
        while set(runs) != {"a", "b"}:
            assert time.monotonic() < end, runs
            with contextlib.suppress(urllib.error.URLError):  # it does not listen yet
                runs = read(address, "scalars/tags")
            time.sleep(0.2)
        yield address
    finally:
        server.kill()
        server.wait()


def read(address, path, **data):
    body = json.dumps(data).encode() if data else None
    url = f"{address}/data/plugin/{path}"
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@pytest.mark.slow
def test_what_tensorboard_has_read(tensorboard):
    losses = {
        f"{group}/{name}" for group in ("x_tokens", "x_gflops") for name in ("loss", "val_loss")
    }
    assert set(read(tensorboard, "scalars/tags")["a"]) == losses | {
        "1 loss/loss",
        "2 validation/val_loss",
        "3 loop/inside/step_loop_1",
        "4 speed/tokens_per_s",
        "5 optimizer/tokens",
    }
    ((_, step, value),) = read(tensorboard, "scalars/scalars?run=b&tag=x_gflops/loss")
    assert (step, value) == (50, 3.0)
    pages = read(tensorboard, "custom_scalars/layout")["category"]
    assert [page["title"] for page in pages] == ["Loss by tokens", "Loss by GFLOPs"]
    board = read(tensorboard, "hparams/experiment", experimentName="", includeMetrics=True)
    assert [info["name"] for info in board["hparamInfos"]] == [*sorted(FACTS), "model.window"]
    assert [info["name"]["tag"] for info in board["metricInfos"]] == ["2 validation/val_loss"]


@pytest.mark.slow
@pytest.mark.skipif(browser.PROGRAM is None, reason="this machine has no Chromium")
def test_what_a_person_sees_in_tensorboard(tensorboard, tmp_path):
    """In a real browser: the order of the groups, and of the columns of the table."""
    groups = ["1 loss", "2 validation", "3 loop", "4 speed", "5 optimizer"]
    metric = metrics.tag(metrics.VAL_LOSS)
    with browser.Browser(tmp_path) as page:
        page.open(f"{tensorboard}/#timeseries")
        page.wait_for(".group-title", ["Pinned", *groups, "x_gflops", "x_tokens"])
        page.open(f"{tensorboard}/#scalars")
        page.wait_for(".category-name", [*groups, "x_gflops", "x_tokens"])
        page.open(f"{tensorboard}/#hparams")
        cells = ["Trial ID", "Show Metrics", *sorted(FACTS), "model.window", metric]
        page.wait_for("vaadin-grid-cell-content", cells)
