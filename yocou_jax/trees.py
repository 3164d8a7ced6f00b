"""Dotted names for the leaves of trees, and the differences between two trees."""

from collections.abc import Mapping
from typing import Any

import jax

from yocou_jax.errors import UserError
from yocou_jax.typing import PyTree


def named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """(dotted path, leaf) in the order of jax.tree.leaves. Files and hashes use these paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(p, simple=True, separator="."), x) for p, x in leaves]


def flat(tree: Mapping, prefix: str = "") -> dict[str, object]:
    """One mapping with dotted names, made from nested mappings."""
    result = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping)
        result |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return result


def differences(old: Mapping, new: Mapping, ignore: tuple[str, ...] = ()) -> list[str]:
    """`name: old -> new` for every name with two different values, or on one side only."""
    shown = {}
    for name in sorted((old.keys() | new.keys()) - set(ignore)):
        if name not in old or name not in new or old[name] != new[name]:
            shown[name] = [repr(side[name]) if name in side else "absent" for side in (old, new)]
    return [f"{name}: {a} -> {b}" for name, (a, b) in shown.items()]


def check_arrays(owner: str, found: Mapping, source: str, wanted: Mapping) -> None:
    """Raises UserError if `found` and `wanted`, which describe arrays by their names, differ. The
    sentence says "OWNER has other arrays than SOURCE", and the first differences."""
    if differing := differences(found, wanted):
        raise UserError(
            f"{owner} has other arrays than {source} ({len(differing)} differ): "
            f"{'; '.join(differing[:8])}."
        )
