"""Measures every attention kernel on the device at hand against every baseline that it has.

    python -m experiments.benchmark_kernels [--json] [--out=results/kernels-...] [--budget_s=...]

First the errors, on fresh inputs: root mean square against a float32 reference on float32 inputs,
beside that of the same reference on rounded inputs; a kernel of ours whose error is over 1.5 times
that fails the command. Then times: forward, and forward with backward, of windows (W = 512) and of
global attention from 2K to 64K positions, with heads of 64 and 128, and decoding. TFLOP/s count
visible (query, key) pairs only: 4 H per pair and head forward, 10 H backward, and so 14 H for both.
Backward alone is derived: 10 H over the difference of the two times (a forward that is part of a
gradient also writes its log-sum-exp). GB/s of decoding count each valid key and value once, and are
printed with their share of the device's own copy bandwidth, which is measured in the same run, as
is a large matrix product. On a CPU: float32, small sizes, xla against dense.

How it is timed: one jitted loop makes `calls` calls that depend on one another, so that launching
from Python, which takes longer than a small kernel, is paid once in `calls`; between two calls a
single element of the next input is changed by a single element of every result, so no call can be
left out, hoisted or overlapped, and the inputs stay as random as they were (a GPU's clock depends
on the data). XLA may still bring an input into the layout that a call prefers once, before the
loop, as it does where a model produces that input. The loop is compiled and run once before, each
sample is waited for, all implementations of a case take turns, and medians are printed with the
spread (max - min) / median. What a turn of the loop takes without a call ("loop turn") is measured
too. No time has it subtracted; it matters where a call takes a few times as long, so decoding has
its times printed.

The table is written as kernels.json and kernels.md to --out (none on a CPU unless it is named),
again after each group of cases, so that a run that is cut short leaves what it has measured. What
the time budget left out is listed. Exit code 1: an implementation of ours failed or is not
accurate; baselines that fail are reported only.
"""

import concurrent.futures
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from experiments import cli
from pallas_kernels import api, reference
from pallas_kernels.device import target_device
from yocou_jax.errors import UserError
from yocou_jax.files import resolve, write_atomically

WINDOW = 512
ERROR_RATIO = 1.5  # of the reference's own error in the same dtype
DERIVED = "backward (derived)"  # from two passes that are measured
ERROR_OPERATIONS = api.OPERATIONS


class Sizes(NamedTuple):
    """What is measured on a kind of device. lengths are in the order of their importance, which
    the time budget goes by; tokens: B * N of a call, at least one row."""

    dtype: Any
    lengths: tuple[int, ...]
    tokens: int
    heads: tuple[int, int]  # query heads, key/value heads
    head_widths: tuple[int, ...]
    decode: tuple[tuple[int, int], ...]  # (B, S) of the global cache
    decode_ring: tuple[int, ...]  # B
    sample_s: float  # what one sample is meant to take
    rounds: int
    slowest_call_s: float  # no single call longer than this is tried
    dense_bytes: int  # nor a dense score matrix larger than this
    copy_bytes: int
    matmul: int
    error_length: int  # N and S of the calls whose errors are measured
    budget_s: float


ACCELERATOR = Sizes(
    dtype=jnp.bfloat16,
    lengths=(8192, 2048, 32_768, 16_384, 4096, 65_536),
    tokens=16_384,
    heads=(16, 4),
    head_widths=(128, 64),
    decode=((1, 131_072), (8, 131_072), (1, 32_768), (8, 32_768), (8, 8192)),
    decode_ring=(1, 8),
    sample_s=0.02,
    rounds=5,
    slowest_call_s=1.0,
    dense_bytes=8 << 30,
    copy_bytes=2 << 30,
    matmul=8192,
    error_length=2048,
    budget_s=420,
)
CPU = Sizes(
    dtype=jnp.float32,
    lengths=(1024, 2048, 4096),
    tokens=1,
    heads=(4, 2),
    head_widths=(64,),
    decode=((1, 4096), (4, 16_384)),
    decode_ring=(1, 8),
    sample_s=0.0,
    rounds=3,
    slowest_call_s=4.0,
    dense_bytes=1 << 30,
    copy_bytes=256 << 20,
    matmul=1024,
    error_length=512,
    budget_s=75,
)


