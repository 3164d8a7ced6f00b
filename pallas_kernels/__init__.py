"""Attention for Universal YOCO: four operations, one contract, several implementations."""

from pallas_kernels.api import (
    IMPLEMENTATIONS,
    OPERATIONS,
    Choice,
    choose_implementation,
    cross_attention,
    decode_cross,
    decode_window,
    window_attention,
)
from pallas_kernels.mask import MASKED, SegmentIds

__all__ = [
    "IMPLEMENTATIONS",
    "MASKED",
    "OPERATIONS",
    "Choice",
    "SegmentIds",
    "choose_implementation",
    "cross_attention",
    "decode_cross",
    "decode_window",
    "window_attention",
]
