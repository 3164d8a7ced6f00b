"""Measures prefill, decode and KV cache against the length of the prompt, architecture by
architecture, on the device at hand, beside the paper's Tables 8, 9 and 10.

    python -m experiments.profile_inference --config=configs/yocou_1b.py [--json] [--plot=x.png]

Weights are random and in the compute type, no mesh. On a CPU a small model with the same programs
stands in for one of over 30M parameters.

Prefill is `inference.prefill` of fresh prompts, of few rows, as it is bound by arithmetic. Decode
is a compiled loop of greedy steps on a cache of random values: a step's cost depends on lengths
alone. It runs at the largest batch up to --batch (the paper's 32) that fits, and once more at the
batch in common with what it is compared to, where that is smaller: every ratio is one at equal
batches, the plot is not. Measurements take turns and medians count; programs are compiled before,
side by side. GB/s of decode are the bytes that a step must read, by
`accounting.decode_bytes_per_step`, beside the copy bandwidth measured in the same run. After
--budget_s nothing more is begun; what was not measured is named. --out=x.json is written after each
length. Exit code 1: a measurement failed, while the others were made all the same.

What should come out, by Table 1 and `accounting`, for the 1.3B model. Prefill: a window layer's
cost per token is constant, a full layer's grows with N, and yoco_u passes 30 layers where the
transformer passes 20; FLOPs per token of the transformer over those of yoco_u:

    N            8K    16K    32K    64K   128K    256K      (equal at 14.6K)
    prefill    0.84   1.04   1.45   2.25   3.86    7.07
    measured   0.88   1.14   1.67   2.79   5.04   10.21      (the paper, Table 8)

so yoco_u loses below about 16K, and 10.2 needs full attention to run at 0.67 of the FLOP/s of all
else: the better the attention kernel, the smaller this ratio. Decode: yoco_u reads half of what
the transformer does of a long cache, (L/2)(N + W loops) to L N, and twice its weights, so that by
bytes the ratio is below 2 at any length and equal batch; the bytes of a step over yoco_u's:

    N, batch       8K, 32   16K, 32   64K, 32   256K, 4   256K, 8   256K, 32
    transformer      1.15      1.41      1.80      1.69      1.82       1.94
    yoco             0.72      0.81      0.93      0.90      0.94       0.98

The paper's 2.2 at 256K (Table 9: 303 / 137) is therefore more than bytes explain: its engine fits
fewer rows at once the larger their caches are, so that it is no ratio at equal batches. KV:
10240 / 542 MiB = 18.9, exactly.
"""

import concurrent.futures
import contextlib
import dataclasses
import datetime
import functools
import itertools
import json
import logging.handlers
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from experiments import benchmark_kernels, cli
from pallas_kernels import api
from yocou_jax import accounting, inference
from yocou_jax.cache import KVCache
from yocou_jax.config import Config, ModelConfig
from yocou_jax.errors import UserError
from yocou_jax.files import resolve, write_atomically
from yocou_jax.model import abstract_params, compute_dtype
from yocou_jax.program import ARCHITECTURES

VALUE = {"prefill": "tokens_per_s", "decode": "tokens_per_s", "kv": "mib"}
# What bounds the speed in theory: the inverse ratio of these is what to expect.
COST = {"prefill": "flops_per_token", "decode": "gb_per_step"}

# --- The paper ------------------------------------------------------------------------------------

# arXiv 2604.01220, the 1.3B model in bf16: tokens/s of prefill (Table 8) and of decode, all 32 rows
# together (Table 9), on one H100; KV cache in MiB per sequence (Table 10).
PAPER_LENGTHS = (8192, 16_384, 32_768, 65_536, 131_072, 262_144)
PAPER = {
    "prefill": {
        "transformer": (85_707, 66_342, 45_566, 27_276, 14_987, 7475),
        "yoco": (220_662, 219_734, 218_247, 219_106, 220_416, 220_407),
        "rins": (42_905, 33_276, 22_767, 13_630, 7397, 3739),
        "yoco_u": (75_637, 75_694, 76_202, 76_148, 75_534, 76_301),
    },
    "decode": {
        "transformer": (2712, 1795, 638, 450, 220, 137),
        "yoco": (3356, 2539, 1722, 975, 556, 318),
        "rins": (1582, 580, 234, 118, 96, 56),
        "yoco_u": (2410, 1966, 1419, 865, 514, 303),
    },
    "kv": {
        "transformer": (320, 640, 1280, 2560, 5120, 10_240),
        "yoco": (26, 42, 74, 138, 266, 522),
        "rins": (640, 1280, 2560, 5120, 10_240, 20_480),
        "yoco_u": (46, 62, 94, 158, 286, 542),
    },
}


