"""The embedding of a split table is the embedding, and so is its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from tests import tiny
from yocou_jax.config import MeshConfig
from yocou_jax.model.embedding import embed
from yocou_jax.sharding import make_mesh, spec_for

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
