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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="options of glibc")
def test_a_train_step_gets_no_new_memory():
    """The options must be set before jax has started its threads. `never` shows what they save."""
    code = """
import resource, sys
import jax, jax.numpy as jnp
from experiments import process
if sys.argv[1] == "set":
    process.keep_freed_memory()
def loss(x):
    return jax.lax.scan(lambda c, _: (jnp.tanh(1.01 * c), None), x, None, length=8)[0].sum()
step, x = jax.jit(jax.grad(loss)), jnp.ones((2048, 1024))
def faults(calls):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        step(x).block_until_ready()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / calls
faults(4)
print(faults(2))
"""

    def run(how: str) -> float:
        line = [sys.executable, "-c", code, how]
        return float(subprocess.run(line, cwd=ROOT, check=True, capture_output=True).stdout)

    assert run("set") < 0.5 * run("never")
