"""Compiles every attention kernel for an accelerator that this machine does not have.

    python -m experiments.compile_kernels --target=v5e|v5p|v6e|tpu7x|h200|a100 [--json]

The shapes are those of configs/yocou_125m.py and configs/yocou_1b.py, and a few small ones of what
those do not use ("others"): other dtypes and head widths, lengths, late queries. The attention
programs hold the forward and the backward kernels, as in training. Exit code 1: a compile failed, a
GPU kernel spills registers or serialises its wgmma, or on v6e a tile takes more cycles than jax's
splash attention or an unknown number of them. It needs requirements-aot.txt.

TPU. libtpu compiles on any host and, asked by --xla_jf_dump_to and --xla_jf_dump_llo_text, writes
the final schedule of each kernel: one row per VLIW bundle with the slots that it fills. A bundle is
a cycle if nothing stalls; the latencies that the scheduler knows are in it as empty bundles, copies
between HBM and VMEM, which overlap with it, are not. Cycles of a tile are

    the bundles from the first to the last that uses a matrix unit, both included,

within one stretch of straight code (between two labels of *final_bundles.txt), so that a loop's
body counts once, and a tile's two variants, without and with a mask, are two entries. They are
scaled to 512 x 512 pairs of query and key. How many pairs a stretch handles is read off the
kernel's jaxpr, as the exponentials that end in a matrix product, and not believed (a question mark)
if the schedule holds fewer. `stretch` is all of its bundles, so that nothing can hide before the
first or behind the last product. MXU and VALU are the share of their slots that the tile's bundles
fill. `spilled` and `filled` count instructions that store vector registers to VMEM and load them
back: they are part of the schedule and so of the cycles (the scores of a 512 x 512 tile are four
times the register file, and splash spills 558 times), and for that reason no failure.

The tile table compiles splash (blocks of 512, head width 128, LocalMask of the same window) and our
kernels (one head of 128) in this same process. With libtpu 0.0.50.1 splash takes 734, 890 and 1167
cycles on v6e for forward, dq and dkv.

`bytes / cache`, for decoding: what XLA says that the step accesses over the bytes of both caches. 1
is every key and value read once; a copy of the caches before the kernel adds 2, more if it pads
them; a small cache may only be brought into VMEM. It fails nothing.

GPU. Mosaic GPU kernels are assembled by the ptxas in jaxlib's CUDA plugin against a written-down
target (H200 below); registers, spills and warnings are those of each kernel's own ptxas log.
Triton kernels are compiled by Triton itself (pallas_kernels.triton.compile_report), which is asked
for bf16 without lengths only: float16 and lengths are not compiled for a100.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.extend.core import Var, jaxprs_in_params
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from experiments import cli
from yocou_jax.errors import UserError

# --- What is compiled, and for what ---------------------------------------------------------------


class Target(NamedTuple):
    """platform: "tpu", "cuda" or "triton". topology: as jax's get_topology_desc takes it.
    accelerator: what libtpu reads from TPU_ACCELERATOR_TYPE. must_beat_splash: the tile table
    decides about the exit code."""

    platform: str
    implementation: str
    topology: str = ""
    accelerator: str = ""
    must_beat_splash: bool = False
    compute_capability: int | None = None


TARGETS = {
    "v5e": Target("tpu", "pallas_tpu", "v5e:2x2", "v5litepod-4"),
    "v5p": Target("tpu", "pallas_tpu", "v5p:2x2x1", "v5p-8"),
    "v6e": Target("tpu", "pallas_tpu", "v6e:2x2", "v6e-4", must_beat_splash=True),
    "tpu7x": Target("tpu", "pallas_tpu", "tpu7x:2x2x1", "tpu7x-8"),
    "h200": Target("cuda", "pallas_gpu", "1x1x1"),
    "a100": Target("triton", "triton", compute_capability=80),
}

# What XLA would ask the driver about an H200 (HBM3e, 132 multiprocessors).
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 151397597184 cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""

MODELS, OTHERS = ("yocou_125m", "yocou_1b"), "others"
DECODE_ROWS, DECODE_LENGTH = 8, 32_768  # sequences decoded together; slots of the global cache
REGISTER = 1024  # fp32 elements of a TPU's vector register
TILE = 512  # queries and keys of the tile that cycles are quoted for


class Case(NamedTuple):
    """One program. Letters as in pallas_kernels.api; N is 1 for decoding, S the cache's slots.
    platforms: those of the targets whose implementation takes it."""

    model: str
    operation: str
    B: int
    N: int
    S: int
    Q: int
    K: int
    H: int
    window: int | None
    segments: bool = False
    lengths: bool = False
    q_offset: int = 0
    dtype: str = "bfloat16"
    platforms: tuple[str, ...] = ("tpu", "cuda", "triton")

    @property
    def decodes(self) -> bool:
        return self.operation.startswith("decode")

    @property
    def label(self) -> str:
        words = [self.operation, *["+ lengths"] * self.lengths, *["+ segments"] * self.segments]
        if self.q_offset:
            words.append(f"+ offset {self.q_offset}")
        if self.model == OTHERS:
            words.append(f"{self.dtype} {self.H}")
        return " ".join(words)

    @property
    def cache_bytes(self) -> int:
        return 2 * self.B * self.S * self.K * self.H * jnp.dtype(self.dtype).itemsize


def _others() -> list[Case]:
    """What the configs do not use and the implementations say that they support, in small."""

    def attention(operation, H, *platforms, N=512, S=512, **options):
        window = 256 if operation == "window_attention" else None
        return Case(OTHERS, operation, 2, N, S, 4, 2, H, window, platforms=platforms, **options)

    late = {"N": 512, "S": 1000, "q_offset": 488}
    cache = Case(OTHERS, "decode_cross", DECODE_ROWS, 1, DECODE_LENGTH, 4, 2, 256, None)
    return [
        attention("cross_attention", 256, "tpu", "triton"),
        attention("window_attention", 128, "tpu", dtype="float32"),
        attention("window_attention", 128, "cuda", dtype="float16"),
        attention("window_attention", 128, "cuda", "triton", **late),
        attention("cross_attention", 128, "tpu", "cuda", lengths=True, **late),
        attention("cross_attention", 128, "tpu", "cuda", lengths=True, segments=True, **late),
        cache._replace(platforms=("tpu", "triton")),
    ]


def cases(platform: str) -> list[Case]:
    """Every program of every model that the targets of a platform take."""
    found = []
    for model in MODELS:
        config = importlib.import_module(f"configs.{model}").get_config()
        m, N = config.model, config.data.sequence_length
        heads = m.num_heads, m.num_kv_heads, m.head_dim
        for segments in (False, True):
            found += [
                Case(model, "window_attention", 1, N, N, *heads, m.window, segments),
                Case(model, "cross_attention", 1, N, N, *heads, None, segments),
            ]
        found += [
            Case(model, "decode_window", DECODE_ROWS, 1, m.window, *heads, m.window),
            Case(model, "decode_cross", DECODE_ROWS, 1, DECODE_LENGTH, *heads, None),
        ]
    return [case for case in found + _others() if platform in case.platforms]


def program(case: Case, implementation: str) -> tuple[Callable, list]:
    """The function to compile and its arguments: forward and backward, or one decoding step."""
    from pallas_kernels import api

    B, N, S, K, dtype = case.B, case.N, case.S, case.K, jnp.dtype(case.dtype)
    array, ints = jax.ShapeDtypeStruct, functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    operation = functools.partial(getattr(api, case.operation), implementation=implementation)
    if case.decodes:
        cache = array((B, S, K, case.H), dtype)
        return operation, [array((B, case.Q, case.H), dtype), cache, cache, ints((B,))]
    operation = functools.partial(operation, q_offset=case.q_offset)
    if case.window is not None:
        operation = functools.partial(operation, window=case.window)
    # As in the model: the shared K/V of the cross layers comes in float32, see yocou_jax.attention.
    kv_dtype = dtype if case.window is not None else jnp.float32
    q, kv = array((B, N, case.Q, case.H), dtype), array((B, S, K, case.H), kv_dtype)
    options: dict[str, Any] = {}
    if case.segments:
        ids = api.SegmentIds(ints((B, N)), ints((B, S)))
        options["segment_ids"] = ids.q if N == S else ids
    if case.lengths:
        options["kv_lengths"] = ints((B,))

    def train(q, k, v, d_out, options):
        out, vjp = jax.vjp(functools.partial(operation, **options), q, k, v)
        return out, vjp(d_out)

    return train, [q, kv, kv, q, options]


def splash_program() -> tuple[Callable, list[jax.ShapeDtypeStruct]]:
    """jax's splash attention, forward and backward, in tiles of TILE x TILE."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    case = tile_case()
    mask = splash.LocalMask((case.N, case.S), (case.window - 1, 0), 0)
    attention = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask]), block_sizes=splash.BlockSizes(*[TILE] * 8)
    )

    def train(q, k, v, d_out):
        out, vjp = jax.vjp(attention, q, k, v)
        return out, vjp(d_out)

    return train, [jax.ShapeDtypeStruct((1, case.N, case.H), jnp.bfloat16)] * 4


