"""The letters of all shapes, in every docstring, einsum and annotation.

Notation
    B  batch              N  query positions      S  key positions
    D  model width        Q  query heads          K  key/value heads    G  Q / K
    H  head width         F  feed-forward width   E  experts            V  vocabulary
    W  window: the number of visible keys, including that of the query (query i sees i-W+1 .. i)
    L  layers             P  parallel streams     PB P times B rows: those of stream 0 come first
    C  positions of a chunk of a prompt           n  new tokens of each row
    M  tokens of all rows together                k  experts that a token is sent to
    R  rows of a matrix product in a kernel: the queries or heads of a group that share their keys
A word is the size of an axis too: `[splits, R, H]`. In annotations, `#B` is B or 1, `*rows` and
`...` are any number of axes, and `""` is a scalar. The loop count is `num_loops`, never T.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Key

__all__ = ["AnyArray", "Array", "Bool", "Float", "Int", "Key", "PyTree", "WholeNumbers"]

AnyArray = Array | np.ndarray  # for functions that take arrays of the host and of devices
WholeNumbers = Sequence[int] | AnyArray
PyTree = Any