def is_the_papers(config: ModelConfig) -> bool:
    """Whether the paper's figures are those of this model: of its sizes, loops and 2-byte type."""
    sizes = config.program.layers, config.d_model, config.num_kv_heads * config.head_dim
    same = (*sizes, config.window, config.num_experts) == (20, 2560, 512, 512, 0)
    loops = config.program == dataclasses.replace(config, num_loops=None).program
    return same and loops and compute_dtype(config).itemsize == 2


def paper(kind: str, architecture: str, config: ModelConfig, length: int) -> float | None:
    """The paper's figure, None where it has none for this model."""
    row = PAPER[kind].get(architecture)
    if row is None or length not in PAPER_LENGTHS or not is_the_papers(config):
        return None
    return row[PAPER_LENGTHS.index(length)]


AIM_LENGTH = 262_144
AIMS = (  # of the first over the second there, as `ratios` has them, at least the number
    ("prefill at least 10.2x the transformer's", "prefill", "yoco_u", "transformer", 10.2),
    ("decode at least 2.2x the transformer's", "decode", "yoco_u", "transformer", 2.2),
    ("KV cache 18.9x smaller than the transformer's", "kv", "yoco_u", "transformer", 10_240 / 542),
    ("decode within 5% of yoco's", "decode", "yoco_u", "yoco", 0.95),
)
AIMED = ("transformer", "yoco", "yoco_u")  # measured first at each length

# --- What is measured -----------------------------------------------------------------------------


class Sizes(NamedTuple):
    """What is measured on a kind of device.

    batch: most rows decoded at once. prefill_tokens: of one run, at least one row; chunk_tokens:
    of all rows of a chunk. steps: of a timed block of decode. A measurement is repeated `turns`
    times, or until it took enough_s.
    """

    lengths: tuple[int, ...]
    batch: int
    prefill_tokens: int
    chunk_tokens: int
    steps: int
    turns: int
    enough_s: float
    budget_s: float
    probe: benchmark_kernels.Sizes


ACCELERATOR = Sizes(
    lengths=(8192, 16_384, 65_536, 262_144),
    batch=32,
    prefill_tokens=32_768,
    chunk_tokens=16_384,
    steps=32,
    turns=3,
    enough_s=2.0,
    budget_s=400,  # what was begun before goes on: compiling one length, or 70 s of rins at 256K
    probe=benchmark_kernels.ACCELERATOR._replace(rounds=3),
)
CPU = Sizes(
    lengths=(1024, 2048, 4096, 8192, 16_384),
    batch=4,
    prefill_tokens=1,
    chunk_tokens=2048,
    steps=8,
    turns=5,
    enough_s=1.5,
    budget_s=300,
    probe=benchmark_kernels.CPU._replace(rounds=3),
)
# Stands in on a CPU. Narrow, so that attention is most of a long prompt's work, and wide enough in
# its feed-forward for yoco_u and the transformer to have equal FLOPs within the lengths: at 4.0K.
SMALL = {
    "num_layers": 4,
    "vocab_size": 512,
    "d_model": 192,
    "num_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 64,
    "d_ff": 1536,
    "window": 64,
    "num_experts": 0,
}
MOST_PARAMETERS_ON_A_CPU = 30_000_000
MEMORY_SHARE = 0.92  # the rest is for what `memory` does not count


class Cell(NamedTuple):
    """One thing to measure. length: of the prompt, or cached when the timed steps are done. piece:
    positions of a chunk of prefill, steps of a block of decode."""

    kind: str  # "prefill", "decode" or "kv"
    architecture: str
    config: ModelConfig
    length: int
    batch: int
    piece: int

    @property
    def capacity(self) -> int:
        """Whole chunks, or `prefill` writes its cache by a scatter."""
        return -(-self.length // self.piece) * self.piece if self.kind == "prefill" else self.length

    @property
    def tokens(self) -> int:
        return self.batch * (self.length if self.kind == "prefill" else self.piece)


@functools.cache
def abstract_model(config: ModelConfig) -> inference.Model:
    """Shapes and types of what `inference.prepare` returns."""
    params = nn.unbox(abstract_params(config))
    return jax.eval_shape(lambda params: inference.prepare(params, config), params)


@functools.cache
def abstract_cache(config: ModelConfig, batch: int, capacity: int) -> KVCache:
    """Shapes and types of what `inference.new_cache` returns."""
    new = functools.partial(inference.new_cache, batch=batch, capacity=capacity)
    return jax.eval_shape(new, abstract_model(config))


def memory(cell: Cell) -> int:
    """Bytes that the cell needs at once: parameters, caches, and activations by a rough rule."""
    c = cell.config
    width = (c.experts_per_token + c.num_shared_experts) * c.expert_width
    width = c.d_model + (width if c.num_experts else c.d_ff) + c.num_heads * c.head_dim
    positions = cell.batch * c.program.streams * (cell.piece if cell.kind == "prefill" else 1)
    scratch = 8 * positions * width * compute_dtype(c).itemsize + 4 * cell.batch * c.vocab_size
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract_model(c)))
    return weights + abstract_cache(c, cell.batch, cell.capacity).nbytes + scratch


