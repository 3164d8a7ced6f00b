import subprocess
import sys
from pathlib import Path

import jax
import pytest

from experiments import process

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def compilation_cache(monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    yield lambda folder: jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_compilation_cache_dir", before)


def test_compiled_programs_are_kept_below_the_cache(tmp_path, compilation_cache, monkeypatch):
    compilation_cache(None)
    process.keep_compiled_programs(str(tmp_path))
    here = jax.config.jax_compilation_cache_dir
    assert here.startswith(f"{tmp_path}/compiled-")
    compilation_cache(None)
    monkeypatch.setattr(process.platform, "machine", lambda: "another processor")
    process.keep_compiled_programs(str(tmp_path))
    assert jax.config.jax_compilation_cache_dir != here


def test_a_folder_that_the_user_named_is_used(tmp_path, compilation_cache):
    compilation_cache("mine")
    process.keep_compiled_programs(str(tmp_path))
    assert jax.config.jax_compilation_cache_dir == "mine"


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["train", "--config=configs/yocou_small.py"],
        ["benchmark_training"],
        ["benchmark_kernels"],
        ["profile_inference"],
    ],
    ids=lambda words: words[0],
)
def test_a_command_keeps_freed_memory_before_jax_starts(words):
    """Later, the threads of jax have arenas of their own, and the options do not reach these."""
    code = """
import runpy, sys
from jax._src import xla_bridge
from experiments import process
def called():
    sys.exit(9 if xla_bridge.backends_are_initialized() else 7)
process.keep_freed_memory = called
sys.argv = [f"experiments.{sys.argv[1]}", *sys.argv[2:]]
runpy.run_module(sys.argv[0], run_name="__main__")
"""
    line = [sys.executable, "-c", code, *words]
    assert subprocess.run(line, cwd=ROOT, capture_output=True, timeout=300).returncode == 7
