"""Reads the compilers' files about a kernel: cycles and VMEM from libtpu, registers from ptxas.

`python -m experiments.compile_kernels --help` says how cycles are counted.
"""

import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.extend.core import Var, jaxprs_in_params

from benchmarks.aot.targets import TILE

REGISTER = 1024  # fp32 elements of a TPU's vector register


class Stretch(NamedTuple):
    """A piece of straight code with matrix products. cycles: the bundles from the first to the last
    one with a matrix product. bundles: all bundles. busy: for each unit, the share of its slots
    that is filled in `cycles`. exponentials: how many instructions in `bundles` make exponentials
    (slots of the unit EUP)."""

    cycles: int
    bundles: int
    exponentials: int
    busy: dict[str, float]


def parse_schedule(utilization: str, bundles: str) -> tuple[list[Stretch], dict[str, int]]:
    """The stretches of one kernel that have matrix products, in order, and how many slots of each
    unit the whole kernel fills. The arguments are the texts of
    *final_hlo-static-per-bundle-utilization.txt and *final_bundles.txt."""
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
    """The bytes of VMEM of each HLO instruction that reserves some, from *vmem_report.html."""
    data, _ = json.JSONDecoder().raw_decode(report, re.search(r"DATA\s*=\s*", report).end())
    return {name: entry["total_size"] for name, entry in data["hlo_breakdowns"].items()}


def parse_ptxas(log: str) -> dict[str, Any]:
    """Registers per thread, spilled bytes and warnings of one kernel, from its own ptxas log."""
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    registers = re.findall(r"Used (\d+) registers", log)
    return {
        "registers": max(map(int, registers), default=None),
        "spilled_bytes": sum(map(int, spills)),
        "wgmma_serialized": bool(re.search(r"wgmma.*seriali[sz]", log)),
    }


def pairs_per_stretch(jaxpr) -> list[int]:
    """How many pairs of query and key each piece of straight code of a kernel handles, in order,
    without pieces that handle none. It counts the exponentials whose results go into a matrix
    product: attention has one for each pair. The exponentials that correct a running softmax do
    not count, because no product reads them. A product without exponentials adds nothing."""
    found, here = [], 0

    def walk(jaxpr, copies):
        nonlocal here
        multiplied = set()  # variables that go into a matrix product of this jaxpr
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
                if "decode" not in eqn.params["name"]:  # decode is bound by memory: no tiles
                    pairs[eqn.params["name"]] = pairs_per_stretch(eqn.params["jaxpr"])
            else:
                for inner in jaxprs_in_params(eqn.params):
                    walk(inner)

    walk(jax.make_jaxpr(function)(*args).jaxpr)
    return pairs


def _tiles(stretches: list[Stretch], pairs: list[int]) -> list[dict[str, Any]]:
    """A row for each stretch, with its cycles scaled to TILE x TILE pairs. The cycles are None if
    the number of pairs is unknown, because the compiler merged or split pieces of the kernel. A
    pair needs one exponential, and an instruction makes REGISTER of them. If a stretch has too few
    of these instructions for its pairs, its number of pairs counts as unknown too."""
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


def _files(folder: Path, pattern: str) -> dict[str, str]:
    """The texts of the files that match, by the part of their names that matches the *."""
    head, tail = pattern.split("*")
    return {
        path.name[len(head) : len(path.name) - len(tail)]: path.read_text(
            encoding="utf-8", errors="replace"
        )
        for path in sorted(folder.glob(pattern))
    }


def tpu_kernels(compiled: str, folder: Path, pairs: dict[str, list[int]]) -> list[dict]:
    """One entry per Pallas kernel of a program, from its HLO text and libtpu's files."""
    calls = re.findall(r"%(\S+) = [^\n]*custom_call_target=\"tpu_custom_call\"", compiled)
    dumps = {
        kind: {
            re.sub(r"^\d+-|-\d+$", "", name): text for name, text in _files(folder, tail).items()
        }
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
    """One entry per kernel of which Mosaic GPU wrote files to `folder`. Their names are that of the
    kernel and a number, but the files of one kernel may have different numbers."""
    shared: dict[str, int] = {}
    for name, code in _files(folder, "*.before_layout_inference.txt").items():
        plain = re.sub(r"_\d+$", "", name)
        sizes = re.findall(r"dynamic_shared_memory_size %c(\d+)_i32", code)
        shared[plain] = max([shared.get(plain, 0), *map(int, sizes)])
    kernels = []
    for name, log in _files(folder, "*.ptxas").items():
        plain = re.sub(r"_\d+$", "", name)
        kernels.append({"kernel": plain, "shared_bytes": shared.get(plain), **parse_ptxas(log)})
    return kernels