def device_memory() -> float:
    """Bytes that jax may use, or most of what a host has left."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    return limit or 0.8 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def pairs(architectures) -> list[tuple[str, str]]:
    """What is compared with what: all with the transformer, and yoco_u with yoco."""
    found = [(name, "transformer") for name in architectures if name != "transformer"]
    found = found if "transformer" in architectures else []
    return found + [("yoco_u", "yoco")] * ({"yoco_u", "yoco"} <= set(architectures))


def cells_at(
    length: int, configs: dict[str, ModelConfig], sizes: Sizes, room: float
) -> tuple[list[Cell], list[dict]]:
    """The cells of one length, those that the aims need first, each with its batch halved until it
    fits into MEMORY_SHARE of `room` bytes; and rows of those of which not even one row fits."""
    found, left_out = [], []
    prompts = max(1, min(sizes.batch, sizes.prefill_tokens // length))
    chunk = min(length, max(1, sizes.chunk_tokens // prompts))
    for kind, rows, piece in (("prefill", prompts, chunk), ("decode", sizes.batch, sizes.steps)):
        fitting = {}
        for name, config in configs.items():
            cell = Cell(kind, name, config, length, rows, piece)
            while memory(cell) > MEMORY_SHARE * room and cell.batch > 1:
                cell = cell._replace(batch=cell.batch // 2)
            if memory(cell) <= MEMORY_SHARE * room:
                fitting[name] = cell
                continue
            reason = f"a row takes {memory(cell) / 2**30:.1f} of {room / 2**30:.1f} GiB"
            left_out.append(_row(cell, "no memory", reason))
        found += fitting.values()
        for pair in pairs(fitting):
            common = min(fitting[name].batch for name in pair)
            found += [fitting[name]._replace(batch=common) for name in pair]
    return sorted(dict.fromkeys(found), key=lambda cell: cell.architecture not in AIMED), left_out


# --- Measuring ------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _noise(seed, mean, std, *, shape, dtype):
    """Normal random values; the rows of a cache [B, S, K, H] are alike: drawing takes time."""
    drawn = (1, *shape[1:]) if len(shape) == 4 else shape
    values = mean + std * jax.random.normal(jax.random.key(seed), drawn)
    return jnp.broadcast_to(values, shape).astype(dtype)


def random_like(tree, std: float):
    """The tree with random values for its shapes (scales of norms: near 1)."""
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    leaves = []
    for seed, (path, x) in enumerate(paths):
        mean = float("'scale'" in jax.tree_util.keystr(path))
        leaves.append(_noise(seed, mean, std, shape=x.shape, dtype=x.dtype))
    return jax.tree.unflatten(structure, leaves)


@functools.partial(jax.jit, donate_argnames="cache", static_argnames="steps")
def decode_block(model, cache, tokens, start, *, steps):
    """`steps` greedy steps behind `start` cached positions of every row: the cache, next tokens."""

    def step(_, carry):
        cache, tokens = carry
        cache, logits = inference.decode_step(model, cache, tokens)
        return cache, jnp.argmax(logits, axis=-1).astype(jnp.int32)

    cache = cache.replace(lengths=jnp.full_like(cache.lengths, start))
    return jax.lax.fori_loop(0, steps, step, (cache, tokens))


def lowered(cell: Cell) -> list[jax.stages.Lowered]:
    """The large programs of a cell, with the arguments that they are called with: once they are
    compiled, jax finds them again (a test makes sure)."""
    shape, config, B = jax.ShapeDtypeStruct, cell.config, cell.batch
    model, cache = abstract_model(config), abstract_cache(config, B, cell.capacity)
    rows, scalar = shape((B,), jnp.int32), shape((), jnp.int32)
    if cell.kind == "decode":
        return [decode_block.lower(model, cache, rows, scalar, steps=cell.piece)]
    last = shape((config.program.streams * B, 1, config.d_model), compute_dtype(config))
    args = model, cache, last, shape((B, cell.piece), jnp.int32), rows, scalar
    return [
        inference._prefill_chunk.lower(*args, whole=True, score=False),
        inference._next_logits.lower(model, cache, last),
    ]


def compile_ahead(cells: list[Cell]) -> dict[Cell, str]:
    """Compiles the programs of all cells, traced one after the other and compiled side by side.
    Returns the errors of those that cannot be compiled."""
    errors, futures = {}, []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for cell in cells:
            try:
                futures += [(cell, pool.submit(program.compile)) for program in lowered(cell)]
            except Exception as error:
                errors[cell] = benchmark_kernels.first_line(error)
    for cell, future in futures:
        if error := future.exception():
            errors[cell] = benchmark_kernels.first_line(error)
    return errors


def run_prefill(cell: Cell) -> float:
    """Seconds of one prefill of the cell's prompts, after one of their first chunk."""
    model = random_like(abstract_model(cell.config), std=0.02)
    shape = (cell.batch, cell.length)
    tokens = np.random.default_rng(0).integers(0, cell.config.vocab_size, shape).astype(np.int32)
    run = functools.partial(inference.prefill, model, capacity=cell.capacity, chunk=cell.piece)
    jax.block_until_ready(run(tokens[:, : cell.piece]))
    start = time.perf_counter()
    jax.block_until_ready(run(tokens))
    return time.perf_counter() - start


