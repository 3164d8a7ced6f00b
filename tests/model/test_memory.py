"""What the memory stores. tests/inference compares decode with the forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from yocou_jax.model import memory
from yocou_jax.model.memory import Cache, KeyValue, NewPositions, Ring


@pytest.mark.parametrize("kind", [Cache, Ring])
def test_a_position_is_written_row_by_row_as_by_a_scatter(kind, monkeypatch):
    """Rows: the first slot, the last one, beyond a cache, and one without a new position."""
    shape = (4, 5, 2, 3)
    old, new = jnp.zeros(shape), jnp.arange(1.0, 25).reshape(4, 1, 2, 3)
    at = NewPositions(jnp.array([0, 4, 7, 1]), jnp.array([1, 1, 1, 0]))
    got = {}
    for row_by_row in (False, True):
        monkeypatch.setattr(memory, "_scatter_copies", lambda x, answer=row_by_row: answer)
        got[row_by_row] = kind(old, old).commit(KeyValue(new, -new), at)
    np.testing.assert_array_equal(got[True].k, got[False].k)
    np.testing.assert_array_equal(got[True].v, got[False].v)
    assert (np.asarray(got[True].k) != 0).sum() == 6 * (2 if kind is Cache else 3)


@pytest.mark.parametrize("fits", [False, True])
@pytest.mark.parametrize("start", [-5, -4, -3, -1, 0, 2, 4, 5, 9])
def test_slots_outside_of_a_part_of_a_cache_are_dropped(start, fits):
    """Before it too: they do not wrap around. Rows may begin elsewhere if it is not known that all
    positions fit."""
    old, new = jnp.zeros((2, 5, 2, 3)), jnp.arange(1.0, 49).reshape(2, 4, 2, 3)
    starts = np.array([start, start] if fits else [start, start + 1])
    at = NewPositions(start if fits else jnp.array(starts), jnp.array([4, 4]), fits)
    at = at.replace(start=jnp.asarray(at.start))
    got = Cache(old, old)._commit(KeyValue(new, -new), at)
    want = np.zeros(old.shape)
    for row in range(2):
        for i in range(4):
            if 0 <= starts[row] + i < 5:
                want[row, starts[row] + i] = new[row, i]
    np.testing.assert_array_equal(got.k, want)
    np.testing.assert_array_equal(got.v, -want)


def test_only_a_tpu_writes_narrow_heads_row_by_row():
    def found(kind, platform, H, devices=1):
        x = jnp.zeros((2, 8, 2, H))
        device = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
        mesh = AbstractMesh((devices,), ("data",), abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            return memory._scatter_copies(x)

    assert found("TPU v6 lite", "tpu", 64)
    assert not found("TPU v6 lite", "tpu", 128)
    assert not found("TPU v6 lite", "tpu", 64, devices=2)
    assert not found("NVIDIA H200", "cuda", 64)
