"""Paths that users type, and files that are either complete or absent. All text is UTF-8."""

import os
from pathlib import Path


def expand_path(path: str | os.PathLike) -> Path:
    """The path that a user means: `~` and `~name` are home directories, as in a shell.

    Every path in a flag or a config field is expanded here, so that all commands find the same
    file. If no user has that name (`~nobody`), the path stays unchanged.
    """
    return Path(os.path.expanduser(path))


def write_atomically(path: Path, text: str) -> None:
    """Writes a new file and renames it. A kill or a full disk leaves the old file unchanged."""
    new = path.with_name(path.name + ".new")
    with new.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