def run_decode(cell: Cell) -> float:
    """Seconds of one block of decode steps, the last of which fills the cell's length, after the
    same block for practice."""
    model = random_like(abstract_model(cell.config), std=0.02)
    cache = random_like(abstract_cache(cell.config, cell.batch, cell.capacity), std=1.0)
    tokens, begin = jnp.zeros((cell.batch,), jnp.int32), np.int32(cell.length - cell.piece)
    cache, tokens = decode_block(model, cache, tokens, begin, steps=cell.piece)
    jax.block_until_ready((cache, tokens))
    start = time.perf_counter()
    jax.block_until_ready(decode_block(model, cache, tokens, begin, steps=cell.piece))
    return time.perf_counter() - start


RUN = {"prefill": run_prefill, "decode": run_decode}


def _row(cell: Cell, status: str, reason: str | None = None) -> dict[str, Any]:
    """status: measured, failed, "no time" or "no memory" (the last three with a reason)."""
    row = {key: value for key, value in cell._asdict().items() if key != "config"}
    row |= {"status": status, "reason": reason}
    return row | {"paper": paper(cell.kind, cell.architecture, cell.config, cell.length)}


def _measured(cell: Cell, samples: list[float], copy: float) -> dict[str, Any]:
    """copy: bytes/s of the device's own copy."""
    seconds, config = statistics.median(samples), cell.config
    row = _row(cell, "measured") | {
        "seconds": seconds,
        "spread": (max(samples) - min(samples)) / seconds,
        "samples": len(samples),
        "tokens_per_s": cell.tokens / seconds,
    }
    if cell.kind == "prefill":
        return row | {"flops_per_token": accounting.prefill_flops_per_token(config, cell.length)}
    context, itemsize = cell.length - cell.piece // 2, compute_dtype(config).itemsize
    read = accounting.decode_bytes_per_step(config, cell.batch, context, itemsize)
    rate = read * cell.piece / seconds
    return row | {"gb_per_step": read / 1e9, "gb_per_s": rate / 1e9, "of_copy": rate / copy}


