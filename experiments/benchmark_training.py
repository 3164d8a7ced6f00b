"""Measures how fast the small config trains on this machine.

    python -m experiments.benchmark_training [--json]
    python -m experiments.benchmark_training --peer[=PATH_OF_PYTHON] [--rounds=20]
    python -m experiments.benchmark_training --scaling [--json]

The first line compares the config with a large matrix product. For the config and for a transformer
of the same sizes, a table has tokens/s, GFLOP/s (model FLOPs of `accounting`, without
recomputation), and the share of a step that is not computation on the device. Other tables have the
compile time for several numbers of loops, and the times of window attention and dense attention.
Measurements that are compared take turns, and the tables have medians, because other programs may
use the machine too.

With --peer, the same two models are compared with the same models in PyTorch instead
(torch.compile, float32 on a CPU): the same parameters, batches, clipping and, on both sides, AdamW.
First the losses of both sides must agree. PyTorch runs in a process of its own, on as many cores,
perhaps with the Python of another environment. A step of ours and a step of theirs take turns. The
ratio is the median over all pairs, ours / theirs: below 1 ours is faster.

With --scaling, a step is compiled for 1, 2, 4 and 8 virtual devices of this CPU, and nothing runs.
A table has what each device sends and stores, with the same tokens for all devices together
(strong) or for each (weak). experiments.plan does the same for real devices.
"""

from pathlib import Path

import jax
from absl import flags
from rich.console import Console

from benchmarks import scaling, training
from benchmarks.device import installed
from benchmarks.peers import training as peers
from benchmarks.report import Grid, table
from experiments import cli, peer, process
from yocou_jax.config import Config

CONFIG = cli.config_file("configs/yocou_small.py", "What to train.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of tables.")
ROUNDS = flags.DEFINE_integer(
    "rounds",
    None,
    "Number of measurements of each kind. Default: 5; with --peer 20 pairs.",
    lower_bound=1,
)
STEPS = flags.DEFINE_integer("steps", 4, "Training steps in one measurement.", lower_bound=1)
SCALING = flags.DEFINE_bool("scaling", False, "Bytes on 1 to 8 virtual devices, instead of times.")
PEER = peer.flag("Compare with PyTorch. --peer=PATH: the Python of an environment that has it.")


def grid(title: str, rows: dict[str, dict[str, float]]) -> Grid:
    columns = ["", *next(iter(rows.values()))]
    cells = [[name, *(f"{v:,.4g}" for v in values.values())] for name, values in rows.items()]
    return Grid(title, columns, cells, texts=1)


def name() -> str:
    """The name of the config file, without its folder."""
    return Path(flags.FLAGS["config"].config_filename.partition(":")[0]).stem


def compare(python: str) -> None:
    report = peers.measure(CONFIG.value, ROUNDS.value or 20, python)
    changed = ", ".join(f"{field} {value}" for field, value in report["optimizer"].items())
    notes = [f"Both sides train with another optimizer than the config: {changed}."]
    product = report["matmul_gflops"]["ours"]
    for row in report["rows"]:
        notes.append(
            f"{name()} as {row['program']}: {row['tokens_per_s']:,.0f} tokens/s, "
            f"{row['gflops']:.0f} GFLOP/s, {row['gflops'] / product:.0%} of the product; PyTorch "
            f"{row['theirs_gflops']:.0f} GFLOP/s. The losses differ by "
            f"{row['loss_difference']:.1g}."
        )
    peer.show(report, ["architecture"], notes, JSON.value)


def scale() -> None:
    jax.config.update("jax_num_cpu_devices", max(scaling.COUNTS))
    jax.config.update("jax_platforms", "cpu")
    rows = scaling.measure(Config.from_dict(CONFIG.value))
    if JSON.value:
        device = "virtual devices of one CPU; compiled only, nothing ran"
        versions = installed(("jax", "jaxlib"))
        cli.print_json({"device": device, "versions": versions, "config": name(), "rows": rows})
        return
    columns = ["axis", "scaling", "devices", "tokens", "sent, MiB", "state, MiB"]
    columns += ["temporary, MiB", "GFLOPs"]
    cells = [
        [
            *(row["axis"], row["scaling"], str(row["devices"])),
            f"{row['batch_size']} x {row['sequence_length']}",
            *(f"{row[key] / 2**20:,.2f}" for key in ("sent", "state", "temporary")),
            f"{row['flops'] / 1e9:,.1f}",
        ]
        for row in rows
    ]
    Console().print(table(Grid(f"{name()}: a step, per device", columns, cells, texts=2)))


def main(_):
    if SCALING.value:
        return scale()
    process.keep_freed_memory()
    process.check_kernels(CONFIG.value.compute.attention)
    if PEER.value is not None:
        compare(PEER.value)
        return
    result = training.measure(CONFIG.value, ROUNDS.value or 5, STEPS.value)
    headline = training.headline(name(), CONFIG.value.model.architecture, result["training"])
    if JSON.value:
        cli.print_json(result | {"headline": headline})
        return
    console = Console()
    console.print(headline, markup=False)
    console.print(f"{result['device']}, jax {result['jax']}")
    rows = {k: v for k, v in result["training"].items() if isinstance(v, dict)}
    for made in (
        grid("training", rows),
        grid("compile time of the step, s, by loops", {"yoco_u": result["compile_s"]}),
        grid("window attention, W = 512", result["window_attention"]),
    ):
        console.print(table(made))


if __name__ == "__main__":
    cli.run(main)
