"""The table of devices is right, and the kernels have the same facts."""

import pytest

from pallas_kernels.attention.blocks import TPU_VMEM
from pallas_kernels.device import Device
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
    assert hardware.of(kind).peak_flops == (None if tera is None else tera * 1e12)


@pytest.mark.parametrize("kind", TPU_VMEM)
def test_no_kernel_takes_more_vmem_than_there_is(kind):
    assert TPU_VMEM[kind] < hardware.of(kind).vmem_bytes


@pytest.mark.parametrize("name", ["A100-SXM4-80GB", "H100 PCIe", "H200", "GH200", "B200", "L4"])
def test_gpus_have_the_compute_capability_that_the_kernels_check(name):
    kind = f"NVIDIA {name}"
    assert hardware.of(kind).compute_capability == Device("gpu", kind).compute_capability