def measure_cells(
    groups: list[list[Cell]],
    sizes: Sizes,
    copy: float,
    deadline: float,
    keep: Callable[[list[dict]], None] = lambda rows: None,
) -> list[dict]:
    """A row for each cell of the groups, one per length, whose programs are compiled together.

    The cells take turns, so that a machine's slow minutes fall on all of them, and all have a first
    sample before any has a second. A cell that fails, for lack of memory say, fails alone. No run
    is begun after the deadline (of time.perf_counter). keep: given the rows so far.
    """
    samples: dict[Cell, list[float]] = {cell: [] for group in groups for cell in group}
    ended: dict[Cell, dict] = {}

    def rows():
        return [
            _measured(cell, taken, copy) if taken else ended[cell]
            for cell, taken in samples.items()
            if taken or cell in ended
        ]

    for turn, group in itertools.product(range(sizes.turns), groups):
        if not turn and time.perf_counter() < deadline:
            print(f"N = {group[0].length}: compiling", file=sys.stderr)
            errors = compile_ahead(group)
            ended |= {cell: _row(cell, "failed", error) for cell, error in errors.items()}
        for cell in group:
            taken = samples[cell]
            if cell in ended or sum(taken) >= sizes.enough_s:
                continue
            if time.perf_counter() >= deadline:
                if not taken:
                    ended[cell] = _row(cell, "no time", "the budget was spent")
                continue
            try:
                taken.append(RUN[cell.kind](cell))
            except Exception as error:
                ended[cell] = _row(cell, "failed", benchmark_kernels.first_line(error))
            if not turn:
                speed = f"{cell.tokens / taken[0]:,.0f} tokens/s" if taken else "failed"
                label = f"{cell.kind}, {cell.architecture}, B = {cell.batch}"
                print(f"N = {cell.length}: {label}: {speed}", file=sys.stderr)
        keep(rows())
    return rows()


@contextlib.contextmanager
def attention_choices():
    """The records that say on which implementation each attention runs, and why."""
    logger, handler = api.logger, logging.handlers.BufferingHandler(1000)
    api._log_once.cache_clear()  # what was traced before to learn shapes is not measured
    logger.addHandler(handler)
    level, logger.propagate = logger.level, False
    logger.setLevel(logging.INFO)
    try:
        yield handler.buffer
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = True


def measure(
    configs: dict[str, ModelConfig],
    sizes: Sizes,
    budget_s: float,
    keep: Callable[[dict], None] = lambda report: None,
) -> dict[str, Any]:
    """Everything that fits into the budget, as the report that is shown, drawn and written. keep:
    given the report as it is after each length."""
    start = time.perf_counter()
    base = benchmark_kernels.measure_device(sizes.probe)
    room = device_memory()
    plan = [cells_at(length, configs, sizes, room) for length in sizes.lengths]
    # What the aims are about first, while there is time.
    groups = sorted([c for c, _ in plan if c], key=lambda cells: cells[0].length != AIM_LENGTH)
    known = [row for _, left_out in plan for row in left_out] + kv_rows(configs, sizes.lengths)
    config = next(iter(configs.values()))

    def report(measured):
        rows = known + measured
        found = {
            "device": jax.devices()[0].device_kind,
            "memory_gib": room / 2**30,
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            "versions": benchmark_kernels.versions(),
            "dtype": str(compute_dtype(config)),
            "model": {k: v for k, v in dataclasses.asdict(config).items() if k in SMALL},
            "programs": {name: str(config.program) for name, config in configs.items()},
            "parameters": {n: accounting.parameters(c)["total"] for n, c in configs.items()},
            "attention": [choice.getMessage() for choice in choices],
            "reference": base,
            "lengths": list(sizes.lengths),
            "budget_s": budget_s,
            "seconds": time.perf_counter() - start,
            "papers_model": is_the_papers(config),
            "rows": rows,
            "ratios": ratios(rows, list(configs)),
        }
        return found | {"findings": findings(found), "aims": aims(found)}

    with attention_choices() as choices:
        copy, deadline = base["copy_gb_per_s"] * 1e9, start + budget_s
        measured = measure_cells(groups, sizes, copy, deadline, lambda rows: keep(report(rows)))
        return report(measured)


def kv_rows(configs: dict[str, ModelConfig], lengths) -> list[dict]:
    """Bytes of the arrays of one sequence's cache, in MiB."""
    cells = [Cell("kv", name, c, n, 1, n) for n in lengths for name, c in configs.items()]
    return [
        _row(cell, "measured")
        | {"mib": abstract_cache(cell.config, 1, cell.length).nbytes / accounting.MIB}
        for cell in cells
    ]


# --- What it says ---------------------------------------------------------------------------------


def ratios(rows: list[dict], architectures: list[str]) -> list[dict]:
    """How many times better `of` is than `to`: tokens/s, or for kv the bytes of `to` over those of
    `of`, at the largest batch that both have. expected: by FLOPs for prefill, by the bytes of a
    step for decode."""
    measured = [row for row in rows if row["status"] == "measured"]
    measured.sort(key=lambda row: row["batch"])  # so that the largest one comes to stay
    keys = "kind", "architecture", "length", "batch"
    by_key = {tuple(row[key] for key in keys): row for row in measured}
    found = {}
    for of, to in pairs(architectures):
        for (kind, name, length, batch), mine in by_key.items():
            other = by_key.get((kind, to, length, batch))
            if name != of or other is None:
                continue
            a, b = (other, mine) if kind == "kv" else (mine, other)
            ratio = {"kind": kind, "of": of, "to": to, "length": length, "batch": batch}
            ratio["value"] = a[VALUE[kind]] / b[VALUE[kind]]
            ratio["expected"] = other[COST[kind]] / mine[COST[kind]] if kind in COST else None
            ratio["paper"] = a["paper"] / b["paper"] if a["paper"] and b["paper"] else None
            found[kind, of, to, length] = ratio
    return list(found.values())


