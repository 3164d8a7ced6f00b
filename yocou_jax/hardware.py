"""What devices can do at most, from the data sheets of their makers.

These figures decide only what is reported: the share of the peak that a run reaches (MFU), and the
estimates of `experiments.plan`. What a kernel must know about a device is in pallas_kernels
(device.py, and TPU_VMEM in attention/blocks.py).
"""

import re
from typing import NamedTuple


class Peaks(NamedTuple):
    """flops: dense bf16 FLOP/s without sparsity. memory: bytes. links: bytes/s that a device sends
    over all its links together, in one direction (TPU: ICI; GPU: NVLink, to the devices of one
    host). Makers often publish twice as much, the sum of both directions. bandwidth: bytes/s that
    the memory is read with. None: not known, or there are none."""

    flops: float | None
    memory: float | None = None
    links: float | None = None
    bandwidth: float | None = None


GB, GIB = 1e9, 2**30  # makers mean GiB by the "GB" of a memory
# (pattern of jax.Device.device_kind, its peaks); the first match counts. A tpu7x chip (2307e12
# FLOP/s, 192 GB, 7380 GB/s) has two halves, and jax shows each half as a device.
PEAKS = (
    (r"TPU v4 lite", Peaks(None)),
    (r"TPU v4", Peaks(275e12, 32 * GIB, 300 * GB, 1200 * GB)),
    (r"TPU v5 ?(lite|e)", Peaks(197e12, 16 * GIB, 200 * GB, 819 * GB)),
    (r"TPU v5", Peaks(459e12, 95 * GIB, 600 * GB, 2765 * GB)),  # v5p
    (r"TPU v6", Peaks(918e12, 32 * GIB, 400 * GB, 1640 * GB)),  # v6e, "v6 lite"
    (r"TPU ?v?7", Peaks(1153.5e12, 96 * GIB, 300 * GB, 3690 * GB)),
    (r"\bG?B200\b", Peaks(2250e12, 180 * GIB, 900 * GB, 8000 * GB)),
    (r"\bH[12]00 (NVL)\b", Peaks(835e12)),
    (r"\bH100 PCIe\b", Peaks(756e12, 80 * GIB)),
    (r"\bG?H200\b", Peaks(989e12, 141 * GIB, 450 * GB, 4800 * GB)),
    (r"\bG?H100\b", Peaks(989e12, 80 * GIB, 450 * GB, 3350 * GB)),
    (r"\bA100\b", Peaks(312e12, links=300 * GB)),  # 40 or 80 GB
    (r"\bL4\b", Peaks(121e12, 24 * GIB)),
)


def peaks(device_kind: str) -> Peaks:
    """Of a `jax.Device.device_kind`; all None if it is not known."""
    return next((found for kind, found in PEAKS if re.search(kind, device_kind)), Peaks(None))
