"""Results as tables, pages and files."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from yocou_jax.errors import UserError
from yocou_jax.files import expand_path, to_json, write_atomically


class Grid(NamedTuple):
    """A table: a title, column names and rows of text. texts: how many columns have words. The
    columns after these have numbers and are aligned at the right. None: all columns have words."""

    title: str
    columns: Sequence[str]
    rows: list[list[str]]
    texts: int | None = None


def table(grid: Grid) -> Table:
    """The grid for a terminal."""
    made = Table(title=grid.title, title_justify="left")
    texts = len(grid.columns) if grid.texts is None else grid.texts
    for number, column in enumerate(grid.columns):
        made.add_column(column, justify="left" if number < texts else "right")
    for row in grid.rows:
        made.add_row(*row)
    return made


def console(width: int) -> Console:
    """A console as wide as the terminal, or of `width` columns if there is no terminal."""
    return Console(width=None if Console().is_terminal else width)


def page(
    title: str,
    paragraphs: Iterable[str],
    grids: Iterable[Grid],
    lists: Iterable[tuple[str, Sequence[str]]],
) -> str:
    """A page of Markdown. A list has a heading and entries; it is left out if it has no entry. A
    "|" in a grid is a letter, and ends no cell."""
    lines = [f"# {title}"]
    for paragraph in paragraphs:
        lines += ["", paragraph]
    for grid in grids:
        head, *rows = (_cells(row) for row in (grid.columns, *grid.rows))
        lines += ["", f"## {grid.title}", "", head, "|" + " --- |" * len(grid.columns), *rows]
    for heading, entries in lists:
        if entries:
            lines += ["", f"## {heading}", "", *(f"* {entry}" for entry in entries)]
    return "\n".join(lines) + "\n"


def _cells(row: Sequence[str]) -> str:
    cells = " | ".join(cell.replace("|", r"\|") for cell in row)
    return f"| {cells} |"


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Writes the report; the file is complete at any time."""
    write_atomically(path, to_json(report, indent=1) + "\n")


def plain_name(device: str) -> str:
    """The name of a device as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def output_folder(name: str) -> Path:
    """The folder that --out names, made if it is missing.

    Raises:
      UserError: it is a file.
    """
    folder = expand_path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"--out={folder} is not a folder.") from error
    return folder


def output_file(flag: str, name: str | None, kinds: Iterable[str]) -> Path | None:
    """The file that a flag names; None if the flag is not given.

    Raises:
      UserError: its folder does not exist, or its suffix is not one of `kinds`.
    """
    path = None if name is None else expand_path(name)
    if path is not None and (not path.parent.is_dir() or path.suffix[1:] not in kinds):
        raise UserError(
            f"--{flag}={name} must be a file in a folder that exists, of one of the kinds "
            f"{', '.join(sorted(kinds))}."
        )
    return path
