import jax
import pytest

from experiments import process


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
