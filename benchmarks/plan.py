"""What a training step needs on devices that this machine does not have, before one pays for them.

The real step is compiled for a topology by its compiler (libtpu, or the CUDA plugin), with all
shardings of the mesh. The compiler knows the memory exactly, and its program shows which
collectives run and how many bytes they move. Times are estimates from published peaks: they say
what a step takes at least.
"""

import os
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from benchmarks.aot.targets import H200, TARGETS, Target, environment, what_to_install
from benchmarks.hlo import Collective, collectives
from yocou_jax import accounting, hardware
from yocou_jax.config import Config
from yocou_jax.data.pipeline import Batch
from yocou_jax.device_memory import training_hints
from yocou_jax.errors import UserError
from yocou_jax.foreign import asked_bytes
from yocou_jax.model import abstract_params
from yocou_jax.sharding import batch_sharding, batch_ways, whole_dimensions
from yocou_jax.training.step import Setup, set_up
from yocou_jax.typing import PyTree

# --- The devices ----------------------------------------------------------------------------------


def find_target(topology: str) -> Target:
    """The accelerator of a topology: "v5e:16x16" (chips along each axis of the torus), or
    "h200:8". Raises UserError for another name, or if its compiler is not installed."""
    name, _, shape = topology.partition(":")
    target = TARGETS.get(name)
    if target is None or target.platform == "triton" or not re.fullmatch(r"\d+(x\d+)*", shape):
        known = ", ".join(name for name, t in TARGETS.items() if t.platform != "triton")
        raise UserError(
            f"--topology={topology} must be a device and a shape, as v5e:16x16, v5p:4x4x4 or "
            f"h200:8; the devices are {known}."
        )
    if missing := what_to_install(target):
        raise UserError(missing)
    return target


def devices_of(topology: str) -> list:
    """The devices of a topology, which this machine need not have. Call it before jax has used a
    backend. Raises UserError if there is no such topology."""
    from jax.experimental import topologies

    target = find_target(topology)
    settings = environment(target)
    os.environ.update({name: settings[name] for name in settings if name not in os.environ})
    jax.config.update("jax_platforms", "cpu")
    _, _, shape = topology.partition(":")
    options: dict[str, Any] = {"topology_name": topology}
    if target.platform == "cuda":
        if "x" in shape:
            raise UserError(f"--topology={topology}: GPUs are counted, as in h200:8.")
        options = {"topology": f"1x{shape}x1", "target_config": H200}
    try:
        found = topologies.get_topology_desc(platform=target.platform, **options)
    except Exception as error:  # jax raises several kinds
        raise UserError(f"--topology={topology} does not exist: {error}") from error
    return list(found.devices)


# --- The plan -------------------------------------------------------------------------------------