def tile_case() -> Case:
    return Case("tile", "window_attention", 1, 4 * TILE, 4 * TILE, 1, 1, 128, TILE)


# --- What the compilers wrote ---------------------------------------------------------------------


class Stretch(NamedTuple):
    """A piece of straight code with matrix products. cycles: from its first to its last bundle
    with one; bundles: all of it; busy: the share of each unit's slots filled in those cycles;
    exponentials: slots of the unit that makes them (EUP), in all of it."""

    cycles: int
    bundles: int
    exponentials: int
    busy: dict[str, float]


def parse_schedule(utilization: str, bundles: str) -> tuple[list[Stretch], dict[str, int]]:
    """The stretches with matrix products of one kernel, in order, and slots filled per unit over
    the whole kernel, from *final_hlo-static-per-bundle-utilization.txt and *final_bundles.txt."""
    lines = utilization.splitlines()
    units = [name.strip() for name in lines[1].split(",")]
    slots = [int(n) for n in lines[2].split()]
    rows = [[int(n) for n in line.split()] for line in lines[4:] if line.strip()]
    labels = re.findall(r"^ *(?:0x)?([0-9a-f]+) +(?:([A-Z]{2}): *)?(?:>+ *)?[:{>]", bundles, re.M)
    starts = [int(number, 16) for number, label in labels if label]
    edges = [0, *starts, len(rows)]
    stretches = []
    for begin, end in itertools.pairwise(edges):
        products = [i for i in range(begin, end) if rows[i][units.index("MXU")]]
        if products:
            span = rows[products[0] : products[-1] + 1]
            busy = {
                unit: sum(row[n] for row in span) / (len(span) * slots[n])
                for n, unit in enumerate(units)
            }
            exponentials = sum(row[units.index("EUP")] for row in rows[begin:end])
            stretches.append(Stretch(len(span), end - begin, exponentials, busy))
    return stretches, {unit: sum(row[n] for row in rows) for n, unit in enumerate(units)}


