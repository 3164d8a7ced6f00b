"""The embedding of tokens, also of a table that a mesh splits.

XLA would make a copy of the whole result on every device ("involuntary full rematerialization") if
the table is split over its width and its entries at the same time. Here every device reads its part
of the width, for all tokens of the devices that have the other parts. Then these devices exchange
the parts for their own tokens (all-to-all). So the table itself never moves, and its gradient is
summed only over the devices that have the same part.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from yocou_jax.sharding import LOGICAL_AXES, axes_of_one_device, length_ways, split_over
from yocou_jax.typing import AnyArray, Array, Float, Int


def embed(
    table: Float[AnyArray, "V D"], tokens: Int[Array, "B N"], dtype: jnp.dtype
) -> Float[Array, "B N D"]:
    """sqrt(D) E[tokens] in `dtype`: unit variance, as in YOCO's code. At D^-0.5 it would be small
    next to what the first layers add."""
    scale = table.shape[1] ** 0.5
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return (scale * jnp.take(table, tokens, axis=0)).astype(dtype)
    sizes = {"vocab": table.shape[0], "embed": table.shape[1], "batch": tokens.shape[0]}
    vocab, width, rows = (
        tuple(axis for axis in split_over(name, size, mesh) if mesh.shape[axis] > 1)
        for name, size in sizes.items()
    )
    columns = LOGICAL_AXES["length"] if length_ways(tokens.shape[1]) > 1 else ()

    def local(table, tokens):
        joined = tuple(axis for axis in width if axis in rows)
        if joined:
            # In the order in which the loop below splits the rows again.
            tokens = jax.lax.all_gather(tokens, joined[::-1], axis=0, tiled=True)
        if vocab:
            first = jax.lax.axis_index(vocab) * len(table)
            mine = (tokens >= first) & (tokens < first + len(table))
            x = jnp.take(table, jnp.where(mine, tokens - first, 0), axis=0)
            x = jnp.where(mine[..., None], x, 0)
        else:
            x = jnp.take(table, tokens, axis=0)
        x = (scale * x).astype(dtype)
        # The last axis varies fastest over the parts of the width, so it is joined first.
        for axis in reversed(width):
            if axis in joined:
                x = jax.lax.all_to_all(x, axis, 0, 2, tiled=True)
            elif axis in columns:
                x = jax.lax.all_to_all(x, axis, 1, 2, tiled=True)
            else:
                x = jax.lax.all_gather(x, axis, axis=2, tiled=True)
        for axis in columns:
            if axis not in width:
                size = x.shape[1] // mesh.shape[axis]
                first = jax.lax.axis_index(axis) * size
                x = jax.lax.dynamic_slice_in_dim(x, first, size, axis=1)
        return jax.lax.psum(x, vocab) if vocab else x

    alone = axes_of_one_device()
    specs = P(vocab or None, width + alone or None), P(rows + alone or None)
    out = P(rows + alone or None, columns or None)
    run = jax.shard_map(local, in_specs=specs, out_specs=out, check_vma=False)
    return run(table, tokens)
