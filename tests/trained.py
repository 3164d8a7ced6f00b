"""A tiny model as training leaves it, and a workdir that has it."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

from tests import tiny
from yocou_jax.checkpoint import Checkpointer, params_sha256
from yocou_jax.data.tokenizer import Tokenizer
from yocou_jax.manifest import describe, write
from yocou_jax.pretrained import Pretrained
from yocou_jax.training.step import TrainState

BYTES = Tokenizer.from_json("bytes")


def small(architecture="yoco_u", **fields):
    return tiny.config(architecture, **({"vocab_size": BYTES.vocab_size} | fields))


def model(architecture="yoco_u", step=7, seed=0, **fields) -> Pretrained:
    config = small(architecture, **fields)
    return Pretrained(tiny.params(config.model, seed), config.model, config.compute, BYTES, step)


def workdir(path: Path, one: Pretrained, *steps: int) -> Path:
    """Writes the files of a training run that a reader needs."""
    config = dataclasses.replace(small(), model=one.config, compute=one.compute)
    program = str(one.config.program)
    tokenizer = one.tokenizer.fingerprint
    write(path, describe(config.to_dict(), tokenizer=tokenizer, program=program))
    (path / "tokenizer.json").write_text(one.tokenizer.to_json())
    with Checkpointer(path / "checkpoints") as checkpointer:
        for step in steps:
            params = jax.tree.map(jnp.asarray, one.params)
            moments = jax.tree.map(lambda x: 2 * x, params)  # they must differ from the parameters
            assert checkpointer.save(step, TrainState(jnp.int32(step), params, moments))
    return path


def assert_same(a: Pretrained, b: Pretrained):
    assert params_sha256(a.params) == params_sha256(b.params)
    assert jax.tree.structure(a.params) == jax.tree.structure(b.params)
    assert (a.config, a.step) == (b.config, b.step)
    assert a.tokenizer.fingerprint == b.tokenizer.fingerprint