def parse_vmem(report: str) -> dict[str, int]:
    """Bytes of VMEM per HLO instruction that reserves some, from *vmem_report.html."""
    data, _ = json.JSONDecoder().raw_decode(report, re.search(r"DATA\s*=\s*", report).end())
    return {name: entry["total_size"] for name, entry in data["hlo_breakdowns"].items()}


def parse_ptxas(log: str) -> dict[str, Any]:
    """Registers a thread, spilled bytes and warnings of one kernel, from its own ptxas log."""
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    registers = re.findall(r"Used (\d+) registers", log)
    return {
        "registers": max(map(int, registers), default=None),
        "spilled_bytes": sum(map(int, spills)),
        "wgmma_serialized": bool(re.search(r"wgmma.*seriali[sz]", log)),
    }


def pairs_per_stretch(jaxpr) -> list[int]:
    """Pairs of query and key in each piece of straight code of a kernel that handles some, in
    order: elements of the exponentials that end in a matrix product. Those of a running softmax's
    corrections do not, and products beyond attention's own do not matter."""
    found, here = [], 0

    def walk(jaxpr, copies):
        nonlocal here
        multiplied = set()  # what ends in a product of this jaxpr
        for eqn in reversed(jaxpr.eqns):
            used = any(v in multiplied for v in eqn.outvars)
            if eqn.primitive.name in ("exp", "exp2") and used:
                here += copies * math.prod(eqn.outvars[0].aval.shape)
            elif eqn.primitive.name == "dot_general" or used:
                multiplied |= {v for v in eqn.invars if isinstance(v, Var)}
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "cond":
                for branch in eqn.params["branches"]:
                    found.extend(pairs_per_stretch(branch.jaxpr))
            else:
                unrolled = int(eqn.params.get("unroll", 1))
                for inner in jaxprs_in_params(eqn.params):
                    walk(inner, copies * unrolled)

    walk(jaxpr, 1)
    return [*found, here] if here else found


