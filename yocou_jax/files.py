"""Paths as people type them, and files that are whole or absent; text on disk is always UTF-8."""

import os
from pathlib import Path


def resolve(path: str | os.PathLike) -> Path:
    """The path that a user means: `~` and `~name` are home directories, as in a shell.

    Every path of a flag or a config field goes through here, so that all commands find the same
    file. A name such as `~nobody` that is no user stays as it is.
    """
    return Path(os.path.expanduser(path))


def write_atomically(path: Path, text: str) -> None:
    """All or nothing, also through a kill or a full disk: a new file takes the old one's place."""
    new = path.with_name(path.name + ".new")
    with new.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
