"""Which device a computation is traced for, and the compute capability of a GPU.

If a mesh is in use, its devices count, else the host's own. The mesh may be abstract: it describes
devices that need not exist here. So a CPU host that compiles for a TPU picks the TPU's kernels.
"""

import contextlib
import contextvars
from typing import NamedTuple

import jax

# Compute capability by a part of the device's name, for GPUs that are compiled for but are not in
# this machine. The first match counts. It decides which kernels may run, and how they are compiled.
_GPU_KINDS = {
    "GH200": 90, "H100": 90, "H200": 90, "H800": 90, "H20": 90,
    "GB200": 100, "B200": 100, "B100": 100, "GB300": 103, "B300": 103,
    "Quadro RTX": 75, "T4": 75, "V100": 70,
    "RTX A": 86, "RTX 30": 86, "A100": 80, "A800": 80, "A30": 80,
    "Ada": 89, "L40": 89, "L4": 89, "L20": 89, "RTX 40": 89,
    "A10": 86, "A16": 86, "A40": 86, "NVIDIA A2": 86,
    "RTX 50": 120, "RTX PRO": 120,
}  # fmt: skip


class Device(NamedTuple):
    """platform "cpu", "gpu" or "tpu", and the device's name: "TPU v6 lite", "NVIDIA H200"."""

    platform: str
    kind: str

    @property
    def compute_capability(self) -> int | None:
        """90 means 9.0 (Hopper). None if this is not an NVIDIA GPU, or not a known one."""
        if self.platform != "gpu":
            return None
        for device in _local("gpu"):
            if device.device_kind == self.kind and hasattr(device, "compute_capability"):
                text = str(device.compute_capability).replace(".", "")
                return int(text) if text.isdecimal() else None  # "gfx90a" on an AMD GPU
        return next((cc for name, cc in _GPU_KINDS.items() if name in self.kind), None)


def _described(device: jax.Device) -> Device:
    platform = "gpu" if device.platform in ("cuda", "rocm") else device.platform
    return Device(platform, device.device_kind)


def _local(platform: str) -> list[jax.Device]:
    """The devices of this process, even if another platform is jax's default."""
    try:
        return jax.local_devices(backend=platform)
    except RuntimeError:  # jax has no such platform here
        return []


def is_here(device: Device) -> bool:
    """Whether this process has such an accelerator, of any platform that jax uses here. False for a
    CPU, and for a device that is only compiled for."""
    return device.platform != "cpu" and device in map(_described, _local(device.platform))


def _of_mesh(mesh) -> Device | None:
    abstract = None if mesh is None or mesh.empty else mesh.abstract_device
    if abstract is None or abstract.platform is None:
        return None
    platform = "gpu" if abstract.platform in ("cuda", "rocm") else abstract.platform
    return Device(platform, abstract.device_kind)


def target_device(x: jax.Array | None = None) -> Device:
    """The device of the mesh that is set; without one, that of the mesh of x; without that, jax's
    default device."""
    found = _of_mesh(jax.sharding.get_abstract_mesh())
    if found is None and x is not None:
        found = _of_mesh(getattr(jax.typeof(x).sharding, "mesh", None))
    if found is None:
        device = jax.config.jax_default_device or jax.devices()[0]
        device = jax.devices(device)[0] if isinstance(device, str) else device
        found = _described(device)
    return found


_interpreted = contextvars.ContextVar("pallas_kernels_interpreted", default=None)


class Interpretation(NamedTuple):
    """How the host runs kernels of a device that it does not have: slowly, for tests.

    detect_races: the interpreter also looks for threads that read and write the same memory at the
    same time."""

    detect_races: bool = False


@contextlib.contextmanager
def _set(mode: Interpretation | None):
    token = _interpreted.set(mode)
    try:
        yield
    finally:
        _interpreted.reset(token)


def interpret(*, detect_races: bool = False):
    """Inside this context, a call that names the kernels of a device (implementation="pallas_tpu")
    runs them on the host, in their interpreter. "auto" never chooses an interpreter. The context
    has its effect while a function is traced: a function that was compiled outside stays as it is.
    """
    return _set(Interpretation(detect_races))


def on_device():
    """Inside this context, a surrounding `interpret` has no effect: implementations say what they
    support on the device itself."""
    return _set(None)


def interpretation() -> Interpretation | None:
    """What the surrounding `interpret` says; None without one."""
    return _interpreted.get()
