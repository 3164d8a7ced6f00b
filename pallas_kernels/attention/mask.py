"""The one definition of who sees whom: causality, the window and segments.

Positions are absolute: key s stands at position s, query n at position q_offset + n. A query sees
its own position and what lies before it; with a window it sees W keys, **its own included**
(i-W+1 .. i). Public code disagrees by one here, so every implementation takes the rule
from `visible`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

# Stands for minus infinity in scores and in the lse of a row that sees nothing. Finite, because
# (-inf) - (-inf) is NaN; half of it is the threshold below which a row counts as empty.
MASKED = -1e30


class SegmentIds(NamedTuple):
    """Which document each position belongs to; attention stays inside a document. Ids are compared
    for equality only, so padding is a segment of its own (0 by custom)."""

    q: Int[Array, "B N"]
    kv: Int[Array, "B S"]


def visible(q_pos, k_pos, window: int | None):
    """True where a query may see a key: 0 <= q_pos - k_pos < window (any broadcastable shapes).
    window=None is full causal attention."""
    age = q_pos - k_pos
    seen = age >= 0
    return seen if window is None else seen & (age < window)


def visible_int32(q_pos, k_pos, window: int | None):
    """The same for int32 positions, with one comparison: as a number without a sign, a negative age
    is larger than any window. Written as a shift by the lowest int32, which wraps around; for a
    kernel that waits for its vector unit (two operations less of five, a tenth of a masked tile).
    """
    if window is None:
        return q_pos >= k_pos
    lowest = jnp.iinfo(jnp.int32).min
    return q_pos - (k_pos + lowest) < window + lowest


def same_segment(q_ids: Int[Array, "B N"], kv_ids: Int[Array, "B S"]) -> jax.Array:
    """[B, N, S] booleans; blocks of ids give the block of the mask."""
    return q_ids[:, :, None] == kv_ids[:, None, :]


def visible_dense(N: int, S: int, window: int | None, q_offset: int) -> jax.Array:
    """[N, S] booleans, for the reference and for tests; no fast path may build it."""
    return visible(q_offset + jnp.arange(N)[:, None], jnp.arange(S)[None, :], window)
