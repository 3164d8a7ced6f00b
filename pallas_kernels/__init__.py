"""Attention for Universal YOCO: four operations, one contract, several implementations."""

from pallas_kernels.attention import api
from pallas_kernels.attention.api import (
    IMPLEMENTATIONS,
    OPERATIONS,
    Choice,
    choose_implementation,
    cross_attention,
    decode_cross,
    decode_window,
    window_attention,
)
from pallas_kernels.attention.blocks import block_sizes
from pallas_kernels.attention.join import join
from pallas_kernels.attention.mask import MASKED, Mask, SegmentIds
from pallas_kernels.call import Call, UnsupportedCall
from pallas_kernels.device import interpret, target_device
from pallas_kernels.sharding import Partition

__all__ = [
    "IMPLEMENTATIONS",
    "MASKED",
    "OPERATIONS",
    "Call",
    "Choice",
    "Mask",
    "Partition",
    "SegmentIds",
    "UnsupportedCall",
    "api",
    "block_sizes",
    "choose_implementation",
    "cross_attention",
    "decode_cross",
    "decode_window",
    "interpret",
    "join",
    "target_device",
    "window_attention",
]
