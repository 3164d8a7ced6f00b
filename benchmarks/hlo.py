"""Reads which collectives a compiled program runs, how often, and how many bytes they move."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

KINDS = (
    *("all-gather", "all-reduce", "all-to-all", "ragged-all-to-all", "collective-permute"),
    "reduce-scatter",
)


class Collective(NamedTuple):
    """A collective of the compiled program. part: what it is for (`_part`). axes: the mesh axes, or
    how many devices exchange. dtype: of what is sent, as the program writes it (bf16, f32). sent:
    bytes that each device sends in one run. times: how often it runs in a step."""

    kind: str
    part: str
    axes: str
    dtype: str
    sent: float
    times: int
    name: str


# Most collectives in a shard_map are those that the model asks for (its gradient also sums, over
# other axes, what it got whole). XLA adds all others: it puts together the parts of parameters, and
# sums their gradients. What it joins, such as the sums of the gradients of K and V, has no name.
PARTS = (
    (r"/_begin_cross/.*shard_map/", "global K, V and order of rows"),
    (r"/_output/.*shard_map/", "order of rows"),
    (r"/embed/.*shard_map/", "embedding"),
    (r"/(stage_\d+_\w+)/.*/attention/.*shard_map/", "keys and values of {}"),
    (r"/(stage_\d+_\w+)/.*/feed_forward/.*shard_map/", "experts of {}"),
    (r"shard_map/", "other"),
    (r"^$", "joined by the compiler"),
    (r"", "parameters and gradients"),
)


def _part(name: str) -> str:
    """What a collective is for, by its op_name: the path of modules that asked for it."""
    path = re.sub(r"LanguageModel\.", "", name)
    found = ((re.search(pattern, path), words) for pattern, words in PARTS)
    return next(words.format(*match.groups()) for match, words in found if match)


def _dtype(shapes: str) -> str:
    """The element type of the largest array in the text of a type."""
    arrays = re.findall(r"\b((?:pred|[a-z]+\d\w*)\[[\d,]*\])", shapes)
    return max(arrays, key=lambda array: _bytes(array)[0]).partition("[")[0]


def _bytes(shapes: str) -> list[int]:
    """The bytes of each array in the text of a type, such as (bf16[2,8]{1,0}, u32[])."""
    found = []
    for kind, dims in re.findall(r"\b(pred|[a-z]+\d\w*)\[([\d,]*)\]", shapes):
        bits = 8 if kind == "pred" else int(re.search(r"\d+", kind).group())
        found.append(math.prod(int(n) for n in dims.split(",") if n) * bits // 8)
    return found


def _computations(hlo: str) -> Iterator[tuple[str, bool, list[str]]]:
    """(name, whether it is the entry, its lines) of each computation of a program."""
    for found in re.finditer(r"^(ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", hlo, re.S | re.M):
        yield found.group(2), found.group(1) is not None, found.group(3).splitlines()


def _trips(line: str, condition: list[str]) -> float:
    """How often the body of a `while` runs: what the compiler knows, or the limit with which the
    condition compares its counter. NaN if the program decides it while it runs."""
    if known := re.search(r'known_trip_count"?:\{"?n"?:"(\d+)"', line):
        return int(known.group(1))
    limits = [int(n) for n in re.findall(r"[su]32\[\][^=]*constant\((\d+)\)", "\n".join(condition))]
    return max(limits, default=math.nan)


def _group(line: str, devices: int) -> tuple[int, str]:
    """How many of the devices exchange, and over which mesh axes if the program says so."""
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
    return devices, "neighbors" if "source_target_pairs" in line else "all devices"


CALLS = (
    r"(?:calls|to_apply|branch_computations|called_computations|true_computation|false_computation)="
    r"(?:\{([^}]*)\}|(%?[\w.\-]+))"
)


def collectives(hlo: str, devices: int) -> list[Collective]:
    """All collectives of a compiled program for so many devices, each with how often its loops run
    it. Of a conditional (`lax.cond`), all branches count: one of them is usually empty."""
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
            for names in ("".join(groups) for groups in re.findall(CALLS, line)):
                calls[name] += [(c, 1) for c in re.findall(r"[\w.\-]+", names) if c in lines]
    times: dict[str, float] = {}

    def visit(name: str, count: float) -> None:
        times[name] = times.get(name, 0) + count
        for called, trips in calls[name]:
            visit(called, count * trips)

    visit(entry, 1)
    found, seen = [], set()
    for name, body in lines.items():
        for line in body:
            made = re.search(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
            if not made:
                continue
            if math.isnan(times.get(name, math.nan)):
                raise ValueError(f"How often does {name} run, which has {line.strip()[:99]}?")
            # On TPUs, a collective may run beside other work. It is then a chain of fusions, and
            # all of them contain it.
            if chain := re.search(r'chain_id="(\d+)"', line):
                if chain.group(1) in seen:
                    continue
                seen.add(chain.group(1))
            op = re.search(r'op_name="([^"]*)"', line)
            kind = made.group(2)
            if kind == "ragged-all-to-all":
                result = _rows(line, body)
            else:
                result = _result(kind, made.group(3) is not None, made.group(1))
            sent, axes = _sent(kind, result, line, devices)
            if kind == "all-reduce" and _is_sliced(body):
                kind, sent = "reduce-scatter", sent / 2
            path = op.group(1) if op else ""
            words = kind, _part(path), axes, _dtype(made.group(1))
            found.append(Collective(*words, sent, int(times[name]), path))
    return found


def _result(kind: str, start: bool, shapes: str) -> int:
    """Bytes of the result on one device. The start of an asynchronous collective returns a tuple of
    its operands, its results and perhaps some u32[]; that of an all-reduce only its results."""
    arrays = _bytes(re.sub(r"u32\[\]", "", shapes) if start else shapes)
    return sum(arrays[len(arrays) // 2 :] if start and kind != "all-reduce" else arrays)


def _rows(line: str, body: list[str]) -> int:
    """Bytes of the rows that a ragged all-to-all exchanges: which device gets how many, only the
    run knows. So it is the smaller one of the arrays that it reads and writes, which is full if the
    other one has the room for the worst case, and an equal share for each device."""
    found = re.search(r"ragged-all-to-all(?:-start)?\((%?[\w.\-]+), (%?[\w.\-]+)", line)
    types = (
        re.search(rf"^\s*(?:ROOT )?{re.escape(name)} = (\S+) ", "\n".join(body), re.M)
        for name in (found.groups() if found else ())
    )
    return min(sum(_bytes(made.group(1))) for made in types if made)


def _is_sliced(body: list[str]) -> bool:
    """Whether these lines return only a slice of an all-reduce: libtpu writes a reduce-scatter so,
    as a fusion of two operations."""
    root = next((line for line in body if line.strip().startswith("ROOT")), "")
    sliced = re.search(r" dynamic-slice\(%?([\w.\-]+)", root)
    return sliced is not None and any(
        re.search(rf"%?{re.escape(sliced.group(1))} = .* all-reduce\(", line) for line in body
    )


def _sent(kind: str, result: int, line: str, devices: int) -> tuple[float, str]:
    """Bytes that each device sends, by the best algorithm of a ring; and over which axes."""
    ways, axes = _group(line, devices)
    if kind == "collective-permute":
        return result, axes
    times = {"reduce-scatter": ways, "all-reduce": 2}.get(kind, 1)
    return times * result * (ways - 1) / ways, axes
