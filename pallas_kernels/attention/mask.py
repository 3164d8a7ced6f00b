"""The one definition of who sees whom: causality, the window and segments.

Positions are absolute: key s has position s, query n has position q_offset + n. A query sees
its own position and all before it; with a window it sees W keys, **its own included**
(i-W+1 .. i). Some other projects do not count the own key in W. So that there is one rule here,
every implementation takes it from `visible`.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

# Replaces minus infinity: as a masked score, and as the lse of a row that sees nothing. It is
# finite, because (-inf) - (-inf) is NaN. A row with an lse below half of it counts as empty.
MASKED = -1e30


class SegmentIds(NamedTuple):
    """Which document each position belongs to; attention stays inside a document. Ids are compared
    for equality only, so padding is a document with an id of its own, usually 0."""

    q: Int[Array, "B N"]
    kv: Int[Array, "B S"]


def visible(q_pos, k_pos, window: int | None):
    """True where a query may see a key: 0 <= q_pos - k_pos < window (any broadcastable shapes).
    window=None is full causal attention."""
    age = q_pos - k_pos
    seen = age >= 0
    return seen if window is None else seen & (age < window)


def visible_int32(q_pos, k_pos, window: int | None):
    """`visible` for int32 positions, with one comparison instead of two.

    Read as a number without a sign, a negative age is larger than any window. To compare so, the
    code shifts both sides by the lowest int32, which wraps around. Kernels that are limited by the
    vector unit use it: it needs three operations instead of five, which saves a tenth of the time
    of a masked tile.
    """
    if window is None:
        return q_pos >= k_pos
    lowest = jnp.iinfo(jnp.int32).min
    return q_pos - (k_pos + lowest) < window + lowest


def same_segment(q_ids: Int[Array, "B N"], kv_ids: Int[Array, "B S"]) -> jax.Array:
    """[B, N, S] booleans: True where a query and a key have the same id. The ids may be those of a
    block of queries and a block of keys."""
    return q_ids[:, :, None] == kv_ids[:, None, :]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("lengths", "segments"),
    meta_fields=("window", "q_offset"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class Mask:
    """Who sees whom in one call. The static fields decide which blocks a kernel visits; the arrays
    are operands of the kernel.

    Args:
      window: how many keys a query sees, its own included. None: all keys up to its own.
      q_offset: position of the first query; the first key has position 0.
      lengths: how many keys each row has. None: every row has all S keys.
      segments: the documents that must not see each other. None: there is one document.
    """

    window: int | None = None
    q_offset: int = 0
    lengths: Int[Array, " B"] | None = None
    segments: SegmentIds | None = None

    def as_array(self, N: int, S: int) -> Bool[Array, "rows N S"]:
        """The whole mask: B rows if there are lengths or segments, else one row for all. It has
        N x S elements, so only the reference and tests build it."""
        q_pos, k_pos = self.q_offset + jnp.arange(N)[:, None], jnp.arange(S)[None, :]
        seen = visible(q_pos, k_pos, self.window)[None]
        if self.segments is not None:
            seen = seen & same_segment(*self.segments)
        if self.lengths is not None:
            seen = seen & (jnp.arange(S)[None] < self.lengths[:, None])[:, None, :]
        return seen

    def pairs(self, N: int, S: int) -> int:
        """How many pairs of a query and a key that it sees are in one batch row and head. Only
        causality and the window count, because the values of the arrays are not known before the
        kernel runs."""
        last = self.q_offset + np.arange(N)
        first = 0 if self.window is None else np.maximum(last - self.window + 1, 0)
        return int(np.maximum(np.minimum(last + 1, S) - first, 0).sum())
