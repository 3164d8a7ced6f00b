"""Prints parameters, FLOPs and KV cache of a config, and of the same sizes in each architecture.

python -m experiments.account --config=configs/yocou_1b.py [--json] [--lengths=8192,32768]
"""

import sys

from absl import flags
from rich.console import Console
from rich.table import Table

from experiments import cli
from yocou_jax import accounting
from yocou_jax.config import MAX_INT32 as MAX_LENGTH
from yocou_jax.config import Config
from yocou_jax.errors import UserError, shown
from yocou_jax.program import ARCHITECTURES

CONFIG = cli.config_file("configs/yocou_1b.py", "Config file with the sizes.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of tables.")
LENGTHS = flags.DEFINE_list(
    "lengths", ["8192", "16384", "32768", "65536", "131072", "262144"], "Lengths in tokens."
)


def _lengths() -> tuple[int, ...]:
    try:
        lengths = tuple(int(n) for n in LENGTHS.value)
    except ValueError:
        lengths = ()
    if not lengths or min(lengths) < 1 or max(lengths) > MAX_LENGTH:
        raise UserError(
            f"--lengths={shown(','.join(LENGTHS.value))} must be whole numbers from 1 to "
            f"{MAX_LENGTH}."
        )
    return lengths


def _table(title: str, reports: dict, lengths, cell) -> Table:
    table = Table("architecture", title=title, title_justify="left")
    for n in lengths:
        table.add_column(f"{n // 1024}K" if n % 1024 == 0 else str(n), justify="right")
    for name, report in reports.items():
        table.add_row(name, *(cell(report, str(n)) for n in lengths))
    return table


def main(_):
    config, lengths = Config.from_dict(CONFIG.value).model, _lengths()
    layers = config.program.layers
    halves = [name for name, template in ARCHITECTURES.items() if "{half}" in template]
    left_out = halves if layers % 2 else []
    if left_out:
        note = f"Left out, because {layers} layers have no two equal halves"
        print(f"{note}: {', '.join(left_out)}.", file=sys.stderr)
    reports = {
        name: accounting.report(accounting.sibling(config, name), lengths)
        for name in ARCHITECTURES
        if name not in left_out
    }
    if config.architecture not in reports:
        reports[config.architecture] = accounting.report(config, lengths)
    if JSON.value:
        cli.print_json({"config": str(config.program), "architectures": reports})
        return

    console = Console(width=None if Console().is_terminal else 120)
    for name, report in reports.items():
        parts = report["params"]
        total = Table("part", title=f"{name} = {report['program']}", title_justify="left")
        total.add_column("parameters", justify="right")
        for part, count in parts.items():
            total.add_row(part, f"{count:,}", style="bold" if part == "total" else None)
        console.print(total)
    console.print(
        _table(
            "KV cache, MiB per sequence (bfloat16)",
            reports,
            lengths,
            lambda r, n: f"{r['kv_mib'][n]:,.6g}",
        )
    )
    for kind in ("train", "prefill", "decode"):
        console.print(
            _table(
                f"{kind} GFLOP per token",
                reports,
                lengths,
                lambda r, n, kind=kind: f"{r['flops_per_token'][kind][n] / 1e9:,.3f}",
            )
        )


if __name__ == "__main__":
    cli.run(main)
