"""Peak speeds of devices, from the data sheets of the makers.

They decide only what is reported: MFU is the share of the peak that a run reaches. What a kernel
must know about a device is in pallas_kernels (device.py, and TPU_VMEM in attention/blocks.py).
"""

import re

# (pattern of jax.Device.device_kind, dense bf16 FLOP/s without sparsity); the first match counts.
# None: not known. A tpu7x chip (2307e12) has two halves, and jax shows each half as a device.
PEAK_FLOPS = (
    (r"TPU v4 lite", None),
    (r"TPU v4", 275e12),
    (r"TPU v5 ?(lite|e)", 197e12),
    (r"TPU v5", 459e12),  # v5p
    (r"TPU v6", 918e12),  # v6e, "v6 lite"
    (r"TPU ?v?7", 1153.5e12),
    (r"\bG?B200\b", 2250e12),
    (r"\bH[12]00 (NVL)\b", 835e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bG?H[12]00\b", 989e12),
    (r"\bA100\b", 312e12),
    (r"\bL4\b", 121e12),
)


def peak_flops(device_kind: str) -> float | None:
    """The peak of a `jax.Device.device_kind`; None if it is not known."""
    return next((peak for kind, peak in PEAK_FLOPS if re.search(kind, device_kind)), None)
