"""Tries a few hundred mistyped command lines. `python -m tests.fuzz_overrides` tries thousands."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import fuzz_overrides
from yocou_jax.config import FIELDS

ROOT = Path(__file__).parent.parent


# Each command has its own process, because both define --config, and absl allows a flag only once.
@pytest.mark.parametrize(("command", "count"), [("train", 400), ("account", 100)])
def test_mistyped_lines_are_answered_with_a_sentence(command, count):
    line = [sys.executable, "-m", "tests.fuzz_overrides", f"--command={command}"]
    done = subprocess.run(
        [*line, "--seed=7", f"--count={count}"],
        cwd=ROOT, capture_output=True, text=True, encoding="utf-8", timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{count} command lines of {command}, seed 7:" in done.stdout
    assert done.stdout.endswith(" 0 fail.\n")
    accepted = int(done.stdout.split(" give ")[0].rsplit(" ", 1)[1])
    assert count // 10 < accepted < count // 2


def test_typed_values_are_read_and_compared():
    words = [
        "--config=x.py",
        "--config.run.steps",
        "7",
        "-config.data.packing",
        "--config.run.seed=1",
    ]
    words += ["--noconfig.compute.scan", "--config.run.seed=2", "--", "--config.run.steps=3"]
    assert fuzz_overrides.typed(words) == {
        "run.steps": "7",
        "data.packing": "true",
        "run.seed": "2",
        "compute.scan": "false",
    }
    for text, value in (("1e-3", 0.001), ("007", 7), ("1_000", 1000), ("None", None), ("0", False)):
        assert fuzz_overrides.means(text, value)
    for text, value in (("2", 0.001), ("8", 7), ("x", 7), ("0", None), ("1", False), ("a", "b")):
        assert not fuzz_overrides.means(text, value)


def test_every_kind_of_field_has_values_to_try():
    assert {kinds[0].__name__ for kinds in FIELDS.values()} == {
        "bool",
        "str",
        *fuzz_overrides.SHORT,
    }
    assert set(fuzz_overrides.TEXTS) <= set(FIELDS)
