"""What a training step needs on devices that this machine does not have, before one pays for them.

The real step is compiled for a topology by its compiler (libtpu, or the CUDA plugin), with all
shardings of the mesh. The compiler knows the memory exactly, and its program shows which
collectives run and how many bytes they move. Times are estimates from published peaks: they say
what a step takes at least.
"""

import dataclasses
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.aot.targets import H200, TARGETS, Target, environment, what_to_install
from yocou_jax import accounting, hardware
from yocou_jax.config import Config, ModelConfig
from yocou_jax.data.pipeline import Batch
from yocou_jax.errors import UserError
from yocou_jax.sharding import batch_sharding
from yocou_jax.training.step import Setup, set_up
from yocou_jax.typing import PyTree

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


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


# --- The program ----------------------------------------------------------------------------------


class Collective(NamedTuple):
    """A collective of the compiled program. axes: the mesh axes, or how many devices exchange.
    sent: bytes that each device sends in one run. times: how often it runs in a step."""

    kind: str
    axes: str
    sent: float
    times: int
    name: str


_WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "f64": 8, "s64": 8}


def _bytes(shapes: str) -> list[int]:
    """The bytes of each array in the text of a type."""
    return [
        _WIDTHS.get(kind, 4) * int(np.prod([int(n) for n in dims.split(",") if n], dtype=np.int64))
        for kind, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes)
    ]


def _computations(hlo: str) -> Iterator[tuple[str, bool, list[str]]]:
    """(name, whether it is the entry, its lines) of each computation of a program."""
    for found in re.finditer(r"^(ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", hlo, re.S | re.M):
        yield found.group(2), found.group(1) is not None, found.group(3).splitlines()


def _trips(line: str, condition: list[str]) -> int:
    """How often the body of a `while` runs: what the compiler knows, or the limit with which the
    condition compares its counter."""
    if known := re.search(r'known_trip_count"?:\{"?n"?:"(\d+)"', line):
        return int(known.group(1))
    limits = [int(n) for n in re.findall(r"s32\[\][^=]*constant\((\d+)\)", "\n".join(condition))]
    return max(limits, default=1)


def _group(line: str) -> tuple[int, str]:
    """How many devices exchange, and over which mesh axes if the program says so."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", line):
        sizes = {k: int(n) for k, n in re.findall(r"'([^']+)'=(\d+)", mesh.group(1))}
        axes = re.findall(r"'([^']+)'", mesh.group(2))
        ways = int(np.prod([sizes[axis] for axis in axes], dtype=np.int64))
        named = [axis for axis in axes if sizes[axis] > 1 and not axis.startswith("axis_")]
        return ways, ", ".join(named) or f"{ways} devices"
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(iota.group(2)), f"{iota.group(2)} devices"
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        ways = len(listed.group(1).split(","))
        return ways, f"{ways} devices"
    return 2, "neighbors" if "source_target_pairs" in line else "all devices"


def collectives(hlo: str) -> list[Collective]:
    """All collectives of a compiled program, each with how often its loops run it."""
    lines, calls, entry = {}, {}, ""
    for name, is_entry, body in _computations(hlo):
        lines[name] = body
        entry = name if is_entry else entry
    for name, body in lines.items():
        calls[name] = []
        for line in body:
            if loop := re.search(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)", line):
                times = _trips(line, lines.get(loop.group(1), []))
                calls[name].append((loop.group(2), times))
                continue
            for group in re.findall(
                r"(?:calls|to_apply|branch_computations|called_computations)=\{?([^}\s]*)", line
            ):
                calls[name] += [(c, 1) for c in re.findall(r"%?([\w.\-]+)", group) if c in lines]
    times: dict[str, int] = {}

    def visit(name: str, count: int) -> None:
        times[name] = times.get(name, 0) + count
        for called, trips in calls[name]:
            visit(called, count * trips)

    visit(entry, 1)
    found, seen = [], set()
    for name, body in lines.items():
        for line in body if times.get(name) else ():
            made = re.search(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
            if not made:
                continue
            # On TPUs, a collective may run beside other work. It is then a chain of fusions, and
            # all of them contain it.
            if chain := re.search(r'chain_id="(\d+)"', line):
                if chain.group(1) in seen:
                    continue
                seen.add(chain.group(1))
            op = re.search(r'op_name="([^"]*)"', line)
            sent, axes = _sent(made.group(2), made.group(3) is not None, made.group(1), line)
            found.append(
                Collective(made.group(2), axes, sent, times[name], op.group(1) if op else "")
            )
    return found


def _sent(kind: str, start: bool, shapes: str, line: str) -> tuple[float, str]:
    """Bytes that each device sends, by the best algorithm of a ring; and over which axes."""
    ways, axes = _group(line)
    arrays, part = _bytes(re.sub(r"u32\[\]", "", shapes) if start else shapes), (ways - 1) / ways
    total = sum(arrays)
    if kind == "collective-permute":
        return (total / 2 if start else total), axes
    if kind == "all-gather":  # the start returns its operands too
        return (total * ways / (ways + 1) if start else total) * part, axes
    if kind == "reduce-scatter":
        return total * ways * part, axes
    return total * part * (2 if kind == "all-reduce" else 1), axes


# --- The plan -------------------------------------------------------------------------------------


def _shard_bytes(tree: PyTree) -> int:
    """Bytes of one device's part of abstract arrays with shardings."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape), dtype=np.int64)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def whole_dimensions(setup: Setup, model: ModelConfig) -> list[str]:
    """The dimensions of parameters that a mesh axis would split, if it divided them."""
    from yocou_jax.model import abstract_params
    from yocou_jax.sharding import LOGICAL_AXES, SIZES, split_over

    found = {}
    for box in jax.tree.leaves(abstract_params(model), is_leaf=lambda x: hasattr(x, "names")):
        for name, size in zip(box.names, box.value.shape, strict=True):
            axes = [a for a in LOGICAL_AXES.get(name, ()) if setup.mesh.shape[a] > 1]
            if axes and not split_over(name, size, setup.mesh):
                found[f"{SIZES.get(name, name)}={size} over {' * '.join(axes)}"] = None
    return list(found)


