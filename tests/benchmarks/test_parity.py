"""Two training runs are judged by how far a third differs from the first."""

import jax
import numpy as np
import pytest

from benchmarks import parity, training
from configs import base
from tests import tiny
from yocou_jax.config import Config
from yocou_jax.training import metrics
from yocou_jax.training.step import set_up


def test_parity_judges_by_its_control():
    run = np.linspace(5.0, 3.0, 20)
    control = parity.compare(run + 1e-4, run)
    assert parity.tolerance(control) == 5 * control["largest"]
    assert parity.within(parity.compare(run - 4e-4, run), control)
    assert not parity.within(parity.compare(run - 6e-4, run), control)
    assert not parity.within(parity.compare(run * np.nan, run), control)
    same = parity.compare(run, run)
    assert parity.tolerance(same) == parity.FLOOR


@pytest.fixture
def meshes(monkeypatch):
    """The meshes that are set in each call of init and step, which compute nothing here."""
    seen = []

    def without_computation(config):
        def init():
            seen.append(jax.sharding.get_abstract_mesh())
            return 0

        def step(state, batch):
            seen.append(jax.sharding.get_abstract_mesh())
            return state + 1, {metrics.LOSS: np.float32(state)}

        return set_up(config)._replace(init=init, step=step)

    monkeypatch.setattr(parity, "set_up", without_computation)
    monkeypatch.setattr(training, "set_up", without_computation)
    return seen


def test_measured_steps_run_under_the_mesh_of_their_config(meshes, tmp_path):
    """As in a training run: without it, a model on several devices is split in another way."""
    source = tmp_path / "text.txt"
    source.write_text("one two three " * 500)
    fields = base.get_config()
    fields.model.update(tiny.MODEL, vocab_size=258)
    fields.data.update(source=str(source), cache_dir=str(tmp_path / "tokens"), tokenizer="bytes")
    fields.data.update(batch_size=8, sequence_length=16, validation_fraction=0.2)
    mesh = set_up(Config.from_dict(fields)).mesh.abstract_mesh
    losses = parity.losses(fields, "xla", steps=3, say=print)
    assert losses.tolist() == [0, 1, 2]
    assert meshes == [mesh] * 4
    meshes.clear()
    trainer = training.Trainer(Config.from_dict(fields), steps=2)
    assert trainer.device_only() == 2
    assert trainer.as_in_training() == 4
    trainer.batches.close()
    assert meshes == [mesh] * 5