class Case(NamedTuple):
    """One call, in the letters of pallas_kernels.api. N is 1 for decoding, which has no backward;
    `backward`: forward and backward together."""

    operation: str
    B: int
    N: int
    S: int
    Q: int
    K: int
    H: int
    window: int | None
    backward: bool = False

    @property
    def decodes(self) -> bool:
        return self.operation.startswith("decode")

    @property
    def pairs(self) -> int:
        """Visible pairs of query and key, of one head and row."""
        if self.decodes:
            return self.S
        W = min(self.window or self.N, self.N)
        return W * (W + 1) // 2 + (self.N - W) * W

    @property
    def flops(self) -> int:
        return (14 if self.backward else 4) * self.H * self.pairs * self.Q * self.B

    def bytes(self, itemsize: int) -> int:
        return 2 * self.B * self.S * self.K * self.H * itemsize

    @property
    def label(self) -> str:
        what = "forward + backward" if self.backward else "forward"
        return f"{self.operation}, B = {self.B}, S = {self.S}, H = {self.H}, {what}"


def cases(sizes: Sizes) -> list[list[Case]]:
    """Cases in groups that are compiled together, the most important ones first."""
    Q, K = sizes.heads
    groups = []
    for N in sizes.lengths:
        B = max(1, sizes.tokens // N)
        for H in sizes.head_widths:
            for operation, window in (("window_attention", WINDOW), ("cross_attention", None)):
                case = Case(operation, B, N, N, Q, K, H, window)
                groups.append([case, case._replace(backward=True)])
        if len(groups) == 2 * len(sizes.head_widths):  # right after the first length
            H = sizes.head_widths[0]
            rings = [Case("decode_window", B, 1, WINDOW, Q, K, H, None) for B in sizes.decode_ring]
            caches = [Case("decode_cross", B, 1, S, Q, K, H, None) for B, S in sizes.decode]
            groups += [group for group in (rings, caches) if group]
    return groups


# --- Who is measured ------------------------------------------------------------------------------


class Subject(NamedTuple):
    """call(q, k, v) -> out, or (q, k, v, lengths) -> out for decoding. dense: materialises the
    scores. ours: one of pallas_kernels that "auto" may take, which must not fail."""

    call: Callable
    ours: bool = False
    dense: bool = False


def _late(make: Callable[[Case], Callable], case: Case) -> Callable:
    """make(case), made when it is first called, where an error (an import, a mask that does not fit
    into memory) fails this one measurement and not the run."""

    @functools.cache
    def made():
        with jax.ensure_compile_time_eval():  # its constants belong to no trace
            return make(case)

    return lambda *args: made()(*args)


def _jax_nn(case: Case, implementation: str) -> Callable:
    attend = functools.partial(jax.nn.dot_product_attention, implementation=implementation)
    if case.decodes:

        def decode(q, k, v, lengths):
            return attend(q[:, None], k, v, key_value_seq_lengths=lengths)[:, 0]

        return decode
    window = None if case.window is None else (case.window - 1, 0)
    return functools.partial(attend, is_causal=True, local_window_size=window)


def _tokamax(case: Case) -> Callable:
    import tokamax

    window = None if case.window is None else (case.window - 1, 0)
    return functools.partial(
        tokamax.dot_product_attention, is_causal=True, local_window_size=window
    )


def _splash(case: Case) -> Callable:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape = (case.N, case.S)
    window = case.window
    mask = (
        splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), 0)
    )
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * case.Q), block_sizes=splash.BlockSizes(*[512] * 8)
    )

    def attend(q, k, v):
        heads_first = (x.swapaxes(1, 2) for x in (q * case.H**-0.5, k, v))
        return jax.vmap(kernel)(*heads_first).swapaxes(1, 2)

    return attend


