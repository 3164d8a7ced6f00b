"""Measures the errors and times of all attention kernels and baselines that run on this device.

    python -m experiments.benchmark_kernels [--json] [--out=results/kernels-...] [--budget_s=...]

Errors come first, on new random inputs. The error is the root mean square of the difference from a
float32 reference on float32 inputs. It is compared with the error of the same reference on rounded
inputs: if a kernel of this repository has more than 1.5 times this error, the command fails.

Then come times: window attention (W = 512) and global attention, from 2K to 64K positions, with
heads of 64 and 128, forward, and forward with backward; and decode. TFLOP/s count only visible
(query, key) pairs: 4 H per pair and head for forward, 10 H for backward, and so 14 H for both. The
time of backward is the difference of the two times. (A forward pass that is part of a gradient also
writes its log-sum-exp.) GB/s of decode count each valid key and value once. They are printed with
their share of the device's copy bandwidth. This bandwidth and a large matrix product are measured
in the same run. On a CPU: float32, small sizes, xla and dense.

How times are measured: one jitted loop makes `calls` calls, because the launch from Python takes
longer than a small kernel. Each call depends on the call before: one element of its input is
changed by one element of every result. So the compiler cannot omit, move or overlap a call, and the
inputs stay random (the clock of a GPU depends on the data). XLA may change the layout of an input
once, before the loop, as it may in a model. The loop is compiled and run once before it is
measured. Every sample waits for the device. All implementations of a case take turns. The tables
have medians, with the spread (max - min) / median. The time of one turn of the loop without a call
("loop turn") is measured too, but not subtracted. It is important where a call takes only a few
times as long, so the tables of decode have times too.

The tables are written to kernels.json and kernels.md in --out (on a CPU only if --out is given).
They are written after each group of cases, so that an interrupted run keeps its results. Cases for
which the time budget was too short are listed. Exit code 1: an implementation of this repository
failed or is not accurate. If a baseline fails, it is only reported.
"""

import functools
import sys
from pathlib import Path

import jax
from absl import flags

from benchmarks import cases, kernels
from benchmarks.report import console, output_folder, plain_name, table
from experiments import cli, process

JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of tables.")
OUT = flags.DEFINE_string(
    "out",
    None,
    "Folder for kernels.json and kernels.md. Default: results/kernels-<device>.",
)
BUDGET = flags.DEFINE_float(
    "budget_s",
    None,
    "Seconds after which no new case starts. Default: 420; on a CPU 75.",
    lower_bound=0,
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
    process.keep_freed_memory()
    on_cpu = jax.default_backend() == "cpu"
    out = folder(on_cpu)  # first, so that a mistake in --out does not cost minutes of measurements
    sizes = cases.CPU if on_cpu else cases.ACCELERATOR
    budget_s = sizes.budget_s if BUDGET.value is None else BUDGET.value

    def keep(found: dict) -> None:
        if out is not None:
            kernels.write(out, {"command": cli.command()} | found)

    say = functools.partial(print, file=sys.stderr)
    report = kernels.measure(sizes, budget_s, keep, say)
    if JSON.value:
        cli.print_json(report)
    else:
        show(report)
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    cli.run(main)
