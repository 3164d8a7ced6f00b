"""Measures how fast the small config trains on this machine.

    python -m experiments.benchmark_training [--json]

For the config and for a transformer of the same sizes, it prints tokens/s, GFLOP/s (model FLOPs of
`accounting`, without recomputation), and the share of a step that is not computation on the device.
It also prints the GFLOP/s of a large matrix product, the compile time for several numbers of loops,
and the times of window attention and dense attention. Measurements that are compared take turns,
and the tables have medians, because other programs may use the machine too.
"""

import json

import jax
from absl import flags
from rich.console import Console

from benchmarks import training
from benchmarks.report import Grid, table
from experiments import cli

CONFIG = cli.config_file("configs/yocou_small.py", "What to train.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of tables.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Number of measurements of each kind.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 4, "Training steps in one measurement.", lower_bound=1)


def grid(title: str, rows: dict[str, dict[str, float]]) -> Grid:
    columns = ["", *next(iter(rows.values()))]
    cells = [[name, *(f"{v:,.4g}" for v in values.values())] for name, values in rows.items()]
    return Grid(title, columns, cells, texts=1)


def main(_):
    cli.check_kernels(CONFIG.value.compute.attention)
    if jax.default_backend() == "cpu":
        cli.keep_freed_memory()
    result = training.measure(CONFIG.value, ROUNDS.value, STEPS.value)
    if JSON.value:
        print(json.dumps(result))
        return
    console, trained = Console(), result["training"]
    console.print(
        f"{result['device']}, jax {result['jax']}; "
        f"2048 x 2048 matrix product: {trained['matmul_gflops']:.0f} GFLOP/s"
    )
    rows = {k: v for k, v in trained.items() if isinstance(v, dict)}
    for made in (
        grid("training", rows),
        grid("compile time of the step, s, by loops", {"yoco_u": result["compile_s"]}),
        grid("window attention, W = 512", result["window_attention"]),
    ):
        console.print(table(made))


if __name__ == "__main__":
    cli.run(main)