def subjects(case: Case, dtype) -> dict[str, Subject]:
    """Everything that can run the case here: our implementations, then the baselines."""
    found, device = {}, target_device()
    shape = (case.B, case.Q, case.H) if case.decodes else (case.B, case.N, case.Q, case.H)
    call = api.Call(
        case.operation,
        device,
        q_shape=shape,
        k_shape=(case.B, case.S, case.K, case.H),
        dtype=jnp.dtype(dtype),
        window=case.window,
    )
    options = {} if case.decodes or case.window is None else {"window": case.window}
    operation = getattr(api, case.operation)
    for name in api.IMPLEMENTATIONS:
        if name != "auto" and api.unsupported_reason(name, call) is None:
            run = functools.partial(operation, implementation=name, **options)
            found[name] = Subject(run, name != "reference", name == "reference")
    found["jax.nn xla"] = Subject(_jax_nn(case, "xla"), dense=True)
    if device.platform == "gpu" and "cudnn" not in found:
        found["jax.nn cudnn"] = Subject(_jax_nn(case, "cudnn"))
    if not case.decodes and device.platform == "tpu":
        found["splash"] = Subject(_late(_splash, case))
    if not case.decodes and importlib.util.find_spec("tokamax") is not None:
        found["tokamax"] = Subject(_late(_tokamax, case))
    return found


def inputs(case: Case, dtype, seed: int) -> list[jax.Array]:
    """q, k, v and the gradient of the output, or q, the caches and full lengths."""
    keys = jax.random.split(jax.random.key(seed), 4)
    q_shape = (case.B, case.Q, case.H) if case.decodes else (case.B, case.N, case.Q, case.H)
    kv_shape = (case.B, case.S, case.K, case.H)
    shapes = [q_shape, kv_shape, kv_shape, q_shape]
    arrays = [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]
    if case.decodes:
        arrays[3] = jnp.full((case.B,), case.S, jnp.int32)
    return arrays


def results(case: Case, subject: Subject) -> Callable:
    """A function of `inputs` that gives all results of the case, by name."""

    def run(q, k, v, last):
        if case.decodes:
            return {"out": subject.call(q, k, v, last)}
        if not case.backward:
            return {"out": subject.call(q, k, v)}
        out, vjp = jax.vjp(subject.call, q, k, v)
        return {"out": out, **dict(zip(("dq", "dk", "dv"), vjp(last), strict=True))}

    return run


# --- Errors ---------------------------------------------------------------------------------------


def _rms(x, y) -> float:
    """Root mean square of x - y, relative to that of y."""
    x, y = (np.asarray(a, np.float64) for a in (x, y))
    return float(np.sqrt(np.mean(np.square(x - y)) / np.mean(np.square(y))))


def measure_errors(sizes: Sizes) -> list[dict]:
    """One entry per operation, head width, subject and result."""
    found = []
    Q, K = sizes.heads
    N, eps = sizes.error_length, float(jnp.finfo(sizes.dtype).eps)
    for H in sizes.head_widths:
        for operation in ERROR_OPERATIONS:
            window = N // 4 if operation == "window_attention" else None
            S = WINDOW if operation == "decode_window" else N
            decodes = operation.startswith("decode")
            case = Case(operation, 2, 1 if decodes else N, S, Q, K, H, window, not decodes)
            args = inputs(case, jnp.float32, seed=H + S)
            dense = jax.jit(results(case, Subject(functools.partial(_dense, case))))
            rounded = [x.astype(sizes.dtype) if x.dtype == jnp.float32 else x for x in args]
            with jax.default_matmul_precision("highest"):
                exact, plain = jax.device_get((dense(*args), dense(*rounded)))
            mine = subjects(case, sizes.dtype)
            for name, outcome in compile_all(
                {name: (results(case, subject), rounded) for name, subject in mine.items()}
            ).items():
                row = {"operation": operation, "H": H, "implementation": name}
                row |= {"ours": mine[name].ours, "error": None}
                try:
                    got = jax.device_get(outcome(*rounded))
                except Exception as error:
                    found.append(row | {"error": first_line(error)})
                    continue
                for what, value in got.items():
                    rms, theirs = _rms(value, exact[what]), _rms(plain[what], exact[what])
                    # In float32 both are sums in another order: a few roundings are no matter.
                    ratio = rms / max(theirs, 8 * eps if eps < 1e-6 else 0.0)
                    row |= {"result": what, "rms": rms, "reference_rms": theirs, "ratio": ratio}
                    found.append(dict(row))
    return found


def compile_all(programs: dict[Any, tuple[Callable, list]]) -> dict[Any, Callable]:
    """Compiled functions by key, traced one after the other and compiled side by side. One that
    cannot be compiled raises its error when it is called."""

    def fails(error, *args):
        raise error

    done = {}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for key, (function, args) in programs.items():
            try:
                done[key] = pool.submit(jax.jit(function).lower(*args).compile)
            except Exception as error:
                done[key] = functools.partial(fails, error)
        for key, future in done.items():
            if isinstance(future, concurrent.futures.Future):
                error = future.exception()
                done[key] = functools.partial(fails, error) if error else future.result()
    return done


