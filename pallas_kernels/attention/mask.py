"""The one definition of who sees whom: causality, the window and segments.

Positions are absolute: key s stands at position s, query n at position q_offset + n. A query sees
its own position and all before it; with a window it sees W keys, **its own included**
(i-W+1 .. i). Public code disagrees by one on what W counts, so every implementation takes the rule
from `visible`.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

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
    is larger than any window. It is written as a shift by the lowest int32, which wraps around. It
    is for kernels whose vector unit is the bottleneck: it saves two operations of five, a tenth of
    the time of a masked tile.
    """
    if window is None:
        return q_pos >= k_pos
    lowest = jnp.iinfo(jnp.int32).min
    return q_pos - (k_pos + lowest) < window + lowest


def same_segment(q_ids: Int[Array, "B N"], kv_ids: Int[Array, "B S"]) -> jax.Array:
    """[B, N, S] booleans; blocks of ids give the block of the mask."""
    return q_ids[:, :, None] == kv_ids[:, None, :]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("lengths", "segments"),
    meta_fields=("window", "q_offset"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class Mask:
    """Who sees whom in one call: what is static decides which blocks a kernel visits, the arrays
    are its operands.

    Args:
      window: how many keys a query sees, its own included; None: its own and all before.
      q_offset: position of the first query on the axis on which the first key stands at 0.
      lengths: how many keys each row has; None: all of the array's.
      segments: the documents that must not see each other.
    """

    window: int | None = None
    q_offset: int = 0
    lengths: Int[Array, " B"] | None = None
    segments: SegmentIds | None = None

    def as_array(self, N: int, S: int) -> Bool[Array, "rows N S"]:
        """The dense mask, with B rows or with one row for all. It is for the reference and for
        tests: no fast path may build it."""
        q_pos, k_pos = self.q_offset + jnp.arange(N)[:, None], jnp.arange(S)[None, :]
        seen = visible(q_pos, k_pos, self.window)[None]
        if self.segments is not None:
            seen = seen & same_segment(*self.segments)
        if self.lengths is not None:
            seen = seen & (jnp.arange(S)[None] < self.lengths[:, None])[:, None, :]
        return seen

    def pairs(self, N: int, S: int) -> int:
        """How many pairs of a query and a visible key one row and head has, by causality and the
        window alone: what the arrays hide is not known before the kernel runs."""
        last = self.q_offset + np.arange(N)
        first = 0 if self.window is None else np.maximum(last - self.window + 1, 0)
        return int(np.maximum(np.minimum(last + 1, S) - first, 0).sum())
