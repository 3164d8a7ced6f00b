"""The errors and the times of every attention kernel that runs on this machine, and of baselines.

`measure` makes one report, `failures` judges it, `grids` and `markdown` show it. `timing.repeated`
says how a call is timed.
"""

import functools
import importlib.util
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import cases, device, timing
from benchmarks.cases import Case, Sizes, inputs
from benchmarks.report import Grid, page, write_json
from benchmarks.timing import Pace, first_line
from pallas_kernels import Call, Mask, api
from pallas_kernels.accuracy import ERROR_RATIO, error_ratio, relative_rms
from pallas_kernels.attention import reference
from pallas_kernels.call import decodes
from pallas_kernels.device import target_device
from yocou_jax.files import write_atomically

DERIVED = "backward (derived)"  # the difference of two times that are measured
ERROR_OPERATIONS = api.OPERATIONS

# --- Who is measured ------------------------------------------------------------------------------


class Subject(NamedTuple):
    """Something that is measured. call(q, k, v) -> out; for decode (q, k, v, lengths) -> out.
    dense: it stores all scores. ours: it is in pallas_kernels, and "auto" may take it. So it must
    not fail."""

    call: Callable
    ours: bool = False
    dense: bool = False


def _late(make: Callable[[Case], Callable], case: Case) -> Callable:
    """Calls make(case) only when it is called itself. So an error there (an import, a mask that
    does not fit into memory) fails this one measurement, and not the run."""

    @functools.cache
    def made():
        with jax.ensure_compile_time_eval():  # so that its constants can be used in every trace
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
    """Everything that can run the case on this machine: our implementations, then baselines."""
    found, target = {}, target_device()
    shape = (case.B, case.Q, case.H) if case.decodes else (case.B, case.N, case.Q, case.H)
    call = Call(
        case.operation,
        target,
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
    if target.platform == "gpu" and "cudnn" not in found:
        found["jax.nn cudnn"] = Subject(_jax_nn(case, "cudnn"))
    if not case.decodes and target.platform == "tpu":
        found["splash"] = Subject(_late(_splash, case))
    if not case.decodes and importlib.util.find_spec("tokamax") is not None:
        found["tokamax"] = Subject(_late(_tokamax, case))
    return found


def results(case: Case, subject: Subject) -> Callable:
    """A function that takes the arrays of `inputs` and returns the case's results, by name."""

    def run(q, k, v, last):
        if case.decodes:
            return {"out": subject.call(q, k, v, last)}
        if not case.backward:
            return {"out": subject.call(q, k, v)}
        out, vjp = jax.vjp(subject.call, q, k, v)
        return {"out": out, **dict(zip(("dq", "dk", "dv"), vjp(last), strict=True))}

    return run


# --- Errors ---------------------------------------------------------------------------------------


def measure_errors(sizes: Sizes) -> list[dict]:
    """One entry per operation, head width, subject and result."""
    found = []
    Q, K = sizes.heads
    N, eps = sizes.error_length, float(jnp.finfo(sizes.dtype).eps)
    # In float32 both are exact up to their order of sums: 8 roundings are allowed.
    floor = 8 * eps if eps < 1e-6 else 0.0
    for H in sizes.head_widths:
        for operation in ERROR_OPERATIONS:
            window = N // 4 if operation == "window_attention" else None
            S = cases.WINDOW if operation == "decode_window" else N
            single = decodes(operation)
            case = Case(operation, 2, 1 if single else N, S, Q, K, H, window, not single)
            args = inputs(case, jnp.float32, seed=H + S)
            dense = jax.jit(results(case, Subject(functools.partial(_dense, case))))
            rounded = [x.astype(sizes.dtype) if x.dtype == jnp.float32 else x for x in args]
            with jax.default_matmul_precision("highest"):
                exact, plain = jax.device_get((dense(*args), dense(*rounded)))
            mine = subjects(case, sizes.dtype)
            for name, outcome in timing.compile_all(
                {name: (results(case, subject), rounded) for name, subject in mine.items()}
            ).items():
                row = {"operation": operation, "H": H, "implementation": name}
                row |= {"ours": mine[name].ours, "error": None}
                try:
                    got = jax.device_get(outcome(*rounded))
                except Exception as error:
                    found.append(row | {"error": first_line(error)})
                    continue
                for what in got:
                    rms, theirs = (relative_rms(x[what], exact[what]) for x in (got, plain))
                    ratio = error_ratio(rms, theirs, floor)
                    row |= {"result": what, "rms": rms, "reference_rms": theirs, "ratio": ratio}
                    found.append(dict(row))
    return found


def _dense(case: Case, q, k, v, lengths=None):
    scale = case.H**-0.5
    if case.decodes:
        return reference.decode(q, k, v, lengths, scale=scale)[0]
    return reference.attention(q, k, v, Mask(case.window), scale=scale)[0]


# --- Times ----------------------------------------------------------------------------------------


def _left_out(case: Case, name: str, subject: Subject, pace: Pace, sizes: Sizes) -> str | None:
    """Why a measurement is left out; None if it is not."""
    scores = 4 * case.B * case.Q * case.N * case.S
    if subject.dense and scores > sizes.dense_bytes:
        return f"its scores take {scores / 2**30:.0f} GiB"
    expected = pace.guess(name, case, subject.dense)
    if expected > sizes.slowest_call_s:
        return f"a call is expected to take {expected:.1f} s"
    return None


def measure_group(
    group: list[Case], sizes: Sizes, pace: Pace, names: Collection[str] | None = None
) -> tuple[list[dict], list[str]]:
    """Times the cases of a group. All programs are compiled at the same time; then the
    implementations take turns. Returns the rows of the report and what was left out.
    names: measures no others."""
    rows, left_out, planned, programs = [], [], {}, {}
    for case in group:
        args = jax.eval_shape(functools.partial(inputs, case, sizes.dtype, 0))
        for name, subject in subjects(case, sizes.dtype).items():
            if names is not None and name not in names:
                continue
            if reason := _left_out(case, name, subject, pace, sizes):
                left_out.append(f"{name}, {case.label}: {reason}")
                continue
            expected = pace.guess(name, case, subject.dense)
            calls = min(100, max(1, round(sizes.sample_s / expected)))
            planned[case, name] = _row(case, name, subject, calls)
            programs[case, name] = timing.repeated(results(case, subject), calls), args
    compiled = timing.compile_all(programs)
    for case in group:
        args = inputs(case, sizes.dtype, seed=case.S + case.H)
        samples: dict[str, list[float]] = {name: [] for of, name in planned if of == case}
        for turn in range(1 + sizes.rounds):
            for name, taken in list(samples.items()):
                if sum(taken) >= 2 * sizes.slowest_call_s:
                    continue
                try:
                    seconds = timing.seconds(compiled[case, name], *args)
                except Exception as error:
                    rows.append(planned[case, name] | {"error": first_line(error)})
                    del samples[name]
                    continue
                # The first run warms up. It counts only if a second one would take too long.
                if turn or seconds >= 4 * sizes.slowest_call_s:
                    taken.append(seconds)
        for name, taken in samples.items():
            row = planned[case, name]
            summary = timing.summary([seconds / row["calls"] for seconds in taken])
            pace.note(name, case, summary["seconds"])
            rows.append(row | summary | _speed(case, summary["seconds"], sizes.dtype))
    return rows + derived(group, rows), left_out


def derived(group: list[Case], rows: list[dict]) -> list[dict]:
    """Rows for the backward alone: the time of both passes minus that of the forward. The spread is
    the largest one that the difference can have."""
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


# --- The report -----------------------------------------------------------------------------------


def measure(
    sizes: Sizes,
    budget_s: float,
    keep: Callable[[dict], None] = lambda report: None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measures all that the time budget allows, the most important cases first, and returns the
    report. keep gets the report so far after each group of cases; say gets a line about each."""
    start = time.perf_counter()

    def spent() -> float:
        return time.perf_counter() - start

    memory = device.memory() or 16 * sizes.dense_bytes
    sizes = sizes._replace(dense_bytes=min(sizes.dense_bytes, memory // 12))
    report: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "date": device.today(),
        "dtype": str(jnp.dtype(sizes.dtype)),
        "versions": device.versions(),
        "reference": device.measure(sizes),
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
    for group in cases.grouped(sizes):
        # Longer sequences take longer: a group may take more than the longest one so far.
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
        say(f"{spent():5.0f} s  {group[0].label}")
    note(complete=True)
    return report


def failures(report: dict[str, Any]) -> list[str]:
    """Sentences for what makes the command fail: one of our implementations fails or is not
    accurate."""
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
        used = [name for name in names if any(r["implementation"] == name for r in rows)]
        single = decodes(operation)
        unit = "GB/s (of the copy's), time of a call" if single else "TFLOP/s"
        table = []
        for B, S in sorted({(r["B"], r["S"]) for r in rows}, key=lambda x: (x[1], x[0])):
            by_name = {r["implementation"]: r for r in rows if (r["B"], r["S"]) == (B, S)}
            table.append([str(S), str(B), *(_cell(by_name.get(name)) for name in used)])
        title = f"{operation}, H = {H}" + ("" if single else f", {what}") + f": {unit}"
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
    paragraphs = [head_line(report), sizes]
    if not report["complete"]:
        paragraphs.append("**Not complete:** the run was cut short; this was measured before.")
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
    lists = (("Failed", failed), ("Left out", report["left_out"]))
    title = f"Attention kernels on {report['device']}"
    return page(title, paragraphs, grids(report), lists)


def write(folder: Path, report: dict[str, Any]) -> None:
    """Writes kernels.json and kernels.md; each is complete at any time."""
    write_json(folder / "kernels.json", report)
    write_atomically(folder / "kernels.md", markdown(report))
