import platform
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


def in_a_process(code: str) -> list[str]:
    line = [sys.executable, "-c", code]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_gaps_are_taken_until_they_are_opened():
    code = """
import ctypes
from experiments import process
process.keep_freed_memory()
libc = ctypes.CDLL(None)
gaps, sizes = process.Gaps(libc), range(5000, 200_000, 1000)
blocks = [gaps._malloc(size) for size in sizes]
freed = blocks[1::2]
for block in freed:
    gaps._free(block)
def reused():
    again = [gaps._malloc(size) for size in sizes]
    for block in again:
        gaps._free(block)
    return any(low <= block < high for block in again for low, high in zip(freed, blocks[2::2]))
gaps.fill()
print(reused())
gaps.open()
print(reused())
gaps._sbrk = lambda _: 0  # as if another allocator had given the blocks
gaps.fill()
print(len(gaps._filled))
"""
    assert in_a_process(code) == ["False", "True", "0"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_gaps_are_filled_after_a_long_compilation_and_open_during_the_next_one():
    """By what jax reports: so this notices if it reports something else."""
    code = """
import jax
from experiments import process
seen = []
class Gaps(process.Gaps):
    LONG_S = 0.0
    def fill(self):
        super().fill()
        seen.append(f"filled:{len(self._filled) > 0}")
    def open(self):
        super().open()
        seen.append("open")
process.Gaps = Gaps
process.keep_freed_memory()
jax.jit(lambda x: x + 1)(1.0)
seen.clear()
jax.jit(lambda x: x * 2 + 1)(1.0)
print(*seen)
"""
    assert in_a_process(code) == ["open", "open", "filled:True"]