def _packed(config: Config, ints: jax.ShapeDtypeStruct) -> Batch:
    ids = ints if config.data.packing else None
    return Batch(ints, ints, None, ids, ids)


def lower(config: Config, devices: list) -> tuple[Setup, Callable[[], Any]]:
    """The setup of a run on the devices, and a function that lowers its training step."""
    setup = set_up(config, devices)
    shape = config.data.batch_size, config.data.sequence_length
    ints = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(setup.mesh))

    def run():
        with jax.set_mesh(setup.mesh):
            return setup.step.lower(setup.abstract_state, _packed(config, ints))

    return setup, run


def plan(config: Config, topology: str, devices: list) -> dict[str, Any]:
    """What one training step needs on each device of a topology. "error" says why a program does
    not fit; the entries that only a compiled program has are then absent.

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
        "whole": whole_dimensions(setup, config.model),
        "bytes": {
            "parameters": _shard_bytes(state.params),
            "optimizer": _shard_bytes(state.opt_state),
            "memory": peaks.memory,
        },
        "flops": flops,
    }
    start = time.perf_counter()
    try:
        compiled = run().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return found | {"error": _too_large(str(error), found)}
    found["compile_seconds"] = time.perf_counter() - start
    memory = compiled.memory_analysis()
    both = memory.argument_size_in_bytes + memory.output_size_in_bytes
    peak = both - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    found["bytes"] |= {"temporary": memory.temp_size_in_bytes, "peak": peak}
    moved = collectives(compiled.as_text())
    found["collectives"] = _summary(moved)
    sent = sum(one.sent * one.times for one in moved)
    found["bytes"]["sent"] = sent
    return found | _estimate(flops, sent, peaks)


def _summary(moved: list[Collective]) -> list[dict[str, Any]]:
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for one in moved:
        row = rows.setdefault((one.kind, one.axes), {"runs": 0, "sent": 0.0})
        row["runs"] += one.times
        row["sent"] += one.sent * one.times
    ordered = sorted(rows.items(), key=lambda item: -item[1]["sent"])
    return [{"kind": kind, "axes": axes, **row} for (kind, axes), row in ordered]


def _estimate(flops: float, sent: float, peaks: hardware.Peaks) -> dict[str, Any]:
    """The time that arithmetic and links need at least, if both run at their published peaks at the
    same time. MFU: the share of the peak that a step would then reach."""
    seconds = {
        "arithmetic": flops / peaks.flops if peaks.flops else None,
        # Of the published sum of both directions, a device sends with half.
        "links": 2 * sent / peaks.links if peaks.links else None,
    }
    known = [x for x in seconds.values() if x is not None]
    least = max(known, default=None)
    mfu = None if least is None or seconds["arithmetic"] is None else seconds["arithmetic"] / least
    return {"at_least": seconds | {"step": least, "mfu": mfu}}


def _too_large(message: str, found: dict[str, Any]) -> str:
    """One sentence about memory: what is needed, what there is, and what would help, in order."""
    sizes = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", message)
    fixed = found["bytes"]["parameters"] + found["bytes"]["optimizer"]
    used = f"{sizes.group(1)} of {sizes.group(2)}" if sizes else "more than there is"
    hints = []
    if found["remat"] != "full":
        hints.append("compute.remat=full")
    ways = int(np.prod(list(found["mesh"].values()), dtype=np.int64))
    rows = found["batch_size"] // found["accumulation_steps"]
    if rows > ways // found["mesh"].get("context", 1) // found["mesh"].get("tensor", 1):
        hints.append("a larger optimizer.accumulation_steps")
    hints += ["a larger mesh.fsdp (state)", "a larger mesh.context (activations)"]
    return (
        f"A step needs {used} of a device's memory; parameters and optimizer are "
        f"{fixed / 2**30:.1f} GiB of it. It would help, in this order: {', '.join(hints[:3])}."
    )


def candidates(config: Config, devices: int, memory: float | None) -> Iterator[Config]:
    """Meshes x remat x microbatches that make sense for a model on so many devices, the most
    promising first: little recomputation, few microbatches, no more communication than needed."""
    model, rows = config.model, config.data.batch_size
    state = accounting.parameters(model).total * 12  # float32: the parameter and two moments
    found = []
    for tensor in (1, 2, 4, 8):
        for context in (1, 2, 4, 8, 16, 32, 64):
            if devices % (tensor * context) or model.num_heads % tensor:
                continue
            if config.data.sequence_length % (2 * context):
                continue
            ways = devices // (tensor * context)
            if rows % ways or ways < 1:
                continue
            for steps in (s for s in (1, 2, 4, 8, 16) if rows % (ways * s) == 0):
                for level, remat in enumerate(("none", "attention", "full")):
                    mesh = {"data": 1, "fsdp": ways, "tensor": tensor, "context": context}
                    if memory and state / (ways * tensor * context) > 0.9 * memory:
                        continue
                    found.append(((tensor > 1) + (context > 1), level, steps, mesh, remat))
    for _, _, steps, mesh, remat in sorted(found, key=lambda x: (x[0], x[1], x[2], *x[3].values())):
        yield dataclasses.replace(
            config,
            mesh=dataclasses.replace(config.mesh, **mesh, expert=1),
            compute=dataclasses.replace(config.compute, remat=remat),
            optimizer=dataclasses.replace(config.optimizer, accumulation_steps=steps),
        )