def _dense(case: Case, q, k, v, lengths=None):
    scale = case.H**-0.5
    if case.decodes:
        return reference.decode(q, k, v, lengths, scale=scale)
    options = {"q_offset": 0, "segments": None, "kv_lengths": None, "scale": scale}
    return reference.attention(q, k, v, window=case.window, **options)[0]


# --- Times ----------------------------------------------------------------------------------------


def repeated(function: Callable, calls: int) -> Callable:
    """A function of the same arguments that calls `function` `calls` times in a row."""

    def run(*args):
        def body(_, args):
            # The first barrier ties all inputs to the one that changes, so that nothing done to
            # the others, a transposition say, can be moved out of the loop; the second keeps XLA
            # from computing only the elements that are looked at.
            args = jax.lax.optimization_barrier(args)
            made = jax.lax.optimization_barrier(function(*args))
            seen = sum(x[(0,) * x.ndim].astype(jnp.float32) for x in jax.tree.leaves(made))
            first = args[0]
            element = first[(0,) * first.ndim] + (1e-6 * seen).astype(first.dtype)
            return first.at[(0,) * first.ndim].set(element), *args[1:]

        return jax.lax.fori_loop(0, calls, body, args)[0]

    return run


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _seconds(function: Callable, args) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - start


def _summary(samples: list[float]) -> dict[str, float]:
    median = statistics.median(samples)
    spread = (max(samples) - min(samples)) / median
    return {"seconds": median, "spread": spread, "samples": len(samples)}


class Pace:
    """Expected seconds of a call, from what the same implementation took elsewhere."""

    def __init__(self, nominal_flops: float):
        self.nominal, self.seen = nominal_flops, {}

    def note(self, name: str, case: Case, seconds: float) -> None:
        self.seen[name, case.operation, case.H, case.backward] = case.flops / seconds

    def guess(self, name: str, case: Case, dense: bool) -> float:
        key = (name, case.operation, case.H, case.backward)
        # A dense implementation does not get cheaper by a window, so it counts pairs of all keys.
        speed = self.seen.get(key, self.nominal)
        scale = case.N * case.S / case.pairs / 2 if dense and not case.decodes else 1.0
        return case.flops * (scale if key not in self.seen else 1.0) / speed + 5e-6


def _left_out(case: Case, name: str, subject: Subject, pace: Pace, sizes: Sizes) -> str | None:
    """Why a measurement is not made, if it is not."""
    scores = 4 * case.B * case.Q * case.N * case.S
    if subject.dense and scores > sizes.dense_bytes:
        return f"its scores take {scores / 2**30:.0f} GiB"
    expected = pace.guess(name, case, subject.dense)
    if expected > sizes.slowest_call_s:
        return f"a call is expected to take {expected:.1f} s"
    return None


def measure_group(group: list[Case], sizes: Sizes, pace: Pace) -> tuple[list[dict], list[str]]:
    """Times the cases of a group: all is compiled side by side, then implementations take turns."""
    rows, left_out, planned, programs = [], [], {}, {}
    for case in group:
        args = jax.eval_shape(functools.partial(inputs, case, sizes.dtype, 0))
        for name, subject in subjects(case, sizes.dtype).items():
            if reason := _left_out(case, name, subject, pace, sizes):
                left_out.append(f"{name}, {case.label}: {reason}")
                continue
            expected = pace.guess(name, case, subject.dense)
            calls = min(100, max(1, round(sizes.sample_s / expected)))
            planned[case, name] = _row(case, name, subject, calls)
            programs[case, name] = repeated(results(case, subject), calls), args
    compiled = compile_all(programs)
    for case in group:
        args = inputs(case, sizes.dtype, seed=case.S + case.H)
        samples: dict[str, list[float]] = {name: [] for of, name in planned if of == case}
        for turn in range(1 + sizes.rounds):
            for name, taken in list(samples.items()):
                if sum(taken) >= 2 * sizes.slowest_call_s:
                    continue
                try:
                    seconds = _seconds(compiled[case, name], args)
                except Exception as error:
                    rows.append(planned[case, name] | {"error": first_line(error)})
                    del samples[name]
                    continue
                # The first run warms up; it counts where a second one would take too long.
                if turn or seconds >= 4 * sizes.slowest_call_s:
                    taken.append(seconds)
        for name, taken in samples.items():
            row = planned[case, name]
            summary = _summary([seconds / row["calls"] for seconds in taken])
            pace.note(name, case, summary["seconds"])
            rows.append(row | summary | _speed(case, summary["seconds"], sizes.dtype))
    return rows + derived(group, rows), left_out


