"""The command as a user types it: what it prints, and the sentence for each mistake."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.trained import assert_same, model, workdir
from yocou_jax.checkpoint import params_sha256
from yocou_jax.pretrained import load

ROOT = Path(__file__).parent.parent.parent


def run(*flags) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "experiments.export", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_an_export_of_a_workdir_and_of_an_exported_folder(tmp_path):
    one = model(step=3)
    source = workdir(tmp_path / "run", one, 3)
    for name in ("first", "second"):
        result = run(f"--workdir={source}", f"--folder={tmp_path / name}")
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
        source = tmp_path / name
        assert_same(one, load(source))
        rows = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
        assert list(rows) == [
            *(str(source / f) for f in ("config.json", "model.safetensors", "tokenizer.json")),
            *("program", "step", "parameters", "params_sha256"),
        ]
        size = (source / "model.safetensors").stat().st_size
        assert rows[str(source / "model.safetensors")] == f"{size:,} bytes"
        assert rows["parameters"] == f"{sum(x.size for x in leaves(one.params)):,}"
        assert (rows["program"], rows["step"]) == ("window*2@3 | cross*2", "3")
        assert rows["params_sha256"] == params_sha256(one.params)


@pytest.mark.slow
def test_a_step_and_a_path_with_a_tilde(tmp_path, monkeypatch):
    source = workdir(tmp_path / "run", model(), 1, 2)
    monkeypatch.setenv("HOME", str(tmp_path))
    result = run("--workdir=~/run", "--folder=~/out", "--step=1")
    assert result.returncode == 0, result.stderr
    assert load(tmp_path / "out").step == 1
    result = run(f"--workdir={source}", "--folder=~/new", "--step=7")
    assert result.returncode == 2
    assert result.stderr.endswith("; the steps there: 1, 2.\n")
    assert not (tmp_path / "new").exists()


def leaves(tree):
    return [x for v in tree.values() for x in (leaves(v) if isinstance(v, dict) else [v])]


def test_mistakes_give_sentences(tmp_path):
    for flags, sentence in (
        ([], "The flag --workdir is missing."),
        ([f"--workdir={tmp_path}/no", "--folder=x"], f"The path {tmp_path}/no does not exist."),
    ):
        result = run(*flags)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr == f"{sentence}\n"
