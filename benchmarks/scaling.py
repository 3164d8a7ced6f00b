"""What a training step costs on more and more devices, by its compiled program.

The devices are virtual ones of this machine's CPU, so no time is measured: they share its cores.
"""

import dataclasses
from typing import Any

import jax

from benchmarks.plan import plan
from yocou_jax.config import Config, MeshConfig
from yocou_jax.errors import UserError

COUNTS = (1, 2, 4, 8)
AXES = ("fsdp", "context")


def split(config: Config, axis: str, count: int, weak: bool) -> Config:
    """The config with `count` devices along one axis of the mesh. weak: the tokens grow with the
    devices, in more sequences or in longer ones; else they stay the same."""
    data, times = config.data, count if weak else 1
    if axis == "context":
        data = dataclasses.replace(data, sequence_length=data.sequence_length * times)
    else:
        data = dataclasses.replace(data, batch_size=data.batch_size * times)
    sizes = {"data": 1, "fsdp": 1, "tensor": 1} | {axis: count}
    return dataclasses.replace(config, data=data, mesh=MeshConfig(**sizes))


def measure(config: Config, counts=COUNTS) -> list[dict[str, Any]]:
    """A row for each axis, kind of scaling and number of devices: bytes that a device sends in a
    step, bytes of its memory, and its FLOPs. Raises UserError if there are too few devices."""
    devices = jax.devices()
    if len(devices) < max(counts):
        raise UserError(f"--scaling needs {max(counts)} devices; there are {len(devices)}.")
    rows = []
    for axis in AXES:
        for weak in (False, True):
            for count in counts:
                found = plan(split(config, axis, count, weak), "here", devices[:count])
                rows.append(
                    {
                        "axis": axis,
                        "scaling": "weak" if weak else "strong",
                        "devices": count,
                        "batch_size": found["batch_size"],
                        "sequence_length": found["sequence_length"],
                        "sent": found["bytes"]["sent"],
                        "state": found["bytes"]["parameters"] + found["bytes"]["optimizer"],
                        "temporary": found["bytes"]["temporary"],
                        "flops": found["flops"],
                    }
                )
    return rows
