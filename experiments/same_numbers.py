"""Checks that this tree computes the same numbers as another revision, bit for bit.

    python -m experiments.same_numbers HEAD~3 [--steps=20] [--cases=yoco_u,experts] [--json]

Each case is a tiny model. The commands of this tree (with uncommitted changes) and those of
REVISION train it, account for it and generate text with it. Then it compares all numbers in the
rows of metrics, the hash of the final parameters, greedy text, the bytes of its cache and the
report of accounting. If something differs, the exit code is 1 and a table shows it. Both trees run
on this machine with the installed packages, because another machine or another jax may give other
numbers.
"""

from absl import flags
from rich.console import Console
from rich.table import Table

from benchmarks import same_numbers
from experiments import cli
from yocou_jax.errors import UserError

STEPS = flags.DEFINE_integer("steps", 20, "Updates of each training run.", lower_bound=5)
CASES = flags.DEFINE_list("cases", [], "Names of cases. Default: all.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of a table.")


def main(arguments):
    if len(arguments) != 2:
        raise UserError("Name one revision to compare with, such as HEAD or a commit.")
    cases = CASES.value or list(same_numbers.ALL)
    if unknown := [case for case in cases if case not in same_numbers.ALL]:
        raise UserError(
            f"There is no case '{unknown[0]}'; the cases are {', '.join(same_numbers.ALL)}."
        )
    found = same_numbers.compare(arguments[1], cases, STEPS.value)
    same = not any(case["differ"] for case in found.values())
    if JSON.value:
        cli.print_json({"revision": arguments[1], "same": same, "cases": found})
        return 0 if same else 1
    table = Table("case", "figures", "differ", "the first that differs: here, there")
    for case, result in found.items():
        first = next(iter(result["differ"].items()), None)
        words = "" if first is None else f"{first[0]}: {first[1][0]!s:.60}, {first[1][1]!s:.60}"
        table.add_row(case, str(result["compared"]), str(len(result["differ"])), words)
    Console(width=None if Console().is_terminal else 160).print(table)
    print("The same numbers." if same else "Other numbers.")
    return 0 if same else 1


if __name__ == "__main__":
    cli.run(main, arguments=1)
