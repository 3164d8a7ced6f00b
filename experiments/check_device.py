"""What this machine is, what is wrong with it, and which attention kernels work on it.

    python -m experiments.check_device [--json] [--quick]

It prints the devices, the versions and the memory; then it compares every attention kernel with the
reference on odd shapes, forward, backward and decode, each in a process of its own with a time
limit; then it measures their times (not with --quick). At the end it says which kernel "auto" takes
for each operation, and why; and what is wrong, with the command that fixes it.

The verdicts about the kernels are kept for the later starts of every command: "auto" takes only a
kernel that passed here. This command always makes them again. Exit code 1: something is wrong.
"""

import functools
import sys

from absl import flags

from benchmarks import machine
from benchmarks.report import console, table
from experiments import cli
from pallas_kernels import verdicts

JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")
QUICK = flags.DEFINE_bool("quick", False, "Measure no times.")
LIMIT = flags.DEFINE_float(
    "limit_s", verdicts.LIMIT_S, "Seconds after which a kernel counts as hanging.", lower_bound=1
)


def main(_):
    verdicts.LIMIT_S = LIMIT.value
    report = machine.measure(QUICK.value, functools.partial(print, file=sys.stderr, flush=True))
    if JSON.value:
        cli.print_json(report)
        return 1 if report["problems"] else 0
    out = console(140)
    for line in machine.lines(report):
        out.print(line, markup=False)
    for grid in machine.grids(report):
        out.print(table(grid))
    for line in machine.reasons(report):
        out.print(line, markup=False)
    for problem in report["problems"]:
        out.print(f"WRONG: {problem['sentence']}\n    {problem['command']}", markup=False)
    if not report["problems"]:
        out.print("Nothing is wrong.")
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    cli.run(main)
