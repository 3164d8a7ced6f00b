"""Lets the tests check all annotations (types and shapes) in every call of our functions."""

from pathlib import Path

import jaxtyping
from beartype import BeartypeConf, beartype

ROOT = Path(__file__).parent.parent
# Triton compiles the source of its kernels, which must be plain functions.
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for package in ("yocou_jax", "pallas_kernels", "benchmarks")
    for path in (ROOT / package).rglob("*.py")
    if path.stem not in ("__init__", "triton_kernels")
]

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int may stand for a float


def check(function):
    """Decorates a function with beartype, but not `__init__`: JAX makes copies of dataclasses with
    other objects in their fields (shardings, axes, arrays that a scan has stacked)."""
    return function if function.__name__ == "__init__" else _beartype(function)


def install():
    """Call this before the first import of our modules."""
    jaxtyping.install_import_hook(MODULES, "tests.checked.check")
