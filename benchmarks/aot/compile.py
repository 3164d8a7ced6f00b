"""Compiles every attention kernel for a target, in a process of its own, because a compiler may end
the process."""

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import device
from benchmarks.aot import triton, verdict
from benchmarks.aot.logs import attention_kernels, gpu_kernels, tpu_kernels
from benchmarks.aot.targets import (
    TARGETS,
    Target,
    cases,
    environment,
    mesh,
    program,
    splash_program,
    tile_case,
)
from benchmarks.timing import first_line
from yocou_jax.errors import UserError

PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-triton", "triton")


def compile_one(target: Target, on: Mesh, folder: Path, function, args) -> dict[str, Any]:
    """Compiles one program. Returns the seconds, the bytes that it accesses by XLA's count (None if
    XLA does not count) and one entry per kernel. Empties the folder of the compiler's files."""
    replicated = NamedSharding(on, PartitionSpec())
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), args)
    with jax.sharding.use_abstract_mesh(on.abstract_mesh):
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
    """What is to be compiled: the start of a row of the report, and a function that returns
    (function, args)."""
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


def _append(results: TextIO, row: dict) -> None:
    results.write(json.dumps(row) + "\n")
    results.flush()


def compile_jobs(name: str, folder: str, first: int) -> None:
    """Compiles the jobs from `first` on, and writes a line of JSON before and after each job. So
    the parent process sees which job ended this process."""
    target, dump = TARGETS[name], Path(folder) / "dump"
    on = mesh(target)
    with open(Path(folder) / "results.jsonl", "a", encoding="utf-8") as results:
        for number, (job, make) in enumerate(_jobs(target)[first:], first):
            _append(results, {"started": number})
            try:
                job |= compile_one(target, on, dump, *make())
                job["error"] = None if job["kernels"] else "The program holds no kernel."
            except Exception as error:
                job["error"] = first_line(error)
            _append(results, job)


def _run_jobs(name: str) -> list[dict]:
    """Runs all jobs in a separate process. If a job ends it, the job's row says so, and a new
    process goes on with the next job."""
    target = TARGETS[name]
    code = "import sys; from benchmarks.aot.compile import compile_jobs; "
    code += "compile_jobs(sys.argv[1], sys.argv[2], int(sys.argv[3]))"
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


def measure(name: str) -> dict[str, Any]:
    """Compiles everything for a target. Returns the report."""
    target, start = TARGETS[name], time.perf_counter()
    jobs = triton.run_jobs(target) if target.platform == "triton" else _run_jobs(name)
    tiles = verdict.compare_with_splash(jobs)
    return {
        "target": name,
        "implementation": target.implementation,
        "versions": device.installed(PACKAGES),
        "jobs": jobs,
        "tiles": tiles,
        "failures": verdict.failures(target, jobs, tiles),
        "seconds": time.perf_counter() - start,
    }