def attention_kernels(function: Callable, args) -> dict[str, list[int]]:
    """`pairs_per_stretch` of each attention kernel that `function` calls, by the kernel's name."""
    pairs: dict[str, list[int]] = {}

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "pallas_call":
                if "decode" not in eqn.params["name"]:  # bound by memory: it has no tiles
                    pairs[eqn.params["name"]] = pairs_per_stretch(eqn.params["jaxpr"])
            else:
                for inner in jaxprs_in_params(eqn.params):
                    walk(inner)

    walk(jax.make_jaxpr(function)(*args).jaxpr)
    return pairs


def _tiles(stretches: list[Stretch], pairs: list[int]) -> list[dict[str, Any]]:
    """Each stretch with its cycles scaled to TILE x TILE pairs; None where its pairs are unknown,
    because the compiler merged or split what the kernel wrote. A pair takes one exponential, and
    an instruction makes REGISTER of them, so pairs without enough of these are not believed."""
    if len(pairs) != len(stretches):
        pairs = [pairs[0] if len(set(pairs)) == 1 else 0] * len(stretches)
    rows = []
    for stretch, n in zip(stretches, pairs, strict=True):
        known = 0 < n <= stretch.exponentials * REGISTER
        scale = TILE**2 / n if known else math.nan
        rows.append(
            {
                "pairs": n if known else None,
                "cycles": stretch.cycles,
                "tile_cycles": round(stretch.cycles * scale) if known else None,
                "stretch_cycles": round(stretch.bundles * scale) if known else None,
                "mxu": stretch.busy["MXU"],
                "valu": stretch.busy["VALU"],
            }
        )
    return rows


def _read(folder: Path, pattern: str) -> dict[str, str]:
    """The files that match, by what the * stands for."""
    head, tail = pattern.split("*")
    return {
        path.name[len(head) : len(path.name) - len(tail)]: path.read_text(
            encoding="utf-8", errors="replace"
        )
        for path in sorted(folder.glob(pattern))
    }


def tpu_kernels(compiled: str, folder: Path, pairs: dict[str, list[int]]) -> list[dict]:
    """One entry per Pallas kernel of a program, from its HLO text and libtpu's dump."""
    calls = re.findall(r"%(\S+) = [^\n]*custom_call_target=\"tpu_custom_call\"", compiled)
    dumps = {
        kind: {re.sub(r"^\d+-|-\d+$", "", name): text for name, text in _read(folder, tail).items()}
        for kind, tail in {
            "rows": "*-final_hlo-static-per-bundle-utilization.txt",
            "bundles": "*-final_bundles.txt",
            "vmem": "*-vmem_report.html",
        }.items()
    }
    vmem = {}
    for report in dumps["vmem"].values():
        vmem |= parse_vmem(report)
    kernels = []
    for call in calls:
        stretches, slots = parse_schedule(dumps["rows"][call], dumps["bundles"][call])
        # XLA names the instruction after the kernel and what jax made of it (transpose_jvp_...).
        plain = re.sub(r"\.\d+$", "", call)
        name = max((name for name in pairs if name in call), key=len, default=plain)
        kernels.append(
            {
                "kernel": name,
                "vmem_bytes": vmem.get(call),
                "spilled_registers": slots["VSTORE:SPILL"],
                "filled_registers": slots["VLOAD:FILL"],
                "tiles": _tiles(stretches, pairs[name]) if name in pairs else [],
            }
        )
    return kernels


def gpu_kernels(folder: Path) -> list[dict]:
    """One entry per kernel that Mosaic GPU assembled into `folder`. Its files are named after the
    kernel and a number that its two halves, the lowering and the assembling, count differently."""
    shared: dict[str, int] = {}
    for name, code in _read(folder, "*.before_layout_inference.txt").items():
        plain = re.sub(r"_\d+$", "", name)
        sizes = re.findall(r"dynamic_shared_memory_size %c(\d+)_i32", code)
        shared[plain] = max([shared.get(plain, 0), *map(int, sizes)])
    kernels = []
    for name, log in _read(folder, "*.ptxas").items():
        plain = re.sub(r"_\d+$", "", name)
        kernels.append({"kernel": plain, "shared_bytes": shared.get(plain), **parse_ptxas(log)})
    return kernels


