"""The command as a user types it. tests/test_end_to_end.py evaluates a run."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.trained import model
from yocou_jax.pretrained import export

ROOT = Path(__file__).parent.parent.parent


def run(*flags, code=0) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "experiments.evaluate", *map(str, flags)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == code, result.stderr
    return result


def test_the_tables_of_an_exported_folder(tmp_path):
    export(tmp_path / "a", model(step=3))
    (tmp_path / "text").write_text("a line of text\n" * 99)
    flags = ["--task=perplexity", f"--source={tmp_path}/text", "--lengths=8", "--samples=4"]
    result = run(f"--workdir={tmp_path}/a", *flags)
    files = [f"{tmp_path}/a/evaluation/perplexity.{kind}" for kind in ("json", "png")]
    assert result.stderr == "".join(f"Wrote {file}\n" for file in files)
    assert (tmp_path / "a/evaluation/perplexity.png").read_bytes()[1:4] == b"PNG"
    lines = result.stdout.splitlines()
    assert lines[:5] == [
        "program        window*2@3 | cross*2",
        "step           3",
        "trained loops  [3]",
        "dtype          float32",
        f"source         {tmp_path}/text",
    ]
    assert "bits per byte" in result.stdout
    assert "the last 2 tokens, if the model sees only `length` tokens" in lines


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--task=loops", "--loops=1,x"], "'--loops=1,x' must be whole numbers with commas"),
        (["--task=loops"], "The path nowhere does not exist."),
    ],
)
@pytest.mark.slow
def test_mistakes_give_sentences(flags, sentence):
    result = run("--workdir=nowhere", *flags, code=2)
    assert result.stderr.startswith(sentence)
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