def derived(group: list[Case], rows: list[dict]) -> list[dict]:
    """Rows of the backward alone, of implementations with a time for the forward and one for both
    passes: their difference, with the spread that it has if both err in the worst way."""
    case, found = group[0], []
    measured = {(row["implementation"], row["pass"]): row for row in rows if not row["error"]}
    for (name, what), both in measured.items():
        forward = measured.get((name, "forward"))
        if what != "forward + backward" or forward is None:
            continue
        seconds = both["seconds"] - forward["seconds"]
        if seconds <= 0:  # noise
            continue
        spread = sum(row["spread"] * row["seconds"] for row in (both, forward)) / seconds
        tflops = 10 * case.H * case.pairs * case.Q * case.B / seconds / 1e12
        row = both | {"pass": DERIVED, "seconds": seconds, "spread": spread, "tflops": tflops}
        found.append(row)
    return found


def _row(case: Case, name: str, subject: Subject, calls: int) -> dict:
    fields = {k: v for k, v in case._asdict().items() if k != "backward"}
    what = "forward + backward" if case.backward else "forward"
    row = fields | {"pass": what, "implementation": name, "ours": subject.ours}
    return row | {"calls": calls, "error": None}


def _speed(case: Case, seconds: float, dtype) -> dict[str, float]:
    if case.decodes:
        return {"gb_per_s": case.bytes(jnp.dtype(dtype).itemsize) / seconds / 1e9}
    return {"tflops": case.flops / seconds / 1e12}


