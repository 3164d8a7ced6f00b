"""Everything that the owner of a device can tell us about it, in one command of at most 8 minutes.

    python -m experiments.verify_device [--out=results/]

It writes a folder with the name of the device to --out, with one JSON file and one page for each
part: what the machine is, and which kernels are right on it (`experiments.check_device`); how
accurate and how fast they are at real sizes (`experiments.benchmark_kernels`); whether a model
learns the same with the kernel that "auto" takes as with xla, in 100 steps
(`experiments.kernel_parity`); whether a run that was killed and resumed ends with the same
parameters, bit for bit, on a GPU also with --xla_gpu_deterministic_ops; how fast yocou_125m and
yocou_1b train (`experiments.benchmark_training`); how fast they read and write, to 256K positions
(`experiments.profile_inference`). On a CPU all sizes are small.

Each part is a process that gets its share of the time that is left, and is written when it ends.
So a run that is cut short still has its parts. A part that failed, or for which no time was left,
says so in its file. Exit code 1: a part failed.

Please send us the folder (README.md).
"""

import functools
import sys

from absl import flags

from benchmarks import verify
from benchmarks.report import output_folder
from experiments import cli

OUT = flags.DEFINE_string("out", "results", "Folder for the folder of the device.")
BUDGET = flags.DEFINE_float(
    "budget_s", verify.BUDGET_S, "Seconds after which all has ended.", lower_bound=0
)


def main(_):
    cli.refuse_empty(OUT)
    say = functools.partial(print, file=sys.stderr, flush=True)
    folder, failures = verify.measure(output_folder(OUT.value), BUDGET.value, say)
    for failure in failures:
        print(failure)
    print(f"The results are in {folder}/.")
    return 1 if failures else 0


if __name__ == "__main__":
    cli.run(main)
