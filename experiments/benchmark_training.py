"""Measures how fast the small config trains on the machine at hand, in one run.

    python -m experiments.benchmark_training [--json]

Prints tokens/s and GFLOP/s (model FLOPs of `accounting`, no recomputation) of the config and of its
transformer sibling beside a large matrix product, the share of a step spent outside the device
computation, compile time against the loop count, and window attention against dense. What is
compared is interleaved, and medians are printed, because shared machines are noisy.
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
ROUNDS = flags.DEFINE_integer(
    "rounds", 5, "Times that every measurement is repeated.", lower_bound=1
)
STEPS = flags.DEFINE_integer("steps", 4, "Training steps in one measurement.", lower_bound=1)


def grid(title: str, rows: dict[str, dict[str, float]]) -> Grid:
    columns = ["", *next(iter(rows.values()))]
    cells = [[name, *(f"{v:,.4g}" for v in values.values())] for name, values in rows.items()]
    return Grid(title, columns, cells, texts=1)


def main(_):
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