def measure_device(sizes: Sizes) -> dict[str, Any]:
    """What the device does without us: a copy (read and written bytes counted), a product, and a
    turn of the loop that is timed, without a call."""
    x = jnp.ones((sizes.copy_bytes // 4,), jnp.float32)
    size = x.nbytes
    # In place, or a CPU measures the page faults of a fresh array.
    once = functools.partial(jax.lax.fori_loop, 0, 4, lambda _, x: x + 1.0)
    copy = jax.jit(once, donate_argnums=0)
    n = sizes.matmul
    a = jax.random.normal(jax.random.key(0), (n, n), sizes.dtype)
    # Scaled, so that the product of a product stays of size 1.
    chain = jax.jit(lambda a: jax.lax.fori_loop(0, 8, lambda _, y: (y @ a) * n**-0.5, a))
    (Q, K), turns = sizes.heads, 100
    case = Case("decode_window", 1, 1, WINDOW, Q, K, sizes.head_widths[0], None)
    args = inputs(case, sizes.dtype, seed=0)
    empty = jax.jit(repeated(lambda q, *_: q[(0,) * q.ndim], turns))
    samples: dict[str, list[float]] = {"copy": [], "matmul": [], "turn": []}
    for _ in range(sizes.rounds + 1):
        start = time.perf_counter()
        x = jax.block_until_ready(copy(x))
        samples["copy"].append((time.perf_counter() - start) / 4)
        samples["matmul"].append(_seconds(chain, (a,)) / 8)
        samples["turn"].append(_seconds(empty, args) / turns)
    copied, multiplied, turn = (_summary(s[1:]) for s in samples.values())  # the first one compiles
    return {
        "copy_gb_per_s": 2 * size / copied["seconds"] / 1e9,
        "copy_spread": copied["spread"],
        "matmul_tflops": 2 * n**3 / multiplied["seconds"] / 1e12,
        "matmul_spread": multiplied["spread"],
        "matmul_size": n,
        "loop_turn_s": turn["seconds"],
        "loop_turn_spread": turn["spread"],
    }


# --- The report -----------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    packages = ["jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin", "jax-triton"]
    packages += ["triton", "tokamax", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12"]
    found = {"python": sys.version.split()[0]}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["runtime"] = jax.devices()[0].client.platform_version.splitlines()[0].strip()
    return found


def measure(
    sizes: Sizes, budget_s: float, keep: Callable[[dict], None] = lambda report: None
) -> dict[str, Any]:
    """Everything, in the order of its importance, as far as the budget goes. keep: given the
    report as it is after each group of cases."""
    start = time.perf_counter()

    def spent() -> float:
        return time.perf_counter() - start

    memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 16 * sizes.dense_bytes)
    sizes = sizes._replace(dense_bytes=min(sizes.dense_bytes, memory // 12))
    report: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "dtype": str(jnp.dtype(sizes.dtype)),
        "versions": versions(),
        "reference": measure_device(sizes),
        "errors": measure_errors(sizes),
        "times": [],
        "left_out": [],
        "complete": False,
    }

    def note(**facts):
        report.update(facts, failures=failures(report), seconds=spent())
        keep(report)

    note()
    copy = report["reference"]["copy_gb_per_s"]
    pace = Pace(report["reference"]["matmul_tflops"] * 1e12 / 4)
    longest = 0.0
    for group in cases(sizes):
        # Longer sequences take longer; a group that just fits by the longest so far may not.
        if spent() + 1.25 * longest > budget_s:
            report["left_out"] += [f"all, {case.label}: the time budget" for case in group]
            continue
        begun = spent()
        rows, left_out = measure_group(group, sizes, pace)
        longest = max(longest, spent() - begun)
        for row in rows:
            if "gb_per_s" in row:
                row["of_copy"] = row["gb_per_s"] / copy
        report["times"] += rows
        report["left_out"] += left_out
        note()
        print(f"{spent():5.0f} s  {group[0].label}", file=sys.stderr)
    note(complete=True)
    return report


def failures(report: dict[str, Any]) -> list[str]:
    """What makes the command fail: an implementation of ours that fails or is not accurate."""
    found = []
    for row in report["errors"]:
        where = f"{row['implementation']}, {row['operation']}, H = {row['H']}"
        if row["ours"] and row["error"]:
            found.append(f"{where}: {row['error']}")
        elif row["ours"] and not row["ratio"] <= ERROR_RATIO:  # NaN too
            ratio = f"{row['ratio']:.2f} times the reference's"
            found.append(f"{where}: the error of {row['result']} is {ratio}.")
    for row in report["times"]:
        if row["ours"] and row["error"]:
            where = f"{row['implementation']}, {row['operation']}, S = {row['S']}, H = {row['H']}"
            found.append(f"{where}, {row['pass']}: {row['error']}")
    return found


class Grid(NamedTuple):
    """A table: a title, column names and rows of text."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def _cell(row: dict | None) -> str:
    if row is None:
        return "-"
    if row["error"]:
        return "failed"
    value = row.get("tflops", row.get("gb_per_s"))
    speed = f"{value:,.3g} ±{row['spread'] / 2:.0%}" if value < 1000 else f"{value:,.0f}"
    if "of_copy" not in row:
        return speed
    return f"{speed} ({row['of_copy']:.0%}), {1e6 * row['seconds']:,.1f} us"


def grids(report: dict[str, Any]) -> list[Grid]:
    """The report as tables: one per operation, head width and pass, then the errors."""
    found, times = [], report["times"]
    names = list(dict.fromkeys(row["implementation"] for row in times))
    keys = dict.fromkeys((r["operation"], r["H"], r["pass"]) for r in times)
    for operation, H, what in keys:
        rows = [r for r in times if (r["operation"], r["H"], r["pass"]) == (operation, H, what)]
        decodes = operation.startswith("decode")
        used = [name for name in names if any(r["implementation"] == name for r in rows)]
        unit = "GB/s (of the copy's), time of a call" if decodes else "TFLOP/s"
        table = []
        for B, S in sorted({(r["B"], r["S"]) for r in rows}, key=lambda x: (x[1], x[0])):
            by_name = {r["implementation"]: r for r in rows if (r["B"], r["S"]) == (B, S)}
            table.append([str(S), str(B), *(_cell(by_name.get(name)) for name in used)])
        title = f"{operation}, H = {H}" + ("" if decodes else f", {what}") + f": {unit}"
        found.append(Grid(title, ["S", "B", *used], table))
    table: dict[tuple, list[str]] = {}
    names = ("out", "dq", "dk", "dv")
    for row in report["errors"]:
        key = row["operation"], str(row["H"]), row["implementation"]
        cells = table.setdefault(key, ["failed" if row["error"] else "-"] * len(names))
        if not row["error"]:
            flag = "" if row["ratio"] <= ERROR_RATIO else " !"
            cells[names.index(row["result"])] = f"{row['rms']:.1e} ({row['ratio']:.2f}{flag})"
    title = "error against float32, relative root mean square (and over the reference's own)"
    columns = ["operation", "H", "implementation", *names]
    found.append(Grid(title, columns, [[*key, *cells] for key, cells in table.items()]))
    return found


def head_line(report: dict[str, Any]) -> str:
    base = report["reference"]
    packages = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    return (
        f"{report['device']}, {report['date']}, {report['dtype']}, {report['seconds']:.0f} s; copy "
        f"{base['copy_gb_per_s']:,.0f} GB/s, {base['matmul_size']} x {base['matmul_size']} product "
        f"{base['matmul_tflops']:.3g} TFLOP/s; loop turn: {1e6 * base['loop_turn_s']:.1f} us; "
        f"{packages}"
    )


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    sizes = "Visible pairs only; S: keys, B: rows; ± half of (max - min) / median."
    lines = [f"# Attention kernels on {report['device']}", "", head_line(report), "", sizes]
    if not report["complete"]:
        lines += ["", "**Not all of it:** what was measured before the run was cut short."]
    for grid in grids(report):
        lines += ["", f"## {grid.title}", "", f"| {' | '.join(grid.columns)} |"]
        lines += ["|" + " --- |" * len(grid.columns)]
        lines += [f"| {' | '.join(row)} |" for row in grid.rows]
    failed = [
        f"{r['implementation']}, {r['operation']}, S = {r['S']}, H = {r['H']}, {r['pass']}: "
        f"{r['error']}"
        for r in report["times"]
        if r["error"]
    ]
    failed += [
        f"{r['implementation']}, {r['operation']}, H = {r['H']} (errors): {r['error']}"
        for r in report["errors"]
        if r["error"]
    ]
    for title, entries in (("Failed", failed), ("Left out", report["left_out"])):
        if entries:
            lines += ["", f"## {title}", "", *(f"* {entry}" for entry in entries)]
    return "\n".join(lines) + "\n"


def _folder(device: str, on_cpu: bool) -> Path | None:
    if OUT.value is None and on_cpu:
        return None
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    folder = resolve(OUT.value or f"results/kernels-{name}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"--out={folder} is not a folder.") from error
    return folder


def _write(folder: Path, report: dict[str, Any]) -> None:
    """Both files, each whole at any time."""
    pages = {"kernels.json": json.dumps(report, indent=1) + "\n", "kernels.md": markdown(report)}
    for name, text in pages.items():
        write_atomically(folder / name, text)


def main(_):
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu:
        cli.keep_freed_memory()
    folder = _folder(jax.devices()[0].device_kind, on_cpu)  # before minutes of measuring
    sizes = CPU if on_cpu else ACCELERATOR
    budget_s = sizes.budget_s if BUDGET.value is None else BUDGET.value
    keep = (lambda report: None) if folder is None else functools.partial(_write, folder)
    report = measure(sizes, budget_s, keep)
    if JSON.value:
        print(json.dumps(report))
    else:
        console = Console(width=None if Console().is_terminal else 140)
        console.print(head_line(report))
        for grid in grids(report):
            table = Table(*grid.columns, title=grid.title, title_justify="left")
            for row in grid.rows:
                table.add_row(*row)
            console.print(table)
        for entry in report["left_out"]:
            console.print(f"left out: {entry}", markup=False)
        for row in report["times"] + report["errors"]:
            if row["error"] and not row["ours"]:
                console.print(
                    f"baseline failed: {row['implementation']}, {row['operation']}: {row['error']}",
                    markup=False,
                )
        for failure in report["failures"]:
            console.print(f"FAILED: {failure}", markup=False)
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    # Not above: absl knows a flag once, and the tests import several commands.
    JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of tables.")
    OUT = flags.DEFINE_string(
        "out",
        None,
        "Folder for kernels.json and kernels.md; results/kernels-<device> if not given.",
    )
    BUDGET = flags.DEFINE_float(
        "budget_s", None, "Seconds after which no further case is begun; 420, on a CPU 75."
    )
    cli.run(main)
