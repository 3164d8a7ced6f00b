"""Commands stay thin, and functions short: a longer one does two things."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = sorted((ROOT / "experiments").glob("*.py"))
FILES = [
    path
    for package in ("yocou_jax", "pallas_kernels", "benchmarks", "experiments")
    for path in sorted((ROOT / package).rglob("*.py"))
]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", COMMANDS, ids=named)
def test_a_file_of_experiments_has_at_most_150_lines(path):
    assert len(path.read_text().splitlines()) <= 150


@pytest.mark.parametrize("path", FILES, ids=named)
def test_a_function_has_at_most_60_lines(path):
    """From `def` to its last line, with its docstring and the functions inside."""
    functions = ast.FunctionDef | ast.AsyncFunctionDef
    found = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, functions)]
    lines = [(f.name, f.lineno, f.end_lineno - f.lineno + 1) for f in found]
    assert [row for row in lines if row[-1] > 60] == []
