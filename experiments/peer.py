"""The flag --peer, and what a command prints of a comparison with another library."""

import sys
from typing import Any

from absl import flags

from benchmarks.peers import turns
from benchmarks.report import console, table
from benchmarks.training import PRODUCT
from experiments import cli

BUSY = 0.5  # a load (threads that run) above which a report warns


class _Python(flags.ArgumentParser):
    """Reads --peer as the Python that runs this command, and --peer=PATH as another one."""

    def parse(self, argument: str) -> str | None:
        return {"true": sys.executable, "false": None}.get(argument, argument)


def flag(help_text: str, flag_values: flags.FlagValues = flags.FLAGS) -> flags.FlagHolder:
    """Defines --peer[=PATH]. The value is the path of a Python, or None without the flag."""
    return flags.DEFINE(
        _Python(), "peer", None, help_text, flag_values, flags.ArgumentSerializer(), boolean=True
    )


def show(report: dict[str, Any], texts: list[str], notes: list[str], as_json: bool) -> None:
    """Prints the report as JSON, or as a table with the columns `texts` and lines about it."""
    if as_json:
        cli.print_json(report | {"notes": notes})
        return
    out, products = console(120), report["matmul_gflops"]
    for versions in (report["versions"], report["peer_versions"]):
        out.print(", ".join(f"{name} {v}" for name, v in versions.items()), markup=False)
    out.print(
        f"{report['device']}, {report['cores']} cores. {PRODUCT} x {PRODUCT} matrix "
        f"product: jax {products['ours']:.0f} GFLOP/s, PyTorch {products['theirs']:.0f} GFLOP/s"
    )
    if report["load_before"] > BUSY:
        # On busy cores PyTorch lost far more time than XLA.
        out.print(
            f"The load of the machine was {report['load_before']:.1f} before this began. The "
            "ratios mean something only on an idle machine."
        )
    for note in notes:
        out.print(note, markup=False)
    out.print(table(turns.grid(report, texts)))