def shard_bytes(tree: PyTree) -> int:
    """Bytes of one device's part of abstract arrays with shardings."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape), dtype=np.int64)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def _abstract_batch(config: Config, sharding: NamedSharding) -> Batch:
    shape = config.data.batch_size, config.data.sequence_length
    ints = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
    ids = ints if config.data.packing else None
    return Batch(ints, ints, None, ids, ids)


def lower(config: Config, devices: list) -> tuple[Setup, Callable[[], Any]]:
    """The setup of a run on the devices, and a function that lowers its training step."""
    setup = set_up(config, devices)
    batch = _abstract_batch(config, batch_sharding(setup.mesh))

    def run():
        with jax.set_mesh(setup.mesh):
            return setup.step.lower(setup.abstract_state, batch)

    return setup, run


def plan(config: Config, topology: str, devices: list) -> dict[str, Any]:
    """What one training step needs on each device of a topology. "error" says why a program does
    not fit. If the compiler refused it, the entries that only a compiled program has are absent.

    Raises UserError if the mesh does not fit the devices or the model.
    """
    setup, run = lower(config, devices)
    kind, state = devices[0].device_kind, setup.abstract_state
    peaks = hardware.peaks(kind)
    tokens = config.data.batch_size * config.data.sequence_length
    flops = accounting.run_flops_per_token(config) * tokens / len(devices)
    found: dict[str, Any] = {
        "topology": topology,
        "devices": len(devices),
        "device_kind": kind,
        "program": str(config.model.program),
        "mesh": {axis: size for axis, size in setup.mesh.shape.items() if size > 1},
        "batch_size": config.data.batch_size,
        "sequence_length": config.data.sequence_length,
        "accumulation_steps": config.optimizer.accumulation_steps,
        "remat": config.compute.remat,
        "dtype": setup.compute.dtype.name,
        "whole": whole_dimensions(abstract_params(config.model), setup.mesh),
        "bytes": {
            "parameters": shard_bytes(state.params),
            "optimizer": shard_bytes(state.opt_state),
            "memory": peaks.memory,
        },
        "flops": flops,
    }
    compiled, used = compile_for(run, devices)
    if used is not None:
        hints = training_hints(config, len(devices), batch_ways(setup.mesh))
        found["error"] = too_large(used or None, found["bytes"], hints)
    if compiled is None:
        return found
    found["bytes"] |= compiled.pop("bytes")
    return found | compiled | estimate(flops, found["bytes"]["sent"], peaks)


def compile_for(
    lower: Callable[[], Any], devices: list
) -> tuple[dict[str, Any] | None, float | None]:
    """What a compiled program needs on each device, or None if the compiler refused it. Also the
    bytes that it would use, if a device does not have so many (0: it is not known how many)."""
    start = time.perf_counter()
    try:
        compiled = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, asked_bytes(error) or 0.0
    seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
    both = memory.argument_size_in_bytes + memory.output_size_in_bytes
    peak = both - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    moved = collectives(compiled.as_text(), len(devices))
    sent = sum(one.sent * one.times for one in moved)
    limit = hardware.peaks(devices[0].device_kind).memory
    found = {
        "bytes": {"temporary": memory.temp_size_in_bytes, "peak": peak, "sent": sent},
        "collectives": _summary(moved),
        "compile_seconds": seconds,
    }
    # Only libtpu refuses to compile a program that is too large.
    return found, peak if limit and peak > limit else None


def _summary(moved: list[Collective]) -> list[dict[str, Any]]:
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for one in moved:
        key = one.part, one.kind, one.axes, one.dtype
        row = rows.setdefault(key, {"runs": 0, "sent": 0.0})
        row["runs"] += one.times
        row["sent"] += one.sent * one.times
    ordered = sorted(rows.items(), key=lambda item: -item[1]["sent"])
    names = "part", "kind", "axes", "dtype"
    return [dict(zip(names, key, strict=True)) | row for key, row in ordered]


def estimate(
    flops: float, sent: float, peaks: hardware.Peaks, reading: float | None = None
) -> dict[str, Any]:
    """The time that arithmetic and links need at least, if both run at their published peaks at the
    same time, and so does the memory. MFU: the share of the peak that a step would then reach.
    reading: the seconds that it takes to read what a step must read, if these are not few."""
    seconds = {
        "arithmetic": flops / peaks.flops if peaks.flops else None,
        "links": sent / peaks.links if peaks.links else None,
    }
    if reading is not None:
        seconds["reading"] = reading
    known = [x for x in seconds.values() if x is not None]
    least = max(known, default=None)
    mfu = None if least is None or seconds["arithmetic"] is None else seconds["arithmetic"] / least
    return {"at_least": seconds | {"step": least, "mfu": mfu}}


def too_large(used: float | None, sizes: dict[str, Any], hints: list[str]) -> str:
    """One sentence about memory: what is needed, what there is, and what would help, in order.
    used: bytes, if they are known."""
    fixed = sizes["parameters"] + sizes["optimizer"]
    needed = "more" if used is None else f"{used / 2**30:.2f} GiB, which is more"
    return (
        f"A step needs {needed} than a device has; parameters and optimizer are "
        f"{fixed / 2**30:.1f} GiB of it. It would help, in this order: {', '.join(hints[:3])}."
    )