def ratios_of(report: dict, kind: str, of: str, to: str) -> dict[int, dict]:
    """By length."""
    wanted = kind, of, to
    return {r["length"]: r for r in report["ratios"] if (r["kind"], r["of"], r["to"]) == wanted}


def curve(report: dict, kind: str, architecture: str) -> dict[int, dict]:
    """The rows by length; where there are several, that of the largest batch that was measured."""
    rows = [r for r in report["rows"] if (r["kind"], r["architecture"]) == (kind, architecture)]
    rows.sort(key=lambda row: (row["status"] == "measured", row["batch"]))
    found = {row["length"]: row for row in rows}
    return {length: found[length] for length in sorted(found)}


def speeds(report: dict, kind: str, architecture: str) -> dict[int, float]:
    """What was measured of the curve."""
    rows = curve(report, kind, architecture).items()
    return {n: row[VALUE[kind]] for n, row in rows if row["status"] == "measured"}


def crossings(lengths, ratio) -> list[float]:
    """Lengths where the ratio passes 1, linear in the logarithms between neighbours."""
    found = []
    x, y = np.log(lengths), np.log(ratio)
    for i in range(len(x) - 1):
        if (y[i] < 0) != (y[i + 1] < 0):
            share = y[i] / (y[i] - y[i + 1])
            found.append(float(np.exp(x[i] + share * (x[i + 1] - x[i]))))
    return found


def exponent(lengths, seconds) -> float:
    """The slope of log seconds in log length, by least squares."""
    return float(np.polyfit(np.log(lengths), np.log(seconds), 1)[0])


def findings(report: dict) -> list[str]:
    """Sentences: where yoco_u is slower, where the curves cross, how prefill grows, the noise."""
    said = []
    for kind, cost in (("prefill", "FLOPs"), ("decode", "bytes")):
        found = dict(sorted(ratios_of(report, kind, "yoco_u", "transformer").items()))
        slower = [f"{n} ({r['value']:.2f}x)" for n, r in found.items() if r["value"] < 1]
        if found:
            where = f"N = {', '.join(slower)}" if slower else "none of these lengths"
            said.append(f"yoco_u's {kind} is slower than the transformer's at {where}.")
            measured, expected = (
                [f"{n:,.0f}" for n in crossings(list(found), [r[key] for r in found.values()])]
                for key in ("value", "expected")
            )
            said.append(
                f"Their curves of {kind} cross at N = {' and '.join(measured) or 'none of these'} "
                f"(interpolated; {cost} are equal at {' and '.join(expected) or 'none of these'})."
            )
    for name in report["programs"]:
        speed = speeds(report, "prefill", name)
        lengths, seconds = list(speed), [n / rate for n, rate in speed.items()]
        if len(speed) > 1:
            said.append(
                f"Prefill time of {name} per prompt grows as N^{exponent(lengths, seconds):.2f}, "
                f"over the last two lengths as N^{exponent(lengths[-2:], seconds[-2:]):.2f}; its "
                f"slowest tokens/s are {min(speed.values()) / max(speed.values()):.2f} of its "
                "fastest."
            )
    spreads = [row["spread"] for row in report["rows"] if row.get("samples", 1) > 1]
    if spreads:
        said.append(
            f"Noise: samples of a measurement lie {statistics.median(spreads):.0%} apart, at most "
            f"{max(spreads):.0%}: (max - min) / median."
        )
    return said


def aims(report: dict) -> list[dict]:
    """Each aim with reached, not reached or not measured."""
    said = []
    for text, kind, of, to, least in AIMS:
        found = ratios_of(report, kind, of, to).get(AIM_LENGTH)
        entry = {"aim": text, "least": least, "value": None, "verdict": "not measured"}
        if found and found["paper"]:  # the paper's model, then
            entry |= {key: found[key] for key in ("value", "expected", "paper", "batch")}
            entry["verdict"] = "reached" if found["value"] >= least else "not reached"
        said.append(entry)
    return said


