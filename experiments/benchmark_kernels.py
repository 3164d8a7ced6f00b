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

import functools
import json
import sys
from pathlib import Path

import jax
from absl import flags

from benchmarks import cases, kernels
from benchmarks.report import console, output_folder, plain_name, table
from experiments import cli

JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of tables.")
OUT = flags.DEFINE_string(
    "out",
    None,
    "Folder for kernels.json and kernels.md; results/kernels-<device> if not given.",
)
BUDGET = flags.DEFINE_float(
    "budget_s", None, "Seconds after which no further case is begun; 420, on a CPU 75."
)


def show(report: dict) -> None:
    out = console(140)
    out.print(kernels.head_line(report))
    for grid in kernels.grids(report):
        out.print(table(grid))
    for entry in report["left_out"]:
        out.print(f"left out: {entry}", markup=False)
    for row in report["times"] + report["errors"]:
        if row["error"] and not row["ours"]:
            out.print(
                f"baseline failed: {row['implementation']}, {row['operation']}: {row['error']}",
                markup=False,
            )
    for failure in report["failures"]:
        out.print(f"FAILED: {failure}", markup=False)


def folder(on_cpu: bool) -> Path | None:
    if OUT.value is None and on_cpu:
        return None
    return output_folder(OUT.value or f"results/kernels-{plain_name(jax.devices()[0].device_kind)}")


def main(_):
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu:
        cli.keep_freed_memory()
    out = folder(on_cpu)  # before minutes of measuring
    sizes = cases.CPU if on_cpu else cases.ACCELERATOR
    budget_s = sizes.budget_s if BUDGET.value is None else BUDGET.value
    keep = (lambda report: None) if out is None else functools.partial(kernels.write, out)
    say = functools.partial(print, file=sys.stderr)
    report = kernels.measure(sizes, budget_s, keep, say)
    if JSON.value:
        print(json.dumps(report))
    else:
        show(report)
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    cli.run(main)
