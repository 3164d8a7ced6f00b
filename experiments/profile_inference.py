"""Measures prefill, decode and KV cache against the length of the prompt, architecture by
architecture, on this device, and shows the figures of the paper's Tables 8, 9 and 10 next to them.

    python -m experiments.profile_inference --config=configs/yocou_1b.py [--json] [--plot=x.png]

Weights are random and in the compute type, without a mesh. On a CPU a small model with the same
programs replaces one of more than 30M parameters.

Prefill is `inference.prefill` of new prompts, with few rows, because arithmetic limits it. Decode
is a compiled loop of greedy steps on a cache of random values, because the cost of a step depends
on lengths alone. It runs at the largest batch up to --batch (the paper's 32) that fits into memory,
and at that of the architecture that it is compared with, if that one is smaller. So every ratio
compares equal batches, but the plot does not.

All programs of a length are compiled first, in parallel. Then the measurements take turns, and the
report has their medians. GB/s of decode count the bytes that a step must read, by
`accounting.decode_bytes_per_step`. Their share is that of the copy bandwidth: the bytes per second
of a plain copy on the device, measured in the same run. After --budget_s no measurement begins; the
report names what is missing. --out=x.json is written after each length. Exit code 1: a measurement
failed; the others were made.

    python -m experiments.profile_inference --peer[=PATH_OF_PYTHON] [--rounds=20]

This compares only the transformer of these sizes, on a CPU, with LlamaForCausalLM of transformers
5.x (float32, sdpa, its usual cache) in another process. First the logits of both must agree. Then
they take turns. The ratio of times, ours / theirs, is the median over all pairs.

The results to expect for the 1.3B model, by the paper's Table 1 and `accounting`: Prefill. The cost
per token of a window layer is constant, that of a full layer grows with N, and a token passes
through 30 layers in yoco_u and through 20 in the transformer. FLOPs per token of the transformer
over those of yoco_u:

    N            8K    16K    32K    64K   128K    256K      (equal at 14.6K)
    prefill    0.84   1.04   1.45   2.25   3.86    7.07
    measured   0.88   1.14   1.67   2.79   5.04   10.21      (the paper, Table 8)

So yoco_u should be slower below about 16K. For the paper's 10.2, full attention would have to run
at 0.67 of the FLOP/s of everything else. The better the attention kernel, the smaller this ratio.

Decode. In each step yoco_u reads (L/2)(N + W loops) positions of its caches, and the transformer
reads L N: for a long cache about twice as many. But yoco_u reads twice the weights. So by bytes the
ratio is below 2 at any length and equal batch. The bytes of a step, divided by those of yoco_u:

    N, batch       8K, 32   16K, 32   64K, 32   256K, 4   256K, 8   256K, 32
    transformer      1.15      1.41      1.80      1.69      1.82       1.94
    yoco             0.72      0.81      0.93      0.90      0.94       0.98

The paper has 2.2 at 256K (Table 9: 303 / 137), which is more than the bytes explain. In the paper's
engine, fewer rows fit into memory if their caches are larger. So its ratio does not compare equal
batches.

KV cache. 10240 / 542 MiB = 18.9, exactly.
"""

import functools
import sys

import jax
from absl import flags
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks import comparison, inference, plots
from benchmarks.peers import inference as peers
from benchmarks.report import console, output_file, table, write_json
from experiments import cli, peer, process
from yocou_jax.config import Config
from yocou_jax.model import resolve_compute

CONFIG = cli.config_file("configs/yocou_1b.py", "Sizes to profile.")
LENGTHS = flags.DEFINE_list(
    "lengths", None, "Prompt lengths. Default: 8192,16384,65536,262144; on a CPU 1024 to 16384."
)
ARCHITECTURE_NAMES = flags.DEFINE_list(
    "architectures",
    ["transformer", "yoco", "rins", "yoco_u"],
    "Names in program.ARCHITECTURES to measure.",
)
BATCH = flags.DEFINE_integer(
    "batch", None, "Largest batch of decode. Default: 32; on a CPU 4.", lower_bound=1
)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of tables.")
OUT = flags.DEFINE_string("out", None, "File for the numbers (.json), written after each length.")
PLOT = flags.DEFINE_string("plot", None, "File for the three curves, such as a PNG or PDF.")
BUDGET = flags.DEFINE_float(
    "budget_s",
    None,
    "Seconds after which no measurement starts. Default: 400; on a CPU 300, with --peer 600.",
    lower_bound=0,
)
PEER = peer.flag(
    "Compare with transformers. --peer=PATH: the Python of an environment that has it."
)
ROUNDS = flags.DEFINE_integer("rounds", 20, "Pairs of times with --peer.", lower_bound=1)


def show(report: dict, out: Console) -> None:
    for line in comparison.head_lines(report):
        out.print(line, markup=False)
    for grid in comparison.grids(report):
        out.print(table(grid))
    for line in comparison.foot_lines(report):
        out.print(line, markup=False)


def main(_):
    process.keep_freed_memory()
    process.check_kernels(CONFIG.value.compute.attention)
    on_cpu = jax.default_backend() == "cpu"
    sizes = inference.CPU if on_cpu else inference.ACCELERATOR
    config = Config.from_dict(CONFIG.value)
    configs, notes = inference.choose_configs(config.model, ARCHITECTURE_NAMES.value, on_cpu)
    # Before minutes of measuring.
    plot_path = output_file("plot", PLOT.value, Figure().canvas.get_supported_filetypes())
    out_path = output_file("out", OUT.value, ("json",))
    sizes = sizes._replace(
        batch=BATCH.value or sizes.batch,
        lengths=inference.check_lengths(
            LENGTHS.value or list(map(str, sizes.lengths)), sizes.steps
        ),
    )

    def keep(report):
        if out_path is not None:
            write_json(out_path, {"command": cli.command()} | report | {"notes": notes})

    default_s = sizes.budget_s if PEER.value is None else 600
    budget_s = default_s if BUDGET.value is None else BUDGET.value
    say = functools.partial(print, file=sys.stderr)
    compute = resolve_compute(config.compute)
    if PEER.value is not None:
        ours, how = configs[ARCHITECTURE_NAMES.value[0]], (ROUNDS.value, budget_s, PEER.value)
        keep(report := peers.measure(ours, sizes, compute, *how, say))
        peer.show(report, ["kind", "length", "batch"], notes, JSON.value)
        return 0
    report = inference.measure(configs, sizes, budget_s, compute, keep, say) | {"notes": notes}
    keep(report)
    if JSON.value:
        cli.print_json(report)
    else:
        show(report, console(160))
    if plot_path is not None:
        plots.plot(report, plot_path)
    return 1 if any(row["status"] == "failed" for row in report["rows"]) else 0


if __name__ == "__main__":
    cli.run(main)
