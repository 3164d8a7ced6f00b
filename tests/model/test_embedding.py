"""The embedding of a split table is the embedding, and so is its gradient."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from tests import tiny
from yocou_jax.config import MeshConfig
from yocou_jax.model.embedding import embed
from yocou_jax.sharding import batch_sharding, make_mesh, spec_for

MESHES = [
    MeshConfig(data=2, fsdp=2, tensor=2),
    MeshConfig(fsdp=2, context=4),
    MeshConfig(fsdp=2, tensor=2, context=2),
    MeshConfig(fsdp=4, expert=2),
    MeshConfig(data=2, context=4),
]
# V, D, B and N: all divide; and each of them does not, on some of the meshes.
SIZES = [(32, 16, 8, 16), (31, 16, 8, 16), (32, 20, 8, 16), (32, 16, 3, 16), (32, 16, 8, 6)]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_split_table(mesh):
    mesh = make_mesh(mesh)
    for V, D, B, N in SIZES:
        rng = np.random.default_rng(V + D + B + N)
        table = rng.normal(size=(V, D)).astype(np.float32)
        direction = rng.normal(size=(B, N, D)).astype(np.float32)
        tokens = np.asarray(tiny.tokens(B, N, V))

        def both(table, tokens, direction):
            def value(table):
                return (embed(table, tokens, jnp.dtype("float32")) * direction).sum()

            return embed(table, tokens, jnp.dtype("float32")), jax.grad(value)(table)

        expected = jax.jit(both)(table, tokens, direction)
        with jax.set_mesh(mesh):
            split = NamedSharding(mesh, spec_for(("vocab", "embed"), table.shape, mesh))
            placed = jax.device_put(table, split)
            got = jax.jit(both)(placed, tokens, direction)
        tiny.assert_close(jax.device_get(got), jax.device_get(expected), 1e-6)


def test_the_table_never_moves():
    """Else XLA would copy the whole table, or the whole result ("involuntary full
    rematerialization"). V = 64 is no other size."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    split = NamedSharding(mesh, spec_for(("vocab", "embed"), (64, 32), mesh))
    table = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=split)
    tokens = jax.ShapeDtypeStruct((8, 16), jnp.int32, sharding=batch_sharding(mesh))

    def both(table, tokens):
        def value(table):
            return (embed(table, tokens, jnp.dtype("float32")) ** 2).sum()

        return embed(table, tokens, jnp.dtype("float32")), jax.grad(value)(table)

    with jax.set_mesh(mesh):
        text = jax.jit(both).lower(table, tokens).compile().as_text()
    # The results of collectives; XLA may join several to a tuple.
    moved = re.findall(r"= (.*?) (?:all-\w+|reduce-scatter|collective-permute)[\w-]*\(", text)
    sizes = [set(re.findall(r"\d+", " ".join(re.findall(r"\[([\d,]*)\]", s)))) for s in moved]
    assert len(sizes) >= 4
    assert not any("64" in found for found in sizes), moved
