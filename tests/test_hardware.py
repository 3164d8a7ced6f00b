"""The peaks of the devices, by their names in jax."""

import pytest

from yocou_jax import hardware


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("TPU v4", 275), ("TPU v5 lite", 197), ("TPU v5e", 197), ("TPU v5p", 459), ("TPU v5", 459),
        ("TPU v6 lite", 918), ("TPU v6e", 918), ("TPU7x", 1153.5), ("TPU v7x", 1153.5),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H200", 989),
        ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA B200", 2250),
        ("NVIDIA L4", 121), ("NVIDIA L40S", None), ("cpu", None), ("TPU v2", None),
    ],
)  # fmt: skip
def test_peak_flops(kind, tera):
    assert hardware.peaks(kind).flops == (None if tera is None else tera * 1e12)
