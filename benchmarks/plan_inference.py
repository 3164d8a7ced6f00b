"""What prefill and decode need on devices that this machine does not have.

As benchmarks/plan.py, which has the plan of a training step: the real programs are compiled for a
topology, with all shardings of the mesh.
"""

import functools
from typing import Any

import jax

from benchmarks.plan import compile_for, estimate, shard_bytes
from yocou_jax import accounting, hardware
from yocou_jax.config import Config
from yocou_jax.inference import default_sizes, new_memory, programs
from yocou_jax.inference.forward import described
from yocou_jax.inference.weights import PreparedModel, abstract_model
from yocou_jax.model import resolve_compute
from yocou_jax.sharding import batch_ways, make_mesh

HINTS = (
    "It would help, in this order: a larger mesh.context (caches), a smaller data.batch_size, a "
    "larger mesh.tensor (parameters)."
)


def plan_inference(config: Config, topology: str, devices: list) -> dict[str, Any]:
    """What each device of a topology needs to prefill data.batch_size rows of data.sequence_length
    positions, and to decode one token more. "programs" has what each program needs. If one does not
    fit, its "error" says why, and what only a compiled program has may be absent.

    Raises UserError if the mesh does not fit the devices.
    """
    batch, length = config.data.batch_size, config.data.sequence_length
    mesh, kind = make_mesh(config.mesh, devices), devices[0].device_kind
    with jax.set_mesh(mesh):
        compute = resolve_compute(config.compute)
        model = abstract_model(config.model, compute)
        capacity, chunk = default_sizes(batch, length + 1)
        make = functools.partial(new_memory, batch=batch, capacity=capacity)
        memory = described(make, model)
        runs = programs(model, batch, capacity, chunk)
        flops, read = _work(model, batch, length, chunk)
        rows = {
            name: _program(runs[name], flops[name] / len(devices), read[name], devices)
            for name in flops
        }
    return {
        "topology": topology,
        "devices": len(devices),
        "device_kind": kind,
        "program": str(config.model.program),
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "batch_size": batch,
        "sequence_length": length,
        "chunk": chunk,
        "dtype": compute.dtype.name,
        "bytes": {
            "parameters": shard_bytes(model.params),
            "caches": shard_bytes((memory.stages, memory.global_kv)),
            "memory": hardware.peaks(kind).memory,
        },
        "programs": rows,
    }


def _work(model: PreparedModel, batch: int, length: int, chunk: int) -> tuple[dict, dict]:
    """FLOPs, and bytes that must be read, of each program on all devices together. A chunk: the
    mean over the prompt. The matrices that it reads are few bytes beside its arithmetic."""
    c, value = model.config, model.compute.dtype.itemsize
    flops = {
        "prefill_chunk": accounting.prefill_flops_per_token(c, length) * batch * chunk,
        "decode_step": accounting.decode_flops_per_token(c, length + 1) * batch,
    }
    groups = batch_ways(batch=batch)  # each reads all matrices, and the caches of its rows
    step = groups * accounting.decode_bytes_per_step(c, batch // groups, length + 1, value)
    return flops, {"prefill_chunk": None, "decode_step": step}


def _program(lower, flops: float, read: float | None, devices: list) -> dict[str, Any]:
    """flops: of each device. read: bytes of all devices together, if they are not few."""
    compiled, used = compile_for(lower, devices)
    row: dict[str, Any] = {"flops": flops}
    if used is not None:
        size = f"{used / 2**30:.2f} GiB, which is more" if used else "more"
        row["error"] = f"It needs {size} than a device has. {HINTS}"
    if compiled is None:
        return row
    peaks = hardware.peaks(devices[0].device_kind)
    reading = read / len(devices) / peaks.bandwidth if read and peaks.bandwidth else None
    return row | compiled | estimate(flops, compiled["bytes"]["sent"], peaks, reading)
