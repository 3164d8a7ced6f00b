"""Modules import only from their own level or from levels before it, without cycles."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The longest name that fits decides the level of a module. It imports from this one or one before.
LEVELS = (
    {
        *("yocou_jax", "yocou_jax.errors", "yocou_jax.files", "yocou_jax.typing"),
        *("yocou_jax.progress", "yocou_jax.foreign", "yocou_jax.plots"),
    },
    {
        "yocou_jax.program",
        "yocou_jax.loops",
        "yocou_jax.mixers",
        "yocou_jax.config",
        "yocou_jax.accounting",
        "yocou_jax.study",
        "configs",
    },
    {"pallas_kernels", "yocou_jax.hardware"},
    {
        *("yocou_jax.trees", "yocou_jax.sharding", "yocou_jax.manifest", "yocou_jax.checkpoint"),
        "yocou_jax.device_memory",
    },
    {"yocou_jax.model", "yocou_jax.data"},
    {"yocou_jax.inference", "yocou_jax.pretrained"},
    {"yocou_jax.training", "yocou_jax.analysis"},
    {"yocou_jax.evaluation"},
    {"benchmarks"},
    {"experiments"},
)
PACKAGES = ("yocou_jax", "pallas_kernels", "benchmarks", "experiments", "configs")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imports(path: Path) -> set[str]:
    """Modules of this repository that a file imports, without those for a type checker only."""
    tree, found = ast.parse(path.read_text()), set()
    hints = [
        n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)
    ]
    skipped = {id(node) for hint in hints for node in ast.walk(hint)}
    for node in ast.walk(tree):
        if id(node) not in skipped and isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {n if n in MODULES else node.module for n in names}
        elif id(node) not in skipped and isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & MODULES.keys()


def level(module: str) -> int:
    fitting = [
        (len(name), i)
        for i, names in enumerate(LEVELS)
        for name in names
        if f"{module}.".startswith(f"{name}.")
    ]
    return max(fitting)[1]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_its_level_or_before(module):
    above = [name for name in imports(MODULES[module]) if level(name) > level(module)]
    assert not above


def test_the_kernels_do_not_import_the_library():
    for module, path in MODULES.items():
        if module.startswith("pallas_kernels"):
            assert not any(name.startswith("yocou_jax") for name in imports(path)), module


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("yocou_jax.program, yocou_jax.accounting", "jax"),
        # It takes a second, and a start on a CPU does not need it.
        ("yocou_jax.training.loop", "jax.experimental.pallas"),
    ],
)
def test_what_is_not_imported(modules, absent):
    code = f"import sys, {modules}; sys.exit({absent!r} in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_there_is_no_import_cycle():
    graph = {module: imports(path) - {module} for module, path in MODULES.items()}
    # The __init__ of a package imports its modules. They import each other, but not the package.
    graphlib.TopologicalSorter(graph).prepare()


def test_every_module_has_a_level():
    for module in MODULES:
        assert module.count(".") == 0 or level(module) > 0 or module in LEVELS[0], module
