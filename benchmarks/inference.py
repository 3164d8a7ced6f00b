"""Prefill, decode and KV cache against the length of the prompt, architecture by architecture.

`measure` makes one report with all that was measured, `comparison` says what it means.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import logging.handlers
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import cases, comparison, device, paper, timing
from pallas_kernels import api
from yocou_jax import accounting, inference
from yocou_jax.config import ModelConfig
from yocou_jax.errors import UserError
from yocou_jax.model import Compute, abstract_params
from yocou_jax.model.memory import Memory
from yocou_jax.program import ARCHITECTURES

# --- What is measured -----------------------------------------------------------------------------


class Sizes(NamedTuple):
    """What is measured on a kind of device.

    lengths: of the prompts. batch: the largest number of rows that are decoded at once.
    prefill_tokens: how many tokens one prefill reads in all rows; it has at least one row.
    chunk_tokens: the tokens of one chunk in all rows. steps: how many steps of decode are timed
    together. A measurement is repeated `turns` times, or until it took enough_s.
    """

    lengths: tuple[int, ...]
    batch: int
    prefill_tokens: int
    chunk_tokens: int
    steps: int
    turns: int
    enough_s: float
    budget_s: float
    probe: cases.Sizes


ACCELERATOR = Sizes(
    lengths=(8192, 16_384, 65_536, 262_144),
    batch=32,
    prefill_tokens=32_768,
    chunk_tokens=16_384,
    steps=32,
    turns=3,
    enough_s=2.0,
    budget_s=400,  # a measurement that has begun may end later: rins at 256K takes 70 s
    probe=cases.ACCELERATOR._replace(rounds=3),
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
    probe=cases.CPU._replace(rounds=3),
)
# The model that is measured on a CPU. It is narrow, so that attention is most of the work for a
# long prompt. Its feed-forward is so wide that yoco_u and the transformer have equal FLOPs at a
# length between the measured ones: at 4.0K.
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
MEMORY_SHARE = 0.92  # `memory` does not count all that is needed


class Cell(NamedTuple):
    """One thing to measure. length: of the prompt; for decode, how many positions are cached after
    the timed steps. piece: positions of a chunk of prefill, or steps of decode that are timed
    together."""

    kind: str  # "prefill", "decode" or "kv"
    architecture: str
    config: ModelConfig
    length: int
    batch: int
    piece: int
    compute: Compute

    @property
    def capacity(self) -> int:
        """Slots of the cache. Prefill gets room for whole chunks, else it would write its cache
        with a scatter."""
        return -(-self.length // self.piece) * self.piece if self.kind == "prefill" else self.length

    @property
    def tokens(self) -> int:
        return self.batch * (self.length if self.kind == "prefill" else self.piece)


@functools.cache
def abstract_model(config: ModelConfig, compute: Compute) -> inference.PreparedModel:
    """Shapes and types of what `inference.prepare` returns."""
    params = nn.unbox(abstract_params(config))
    return jax.eval_shape(lambda params: inference.prepare(params, config, compute), params)


@functools.cache
def abstract_memory(config: ModelConfig, compute: Compute, batch: int, capacity: int) -> Memory:
    """Shapes and types of what `inference.new_memory` returns."""
    new = functools.partial(inference.new_memory, batch=batch, capacity=capacity)
    return jax.eval_shape(new, abstract_model(config, compute))


def memory(cell: Cell) -> int:
    """Bytes that the cell needs: parameters, caches, and a rough estimate of activations."""
    c = cell.config
    width = (c.experts_per_token + c.num_shared_experts) * c.expert_width
    width = c.d_model + (width if c.num_experts else c.d_ff) + c.num_heads * c.head_dim
    positions = cell.batch * c.program.streams * (cell.piece if cell.kind == "prefill" else 1)
    scratch = 8 * positions * width * cell.compute.dtype.itemsize + 4 * cell.batch * c.vocab_size
    weights = sum(
        x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract_model(c, cell.compute))
    )
    return weights + abstract_memory(c, cell.compute, cell.batch, cell.capacity).nbytes + scratch


def device_memory() -> float:
    """Bytes that jax may use. If jax does not say, 80% of the host's free memory."""
    return device.memory() or 0.8 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def cells_at(
    length: int,
    configs: dict[str, ModelConfig],
    sizes: Sizes,
    room: float,
    compute: Compute,
) -> tuple[list[Cell], list[dict]]:
    """The cells of one length; those that the aims need come first. The batch of a cell is halved
    until the cell fits into MEMORY_SHARE of `room` bytes. The second list has a row of the report
    for each cell that does not fit even with a batch of one."""
    found, left_out = [], []
    prompts = max(1, min(sizes.batch, sizes.prefill_tokens // length))
    chunk = min(length, max(1, sizes.chunk_tokens // prompts))
    for kind, rows, piece in (("prefill", prompts, chunk), ("decode", sizes.batch, sizes.steps)):
        fitting = {}
        for name, config in configs.items():
            cell = Cell(kind, name, config, length, rows, piece, compute)
            while memory(cell) > MEMORY_SHARE * room and cell.batch > 1:
                cell = cell._replace(batch=cell.batch // 2)
            if memory(cell) <= MEMORY_SHARE * room:
                fitting[name] = cell
                continue
            reason = f"one sequence takes {memory(cell) / 2**30:.1f} of {room / 2**30:.1f} GiB"
            left_out.append(_row(cell, "no memory", reason))
        found += fitting.values()
        for pair in comparison.pairs(fitting):
            common = min(fitting[name].batch for name in pair)
            found += [fitting[name]._replace(batch=common) for name in pair]
    return sorted(
        dict.fromkeys(found), key=lambda cell: cell.architecture not in paper.AIMED
    ), left_out


# --- Measuring ------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _noise(seed, mean, std, *, shape, dtype):
    """Normal random values. All rows of a cache [B, S, K, H] are equal, because it takes long to
    draw them."""
    drawn = (1, *shape[1:]) if len(shape) == 4 else shape
    values = mean + std * jax.random.normal(jax.random.key(seed), drawn)
    return jnp.broadcast_to(values, shape).astype(dtype)


def random_like(tree, std: float):
    """Random values with the shapes and types of the tree; the scales of norms are near 1."""
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    leaves = []
    for seed, (path, x) in enumerate(paths):
        mean = float("'scale'" in jax.tree_util.keystr(path))
        leaves.append(_noise(seed, mean, std, shape=x.shape, dtype=x.dtype))
    return jax.tree.unflatten(structure, leaves)


@functools.partial(jax.jit, donate_argnames="cache", static_argnames="steps")
def decode_block(model, cache, tokens, start, *, steps):
    """Decodes `steps` tokens greedily after `start` cached positions in every row. tokens [B],
    int32: the first ones. Returns the cache and the next tokens [B]."""

    def step(_, carry):
        cache, tokens = carry
        cache, logits = inference.decode_step(model, cache, tokens)
        return cache, jnp.argmax(logits, axis=-1).astype(jnp.int32)

    cache = cache.replace(lengths=jnp.full_like(cache.lengths, start))
    return jax.lax.fori_loop(0, steps, step, (cache, tokens))


def lowered(cell: Cell) -> list[jax.stages.Lowered]:
    """The large programs of a cell, lowered for the arguments that they will get. After they are
    compiled here, jax does not compile them again in the measurement (a test checks it)."""
    B, model = cell.batch, abstract_model(cell.config, cell.compute)
    if cell.kind == "prefill":
        programs = inference.programs(model, B, cell.capacity, cell.piece)
        return [programs[name]() for name in ("prefill_chunk", "next_logits")]
    kept = abstract_memory(cell.config, cell.compute, B, cell.capacity)
    rows, scalar = jax.ShapeDtypeStruct((B,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    return [decode_block.lower(model, kept, rows, scalar, steps=cell.piece)]


def compile_ahead(cells: list[Cell]) -> dict[Cell, str]:
    """Traces the programs of all cells one after the other, and compiles them in parallel. Returns
    the error of each cell with a program that cannot be compiled."""
    errors, futures = {}, []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for cell in cells:
            try:
                futures += [(cell, pool.submit(program.compile)) for program in lowered(cell)]
            except Exception as error:
                errors[cell] = timing.first_line(error)
    for cell, future in futures:
        if error := future.exception():
            errors[cell] = timing.first_line(error)
    return errors


def run_prefill(cell: Cell) -> float:
    """Seconds of one prefill of the cell's prompts, after a prefill of one chunk, to warm up."""
    model = random_like(abstract_model(cell.config, cell.compute), std=0.02)
    shape = (cell.batch, cell.length)
    tokens = np.random.default_rng(0).integers(0, cell.config.vocab_size, shape).astype(np.int32)
    run = functools.partial(inference.prefill, model, capacity=cell.capacity, chunk=cell.piece)
    jax.block_until_ready(run(tokens[:, : cell.piece]))
    start = time.perf_counter()
    jax.block_until_ready(run(tokens))
    return time.perf_counter() - start


def run_decode(cell: Cell) -> float:
    """Seconds of one block of decode steps. After its last step, `length` positions are cached. To
    warm up, the same block runs once before."""
    model = random_like(abstract_model(cell.config, cell.compute), std=0.02)
    cache = random_like(
        abstract_memory(cell.config, cell.compute, cell.batch, cell.capacity), std=1.0
    )
    tokens, begin = jnp.zeros((cell.batch,), jnp.int32), np.int32(cell.length - cell.piece)
    cache, tokens = decode_block(model, cache, tokens, begin, steps=cell.piece)
    jax.block_until_ready((cache, tokens))
    start = time.perf_counter()
    jax.block_until_ready(decode_block(model, cache, tokens, begin, steps=cell.piece))
    return time.perf_counter() - start


RUN = {"prefill": run_prefill, "decode": run_decode}


def _row(cell: Cell, status: str, reason: str | None = None) -> dict[str, Any]:
    """status: measured, failed, "no time" or "no memory" (the last three with a reason)."""
    row = {key: value for key, value in cell._asdict().items() if key not in ("config", "compute")}
    row |= {"status": status, "reason": reason}
    known = (cell.kind, cell.architecture, cell.config, cell.length)
    return row | {"paper": paper.figure(*known, cell.compute.dtype.itemsize)}


def _measured(cell: Cell, samples: list[float], copy: float) -> dict[str, Any]:
    """copy: bytes/s of the device's own copy."""
    row, config = _row(cell, "measured") | timing.summary(samples), cell.config
    seconds = row["seconds"]
    row["tokens_per_s"] = cell.tokens / seconds
    if cell.kind == "prefill":
        return row | {"flops_per_token": accounting.prefill_flops_per_token(config, cell.length)}
    context, itemsize = cell.length - cell.piece // 2, cell.compute.dtype.itemsize
    read = accounting.decode_bytes_per_step(config, cell.batch, context, itemsize)
    rate = read * cell.piece / seconds
    return row | {"gb_per_step": read / 1e9, "gb_per_s": rate / 1e9, "of_copy": rate / copy}


def measure_cells(
    groups: list[list[Cell]],
    sizes: Sizes,
    copy: float,
    deadline: float,
    keep: Callable[[list[dict]], None] = lambda rows: None,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict]:
    """Measures all cells and returns a row for each. A group has the cells of one length; its
    programs are compiled together.

    The cells take turns, so that a machine's slow minutes affect all of them. Each has a first
    sample before any has a second. If a cell fails, for example because memory is missing, the
    others go on. No run begins after the deadline (of time.perf_counter). keep gets the rows so
    far; say gets a line about what is done.
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
            say(f"N = {group[0].length}: compiling")
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
                ended[cell] = _row(cell, "failed", timing.first_line(error))
            if not turn:
                speed = f"{cell.tokens / taken[0]:,.0f} tokens/s" if taken else "failed"
                label = f"{cell.kind}, {cell.architecture}, B = {cell.batch}"
                say(f"N = {cell.length}: {label}: {speed}")
        keep(rows())
    return rows()


@contextlib.contextmanager
def attention_choices():
    """The log records that name the implementation of each attention, with the reason."""
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
    compute: Compute,
    keep: Callable[[dict], None] = lambda report: None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measures all that fits into the time budget, and returns the report. keep gets the report so
    far after each length; say gets a line about what is done."""
    start = time.perf_counter()
    base = device.measure(sizes.probe)
    room = device_memory()
    plan = [cells_at(length, configs, sizes, room, compute) for length in sizes.lengths]
    # The length of the aims comes first, because the time may end before the others.
    groups = sorted(
        [c for c, _ in plan if c], key=lambda cells: cells[0].length != paper.AIM_LENGTH
    )
    known = [row for _, left_out in plan for row in left_out] + kv_rows(
        configs, sizes.lengths, compute
    )
    config = next(iter(configs.values()))

    def report(measured):
        rows = known + measured
        found = {
            "device": jax.devices()[0].device_kind,
            "memory_gib": room / 2**30,
            "date": device.today(),
            "versions": device.versions(),
            "dtype": str(compute.dtype),
            "model": {k: v for k, v in dataclasses.asdict(config).items() if k in SMALL},
            "programs": {name: str(config.program) for name, config in configs.items()},
            "parameters": {n: accounting.parameters(c).total for n, c in configs.items()},
            "attention": [choice.getMessage() for choice in choices],
            "reference": base,
            "lengths": list(sizes.lengths),
            "budget_s": budget_s,
            "seconds": time.perf_counter() - start,
            "papers_model": paper.is_the_papers(config, compute.dtype.itemsize),
            "rows": rows,
            "ratios": comparison.ratios(rows, list(configs)),
        }
        return found | {"findings": comparison.findings(found), "aims": comparison.aims(found)}

    with attention_choices() as choices:
        copy, deadline = base["copy_gb_per_s"] * 1e9, start + budget_s
        measured = measure_cells(
            groups, sizes, copy, deadline, lambda rows: keep(report(rows)), say
        )
        return report(measured)


def kv_rows(configs: dict[str, ModelConfig], lengths, compute: Compute) -> list[dict]:
    """Rows with the size of one sequence's cache, in MiB."""
    cells = [Cell("kv", name, c, n, 1, n, compute) for n in lengths for name, c in configs.items()]
    return [
        _row(cell, "measured")
        | {
            "mib": abstract_memory(cell.config, cell.compute, 1, cell.length).nbytes
            / accounting.MIB
        }
        for cell in cells
    ]


def choose_configs(
    config: ModelConfig, architectures: list[str], on_cpu: bool
) -> tuple[dict[str, ModelConfig], list[str]]:
    """A config per architecture, and notes for the reader, if another model is measured.

    Raises:
      UserError: an architecture is not in the table, or cannot have this number of layers.
    """
    unknown = [name for name in architectures if name not in ARCHITECTURES]
    if unknown or not architectures:
        raise UserError(
            f"--architectures={','.join(architectures)} must be some of {', '.join(ARCHITECTURES)}."
        )
    notes = []
    size = accounting.parameters(config).total
    if on_cpu and size > MOST_PARAMETERS_ON_A_CPU:
        config = dataclasses.replace(config, architecture="yoco_u", **SMALL)
        notes.append(
            f"This CPU is too slow for a model of {size / 1e6:,.0f}M parameters: one of "
            f"{accounting.parameters(config).total / 1e6:,.1f}M with the same kinds of programs "
            "is measured instead. Its figures are not those of the config."
        )
    return {name: accounting.sibling(config, name) for name in architectures}, notes


def check_lengths(lengths: list[str], steps: int) -> tuple[int, ...]:
    """The lengths as numbers, in order.

    Raises:
      UserError: they are not whole numbers, or not above the number of steps that are timed.
    """
    if not lengths or not all(n.isdecimal() and len(n) < 10 and int(n) > steps for n in lengths):
        raise UserError(
            f"--lengths={','.join(lengths)} must be whole numbers above {steps}, the number of "
            "decode steps that are timed."
        )
    return tuple(sorted({int(n) for n in lengths}))