def _aim_line(aim: dict) -> str:
    line = f"at 256K, {aim['aim']}: {aim['verdict']}"
    if aim["value"] is None:
        return line
    by = f"; FLOPs or bytes alone give {aim['expected']:.2f}" if aim["expected"] else ""
    return f"{line} ({aim['value']:.3g}, B = {aim['batch']}{by})"


def _cell(row: dict) -> str:
    """A measurement beside the paper's figure."""
    beside = f" [{row['paper']:,}]" if row["paper"] else ""
    if row["status"] != "measured":
        return row["status"] + beside
    if row["kind"] == "kv":
        return f"{row['mib']:,.6g}{beside}"
    text = f"{row['tokens_per_s']:,.0f}{beside}"
    if row["kind"] == "decode":
        text += f"\nB={row['batch']} {row['gb_per_s']:,.1f} GB/s {row['of_copy']:.0%}"
    return text


def _ratio_cell(ratio: dict | None) -> str:
    if ratio is None:
        return "-"
    expected = f" ({ratio['expected']:.2f})" if ratio["expected"] else ""
    beside = f" [{ratio['paper']:.2f}]" if ratio["paper"] else ""
    rows = f"\nB={ratio['batch']}" if ratio["kind"] == "decode" else ""
    return f"{ratio['value']:.2f}{expected}{beside}{rows}"


def _short(n: int) -> str:
    return f"{n // 1024}K" if n % 1024 == 0 else str(n)


TITLES = {
    "prefill": "prefill: tokens/s; ratios (by FLOPs)",
    "decode": "decode: tokens/s of all rows; batch, GB/s, share of a copy's; ratios (by bytes)",
    "kv": "KV cache: MiB per sequence; how many times smaller",
}


def tables(report: dict) -> list[Table]:
    """One per kind, a line per length."""
    names, found = list(report["programs"]), []
    beside = "; in brackets the paper's, H100" if report["papers_model"] else ""
    for kind, title in TITLES.items():
        headers = [f"{of} /\n{to}" for of, to in pairs(names)]
        table = Table("N", *names, *headers, title=title + beside, title_justify="left")
        columns = [curve(report, kind, name) for name in names]
        compared = [ratios_of(report, kind, *pair) for pair in pairs(names)]
        for length in report["lengths"]:
            cells = [_cell(column[length]) for column in columns]
            cells += [_ratio_cell(column.get(length)) for column in compared]
            table.add_row(_short(length), *cells)
        found.append(table)
    return found


def show(report: dict, console: Console) -> None:
    base = report["reference"]
    n, versions = base["matmul_size"], ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    lines = [
        *report.get("notes", []),
        f"{report['device']}, {report['date']}, {report['dtype']}, {versions}",
        f"copy {base['copy_gb_per_s']:,.0f} GB/s, {n} x {n} product {base['matmul_tflops']:.3g} "
        f"TFLOP/s; {report['memory_gib']:.0f} GiB; {report['seconds']:.0f} s in all",
        "model: " + ", ".join(f"{k} {v}" for k, v in report["model"].items()),
        *(
            f"{name} = {program}, {report['parameters'][name] / 1e6:,.1f}M parameters"
            for name, program in report["programs"].items()
        ),
        *report["attention"],
    ]
    for line in lines:
        console.print(line, markup=False)
    for table in tables(report):
        console.print(table)
    for row in report["rows"]:
        if row["status"] != "measured":
            where = f"{row['kind']}, {row['architecture']}, N = {row['length']}, B = {row['batch']}"
            console.print(f"{row['status']}: {where}: {row['reason']}", markup=False)
    for line in report["findings"] + [_aim_line(aim) for aim in report["aims"]]:
        console.print(line, markup=False)


def plot(report: dict, path: Path) -> None:
    """Three panels against the length, log axes; the paper's as dashed lines for its own model."""
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    for axes, (kind, title) in zip(figure.subplots(1, 3), TITLES.items(), strict=True):
        for i, name in enumerate(report["programs"]):
            points = speeds(report, kind, name)
            axes.plot(list(points), list(points.values()), "o-", color=f"C{i}", label=name)
            rows = curve(report, kind, name).items()
            known = {n: row["paper"] for n, row in rows if row["paper"]}
            axes.plot(list(known), list(known.values()), "--", color=f"C{i}", alpha=0.6)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(report["lengths"], [_short(n) for n in report["lengths"]])
        axes.set_xlabel("prompt, tokens")
        axes.set_title(title.split(";")[0])
        axes.grid(alpha=0.3)
    dashed = "; dashed: the paper's, H100" if report["papers_model"] else ""
    figure.suptitle(f"{report['device']}, {report['dtype']}{dashed}")
    figure.axes[0].legend()
    figure.savefig(path, dpi=120)


