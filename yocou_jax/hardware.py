"""Speed and memory of devices: one row per kind, from the data sheets of the makers.

These numbers decide what is reported (MFU: the share of the peak FLOP/s that a run reaches) and for
what experiments.compile_kernels compiles. They decide nothing about a computation: which kernel may
run is decided by pallas_kernels/device.py, which has a table of NVIDIA GPUs of its own, because
that package does not import this one. A test compares the two.
"""

import re
from typing import NamedTuple

MIB = 2**20


class Hardware(NamedTuple):
    """One jax device of a kind. A value that this code does not need is None.

    peak_flops: dense bf16 FLOP/s, without sparsity. memory_bytes, memory_bytes_per_s: size and
    speed of the HBM. vmem_bytes: size of a TPU's vector memory. compute_capability: of an NVIDIA
    GPU; 90 means 9.0.
    """

    peak_flops: float | None = None
    memory_bytes: int | None = None
    memory_bytes_per_s: int | None = None
    vmem_bytes: int | None = None
    compute_capability: int | None = None


H200 = Hardware(
    peak_flops=989e12,
    memory_bytes=151_397_597_184,
    memory_bytes_per_s=4_800_000_000_000,
    compute_capability=90,
)
# (pattern of jax.Device.device_kind, row); the first match counts. A tpu7x chip (2307e12) has two
# halves, and jax shows each half as a device.
KINDS = (
    (r"TPU v4 lite", Hardware()),
    (r"TPU v4", Hardware(275e12)),
    (r"TPU v5 ?(lite|e)", Hardware(197e12, vmem_bytes=128 * MIB)),
    (r"TPU v5", Hardware(459e12, vmem_bytes=128 * MIB)),  # v5p
    (r"TPU v6", Hardware(918e12, vmem_bytes=128 * MIB)),  # v6e, "v6 lite"
    (r"TPU ?v?7", Hardware(1153.5e12, vmem_bytes=64 * MIB)),
    (r"\bG?B200\b", Hardware(2250e12, compute_capability=100)),
    (r"\bH[12]00 (NVL)\b", Hardware(835e12, compute_capability=90)),
    (r"\bH100 PCIe\b", Hardware(756e12, compute_capability=90)),
    (r"\bH200\b", H200),
    (r"\bG?H[12]00\b", Hardware(989e12, compute_capability=90)),
    (r"\bA100\b", Hardware(312e12, compute_capability=80)),
    (r"\bL4\b", Hardware(121e12, compute_capability=89)),
)


def of(device_kind: str) -> Hardware:
    """The row of a `jax.Device.device_kind`. For an unknown kind, all values are None."""
    return next((row for pattern, row in KINDS if re.search(pattern, device_kind)), Hardware())
