"""The facts of a call, without its arrays. By them an implementation says whether it can run it."""

from typing import NamedTuple

import numpy as np

from pallas_kernels.device import Device


class UnsupportedCall(ValueError):
    """The implementation that the caller named does not exist or cannot run the call. The message
    is the reason, as a full sentence."""


def decodes(operation: str) -> bool:
    """Whether each row has a single query: q is [B, Q, H]."""
    return operation.startswith("decode")


class Call(NamedTuple):
    """The facts that an implementation needs to say whether it can run a call. Before a run starts,
    there are no arrays yet: then the shapes and the dtype are None. An implementation that can
    refuse the call without knowing them must refuse it then too."""

    operation: str
    device: Device
    q_shape: tuple[int, ...] | None = None
    k_shape: tuple[int, ...] | None = None
    dtype: np.dtype | None = None
    window: int | None = None
    segments: bool = False
    lengths: bool = False
    q_offset: int = 0
    return_lse: bool = False

    @property
    def decodes(self) -> bool:
        return decodes(self.operation)

    @property
    def dtype_name(self) -> str | None:
        return None if self.dtype is None else np.dtype(self.dtype).name

    @property
    def head_width(self) -> int | None:
        return None if self.q_shape is None else self.q_shape[-1]

    @property
    def group(self) -> int | None:
        """Query heads per key/value head."""
        if self.q_shape is None or self.k_shape is None:
            return None
        return self.q_shape[-2] // self.k_shape[-2]