# --- The process that compiles --------------------------------------------------------------------


def environment(target: Target, folder: Path) -> dict[str, str]:
    """What must be set before jax starts."""
    common = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2", "XLA_FLAGS": ""}
    if target.platform == "cuda":
        return common | {"MOSAIC_GPU_DUMP_TO": str(folder), "MOSAIC_GPU_DUMP_PTXAS": "1"}
    return common | {
        "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
        "TPU_ACCELERATOR_TYPE": target.accelerator,
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_MIN_LOG_LEVEL": "2",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }


def _mesh(target: Target) -> Mesh:
    from jax.experimental import topologies

    options = {"topology": target.topology, "target_config": H200}
    if target.platform == "tpu":
        options = {"topology_name": target.topology}
    description = topologies.get_topology_desc(platform=target.platform, **options)
    return Mesh(np.array(description.devices[:1]), ("device",))


def _compile(target: Target, mesh: Mesh, folder: Path, function, args) -> dict[str, Any]:
    """Compile seconds, bytes that XLA counts (None if it does not) and one entry per kernel;
    empties the folder that the compiler dumps to."""
    whole = NamedSharding(mesh, PartitionSpec())
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), args)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        pairs = {}
        if target.platform == "tpu":
            pairs = attention_kernels(function, args)
        start = time.perf_counter()
        compiled = jax.jit(function).lower(*args).compile()
        seconds = time.perf_counter() - start
    if target.platform == "tpu":
        kernels = tpu_kernels(compiled.as_text(), folder, pairs)
    else:
        kernels = gpu_kernels(folder)
    for path in folder.iterdir():  # hundreds of megabytes otherwise
        path.unlink()
    try:
        moved = (compiled.cost_analysis() or {}).get("bytes accessed")
    except Exception:  # not every backend has it
        moved = None
    return {"compile_s": seconds, "bytes_accessed": moved, "kernels": kernels}


def _jobs(target: Target) -> list[tuple[dict, Callable]]:
    """What is to be compiled: how it is reported, and a function that gives (function, args)."""
    jobs = []
    for case in cases(target.platform):
        job = {"model": case.model, "operation": case.label}
        if case.decodes:
            job["cache_bytes"] = case.cache_bytes
        jobs.append((job, functools.partial(program, case, target.implementation)))
    if target.platform == "tpu":
        ours = functools.partial(program, tile_case(), target.implementation)
        jobs += [
            ({"model": "tile", "operation": "splash"}, splash_program),
            ({"model": "tile", "operation": target.implementation}, ours),
        ]
    return jobs


def compile_jobs(name: str, folder: str, first: int) -> None:
    """Compiles from job `first` on, writing a line of JSON before and after each: whoever started
    this process sees which one killed it."""
    target, dump = TARGETS[name], Path(folder) / "dump"
    mesh = _mesh(target)
    with open(Path(folder) / "results.jsonl", "a", encoding="utf-8") as results:
        for number, (job, make) in enumerate(_jobs(target)[first:], first):
            print(json.dumps({"started": number}), file=results, flush=True)
            try:
                job |= _compile(target, mesh, dump, *make())
                job["error"] = None if job["kernels"] else "The program holds no kernel."
            except Exception as error:
                job["error"] = _first_line(error)
            print(json.dumps(job), file=results, flush=True)


