"""The command as a user types it: it is stopped in the middle of a run, and goes on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from yocou_jax.training.preemption import EXIT_PREEMPTED

ROOT = Path(__file__).parent.parent.parent
FILE = '''"""Why <a>?"""
from configs import base
from yocou_jax.study import Claim, Entry, Study


def get_config():
    c = base.get_config()
    c.compute.unroll = 0
    c.model.update(architecture="full*1", num_layers=1, vocab_size=258, d_model=8, d_ff=8)
    c.model.update(num_heads=1, num_kv_heads=1, head_dim=8, window=4)
    c.optimizer.update(name="adamw", warmup_steps=2)
    c.data.update(source="FOLDER/text", cache_dir="FOLDER/cache", tokenizer="bytes")
    c.data.update(batch_size=8, sequence_length=16, validation_sequences=8)
    c.run.update(steps=600, log_every=50, eval_every=300, sample_tokens=1)
    return c


STUDY = Study(
    "Does <b> beat a?",
    {"a": Entry(), "b": Entry({"optimizer.weight_decay": 0.2})},
    claims=(Claim("b", "a", "Table 3", expected=(0.0, 0.5)),),
)
'''


def start(folder: Path) -> subprocess.Popen:
    flags = [f"--config={folder}/study.py", "--seeds=1", "--learning_rates=0.01"]
    files = [f"--workdir={folder}/runs", f"--out={folder}/found.json"]
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.compare", *flags, *files],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"},  # and one device
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_two_entries_and_a_stop(tmp_path):
    (tmp_path / "study.py").write_text(FILE.replace("FOLDER", str(tmp_path)))
    (tmp_path / "text").write_text("a line of text\n" * 200)
    first = tmp_path / "runs/a/lr=0.01,seed=0"
    process = start(tmp_path)
    rows = first / "metrics.jsonl"
    while not (rows.exists() and rows.stat().st_size):  # from then on, a stop saves the state
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == EXIT_PREEMPTED, out
    clock = first.with_name("lr=0.01,seed=0.seconds")
    before = float(clock.read_text())
    assert not (first / "summary.json").exists()

    # The other run has ended already, so it is not made: this saves the time of a process.
    second = tmp_path / "runs/b/lr=0.01,seed=0"
    second.mkdir(parents=True)
    manifest = json.loads((first / "manifest.json").read_text())
    manifest["config"]["optimizer"]["weight_decay"] = 0.2
    (second / "manifest.json").write_text(json.dumps(manifest))
    (second / "metrics.jsonl").write_text('{"step": 600, "tokens": 76800, "val_bpb": 9.0}\n')
    (second / "summary.json").write_text('{"val_bpb": 9.0, "wall_s": 60.0, "train_flops": 1.0}')
    process = start(tmp_path)
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    assert "Resumed from the checkpoint" in first.with_name("lr=0.01,seed=0.log").read_text()
    found = json.loads((tmp_path / "found.json").read_text())
    (run,) = found["entries"]["a"]["runs"]
    summary = json.loads((first / "summary.json").read_text())
    after = float(clock.read_text())
    assert run["minutes"] * 60 == pytest.approx(after, rel=1e-12)  # 60 x / 60 is not always x
    assert after > before + summary["wall_s"]
    assert found["entries"]["a"]["values"] == {"0": summary["val_bpb"]}
    assert [tokens for tokens, _ in run["curve"]] == [300 * 128, 600 * 128]
    assert "fewer than 3 seeds" in found["claims"][0]["doubts"]
    assert f"--workdir={tmp_path}/runs/b/lr=0.01,seed=0" in found["commands"]["b"]

    page = (tmp_path / "runs/report.html").read_text()
    assert "Does &lt;b&gt; beat a?" in page
    assert "Why &lt;a&gt;?" in page
    assert page.count('src="data:image/png;base64,') == page.count("src=") == 1
    words = re.sub('src="data:[^"]*"', "", page)  # a picture may contain any letters
    for absent in ("<script", "http", "<b>beat"):
        assert absent not in words
    assert "<td>9.0000 (n = 1)</td>" in page
    (picture, *_) = EventAccumulator(str(tmp_path / "runs")).Reload().Images("study/figure")
    assert picture.encoded_image_string == (tmp_path / "found.png").read_bytes()