# --- The command ----------------------------------------------------------------------------------


def choose_configs(
    config: ModelConfig, architectures: list[str], on_cpu: bool
) -> tuple[dict[str, ModelConfig], list[str]]:
    """A config per architecture, and notes on what was replaced.

    Raises:
      UserError: an architecture that is not in the table, or does not go with these layers.
    """
    unknown = [name for name in architectures if name not in ARCHITECTURES]
    if unknown or not architectures:
        raise UserError(
            f"--architectures={','.join(architectures)} must be some of {', '.join(ARCHITECTURES)}."
        )
    notes = []
    size = accounting.parameters(config)["total"]
    if on_cpu and size > MOST_PARAMETERS_ON_A_CPU:
        config = dataclasses.replace(config, architecture="yoco_u", **SMALL)
        notes.append(
            f"This CPU is too slow for a model of {size / 1e6:,.0f}M parameters: one of "
            f"{accounting.parameters(config)['total'] / 1e6:,.1f}M with the same kinds of programs "
            "stands in. Its figures are not those of the config."
        )
    return {name: accounting.sibling(config, name) for name in architectures}, notes


def check_lengths(lengths: list[str], steps: int) -> tuple[int, ...]:
    """The lengths as numbers, in order.

    Raises:
      UserError: no whole numbers, or too short for a prompt and the steps that are timed.
    """
    if not lengths or not all(n.isdecimal() and len(n) < 10 and int(n) > steps for n in lengths):
        raise UserError(
            f"--lengths={','.join(lengths)} must be whole numbers above {steps}, the number of "
            "decode steps that are timed."
        )
    return tuple(sorted({int(n) for n in lengths}))


def _file(flag: str, value: str | None, kinds: Iterable[str]) -> Path | None:
    path = None if value is None else resolve(value)
    if path is not None and (not path.parent.is_dir() or path.suffix[1:] not in kinds):
        raise UserError(
            f"--{flag}={value} must be a file in a folder that exists, of one of the kinds "
            f"{', '.join(sorted(kinds))}."
        )
    return path


def main(_):
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu:
        cli.keep_freed_memory()
    sizes = CPU if on_cpu else ACCELERATOR
    config = Config.from_dict(CONFIG.value).model
    configs, notes = choose_configs(config, ARCHITECTURE_NAMES.value, on_cpu)
    # Before minutes of measuring.
    plot_path = _file("plot", PLOT.value, Figure().canvas.get_supported_filetypes())
    out_path = _file("out", OUT.value, ("json",))
    sizes = sizes._replace(
        batch=BATCH.value or sizes.batch,
        lengths=check_lengths(LENGTHS.value or list(map(str, sizes.lengths)), sizes.steps),
    )

    def keep(report):
        if out_path is not None:
            write_atomically(out_path, json.dumps(report | {"notes": notes}, indent=1) + "\n")

    budget_s = sizes.budget_s if BUDGET.value is None else BUDGET.value
    report = measure(configs, sizes, budget_s, keep) | {"notes": notes}
    keep(report)
    if JSON.value:
        print(json.dumps(report))
    else:
        show(report, Console(width=None if Console().is_terminal else 160))
    if plot_path is not None:
        plot(report, plot_path)
    return 1 if any(row["status"] == "failed" for row in report["rows"]) else 0


if __name__ == "__main__":
    # Not above: absl knows a flag once, and the tests import several commands.
    CONFIG = cli.config_file("configs/yocou_1b.py", "Sizes to profile.")
    LENGTHS = flags.DEFINE_list(
        "lengths", None, "Prompt lengths; 8192,16384,65536,262144, on a CPU 1024 to 16384."
    )
    ARCHITECTURE_NAMES = flags.DEFINE_list(
        "architectures",
        ["transformer", "yoco", "rins", "yoco_u"],
        "Which to measure, of program.ARCHITECTURES.",
    )
    BATCH = flags.DEFINE_integer(
        "batch", None, "Most rows decoded at once; 32, on a CPU 4.", lower_bound=1
    )
    JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of tables.")
    OUT = flags.DEFINE_string(
        "out", None, "A .json that has all numbers so far, also if cut short."
    )
    PLOT = flags.DEFINE_string("plot", None, "File for the three curves, a PNG or PDF say.")
    BUDGET = flags.DEFINE_float(
        "budget_s", None, "Seconds after which nothing more is begun; 400, on a CPU 300."
    )
    cli.run(main)
