"""Paths that users type, and files that are either complete or absent. All text is UTF-8."""

import json
import math
import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np


def expand_path(path: str | os.PathLike) -> Path:
    """The path that a user means: `~` and `~name` are home directories, as in a shell.

    Every path in a flag or a config field is expanded here, so that all commands find the same
    file. If no user has that name (`~nobody`), the path stays unchanged.
    """
    return Path(os.path.expanduser(path))


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a new file and renames it. A kill or a full disk leaves the old file unchanged. Only
    one process may write a path at a time."""
    new = path.with_name(path.name + ".new")
    with new.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def write_npz(path: Path, **arrays: Any) -> None:
    """Writes an .npz file. Several processes may write the same path: one of the files stays, and
    it is complete. Raises OSError."""
    scratch = path.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        with open(scratch, "wb") as file:
            np.savez(file, **arrays)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def to_json(value: Any, indent: int | None = None) -> str:
    """`value` as JSON text. A number that is not finite becomes null, because JSON has no NaN."""

    def finite(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: finite(item) for key, item in x.items()}
        if isinstance(x, list | tuple):
            return [finite(item) for item in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return json.dumps(finite(value), indent=indent, allow_nan=False)