def _first_line(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
    return next((line.strip() for line in text.splitlines() if line.strip()), repr(error))[:300]


# --- The command ----------------------------------------------------------------------------------


def what_to_install(target: Target) -> str | None:
    """One sentence if a package that compiles for the target is missing."""
    needed = {
        "tpu": ("libtpu", "TPU", "requirements-aot.txt"),
        "cuda": ("jax_cuda13_plugin", "NVIDIA GPU", "requirements-aot.txt"),
        "triton": ("triton", "Triton", "requirements-aot.txt"),
    }
    package, what, requirements = needed[target.platform]
    if importlib.util.find_spec(package) is not None:
        return None
    return (
        f"Compiling {what} kernels needs {package}, which is not installed: "
        f"`make setup REQUIREMENTS={requirements}`, or `pip install -r {requirements}`."
    )


def _run_jobs(name: str) -> list[dict]:
    """All jobs in a process of their own; one that kills it is reported, and another process goes
    on behind it."""
    target = TARGETS[name]
    code = "import sys; from experiments import compile_kernels as c; "
    code += "c.compile_jobs(sys.argv[1], sys.argv[2], int(sys.argv[3]))"
    done: list[dict] = []
    jobs = [job for job, _ in _jobs(target)]
    while len(done) < len(jobs):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "dump").mkdir()
            child = subprocess.run(
                [sys.executable, "-c", code, name, folder, str(len(done))],
                env=os.environ | environment(target, Path(folder) / "dump"),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            results = Path(folder) / "results.jsonl"
            lines = (
                [json.loads(x) for x in results.read_text(encoding="utf-8").splitlines()]
                if results.exists()
                else []
            )
        done += [line for line in lines if "started" not in line]
        if len(done) < len(jobs):
            said = [line for line in child.stdout.splitlines() if line.strip()][-3:]
            died = (
                f"The compiling process ended with code {child.returncode}: {' '.join(said)[:300]}"
            )
            if not lines:
                raise UserError(died)
            done.append(jobs[len(done)] | {"error": died})
    return done


def _run_triton(target: Target) -> list[dict]:
    from pallas_kernels import triton

    jobs = []
    for model in (*MODELS, OTHERS):
        shapes = [case._asdict() for case in cases("triton") if case.model == model]
        try:
            kernels = triton.compile_report(target.compute_capability, shapes)
        except Exception as error:
            jobs.append({"model": model, "operation": "all", "error": _first_line(error)})
            continue
        for kernel in kernels:
            name, _, call = kernel["name"].partition(" ")
            found = {
                "kernel": name,
                "registers": kernel["registers"],
                "shared_bytes": kernel["shared_bytes"],
                "spilled_bytes": kernel["spills"],
            }
            job = {"model": model, "operation": call, "compile_s": kernel["seconds"]}
            jobs.append(job | {"error": None, "kernels": [found]})
    return jobs


def compare_with_splash(jobs: list[dict]) -> list[dict]:
    """Cycles of the slowest tile of each of our kernels beside the same kernel of splash, and how
    many of our tiles have no known cycles."""
    by_name = {job["operation"]: job.get("kernels", []) for job in jobs if job["model"] == "tile"}
    splash = by_name.pop("splash", [])
    ours = next(iter(by_name.values()), [])
    rows = []
    for what, kernel in zip(("forward", "dq", "dkv"), splash, strict=False):
        (theirs,) = kernel["tiles"]
        mine = [tile for k in ours if k["kernel"].endswith(what) for tile in k["tiles"]]
        known = [tile for tile in mine if tile["tile_cycles"] is not None]
        slowest = max(known, key=lambda tile: tile["tile_cycles"], default=None)
        ratio = slowest["tile_cycles"] / theirs["tile_cycles"] if slowest else None
        row = {"kernel": what, "splash": theirs, "ours": slowest, "ratio": ratio}
        rows.append(row | {"unknown": len(mine) - len(known)})
    return rows


def failures(target: Target, jobs: list[dict], tiles: list[dict]) -> list[str]:
    """Everything that makes the command fail, a sentence each."""
    found = []
    for job in jobs:
        where = f"{job['model']}, {job['operation']}"
        if job["error"]:
            found.append(f"{where}: {job['error']}")
        for kernel in job.get("kernels", []):
            if kernel.get("spilled_bytes"):
                size = kernel["spilled_bytes"]
                found.append(f"{where}: {kernel['kernel']} spills {size} bytes of registers.")
            if kernel.get("wgmma_serialized"):
                found.append(f"{where}: ptxas serialises the wgmma of {kernel['kernel']}.")
    if target.must_beat_splash:
        for row in tiles:
            if row["ours"] is None:
                found.append(f"tile, {row['kernel']}: no cycles of ours to compare with splash.")
                continue
            if row["unknown"]:
                found.append(
                    f"tile, {row['kernel']}: the cycles of {row['unknown']} of our tiles are "
                    "unknown and may be more than splash's."
                )
            if row["ratio"] > 1:
                found.append(
                    f"tile, {row['kernel']}: {row['ours']['tile_cycles']} cycles, and splash takes "
                    f"{row['splash']['tile_cycles']}."
                )
    return found


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-triton", "triton"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def report(name: str) -> dict[str, Any]:
    """Compiles everything for a target: jobs, the tile table, failures, versions, seconds."""
    target, start = TARGETS[name], time.perf_counter()
    jobs = _run_triton(target) if target.platform == "triton" else _run_jobs(name)
    tiles = compare_with_splash(jobs)
    return {
        "target": name,
        "implementation": target.implementation,
        "versions": _versions(),
        "jobs": jobs,
        "tiles": tiles,
        "failures": failures(target, jobs, tiles),
        "seconds": time.perf_counter() - start,
    }


def _kib(size: int | None) -> str:
    return "" if size is None else f"{size / 1024:,.0f}"


def _cache_reads(job: dict) -> str:
    if job.get("cache_bytes") is None:
        return ""
    moved = job.get("bytes_accessed")
    return "?" if moved is None else f"{moved / job['cache_bytes']:.2f}"


def _tile_cells(tile: dict | None) -> list[str]:
    if tile is None or tile["tile_cycles"] is None:
        return ["?", "", "", ""]
    shares = [f"{tile[unit]:.0%}" for unit in ("mxu", "valu")]
    return [f"{tile['tile_cycles']:,}", f"{tile['stretch_cycles']:,}", *shares]


TILE_COLUMNS = (f"cycles / {TILE}²", "stretch", "MXU", "VALU")
COLUMNS = {
    "tpu": ("bytes / cache", "VMEM KiB", "spilled", "filled", *TILE_COLUMNS),
    "cuda": ("registers", "shared KiB", "spilled bytes", "wgmma"),
    "triton": ("registers", "shared KiB", "spilled bytes"),
}


def _kernel_table(name: str, result: dict[str, Any]) -> Table:
    tpu = TARGETS[name].platform == "tpu"
    table = Table("model", "operation", "compile s", title=name, title_justify="left")
    table.add_column("kernel", no_wrap=True)
    for column in COLUMNS[TARGETS[name].platform]:
        table.add_column(column, justify="right")
    for job in result["jobs"]:
        first = [job["model"], job["operation"], f"{job.get('compile_s', math.nan):.1f}"]
        if job["error"]:
            table.add_row(*first, "FAILED")
        for kernel in job.get("kernels", []):
            if tpu:
                cells = [_cache_reads(job), _kib(kernel["vmem_bytes"])]
                cells += [str(kernel["spilled_registers"]), str(kernel["filled_registers"])]
                tiles = [_tile_cells(tile) for tile in kernel["tiles"]] or [[""] * 4]
                cells += ["\n".join(column) for column in zip(*tiles, strict=True)]
            else:
                cells = [str(kernel["registers"]), _kib(kernel["shared_bytes"])]
                cells += [str(kernel["spilled_bytes"])]
                if "wgmma_serialized" in kernel:
                    cells += ["serialised" if kernel["wgmma_serialized"] else "ok"]
            table.add_row(*first, kernel["kernel"], *cells)
            first = [""] * 3
    return table


def _tile_table(tiles: list[dict]) -> Table:
    title = f"one {TILE} x {TILE} tile, head width 128, window {TILE}: static cycles"
    table = Table("kernel", title=title, title_justify="left")
    for whose in ("splash", "ours"):
        for column in ("", " stretch", " MXU", " VALU"):
            table.add_column(whose + column, justify="right")
    table.add_column("ours / splash", justify="right")
    for row in tiles:
        ratio = "?" if row["ratio"] is None else f"{row['ratio']:.2f}"
        cells = _tile_cells(row["splash"]) + _tile_cells(row["ours"])
        table.add_row(row["kernel"], *cells, ratio)
    return table


def main(_):
    name = TARGET.value
    if missing := what_to_install(TARGETS[name]):
        raise UserError(missing)
    result = report(name)
    if JSON.value:
        print(json.dumps(result))
    else:
        console = Console(width=None if Console().is_terminal else 190)
        console.print(_kernel_table(name, result))
        if result["tiles"]:
            console.print(_tile_table(result["tiles"]))
        console.print(", ".join(f"{k} {v}" for k, v in result["versions"].items()))
        console.print(f"{len(result['jobs'])} programs in {result['seconds']:.0f} s")
        for failure in result["failures"]:
            console.print(f"FAILED: {failure}", markup=False)
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    # Not above: absl knows a flag once, and the tests import several commands.
    TARGET = flags.DEFINE_enum("target", None, list(TARGETS), "What to compile for.", required=True)
    JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of tables.")
    cli.run(main)
