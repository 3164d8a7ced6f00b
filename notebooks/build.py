"""Builds the notebooks from their sources, and runs them.

    python -m notebooks.build            writes NAME.ipynb next to each NAME.py (make notebooks)
    python -m notebooks.build --check    is each one what its source gives, and does it run?

A source is in the percent format of jupytext: a line `# %%` begins a cell. A notebook is stored
without outputs, so that a change of a source is a small change of its notebook.

--check runs all notebooks. The results are in runs/notebooks, with
outputs: `jupyter nbconvert --to html` shows one as a page. NOTEBOOK_STEPS=2 makes them quick.
"""

import asyncio
import os
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError

FOLDER = Path(__file__).parent
SOURCES = sorted(FOLDER.glob("[0-9]*.py"))
EXECUTED = FOLDER.parent / "runs/notebooks"
LIMIT_S = 900  # for each cell, so that one that hangs ends
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def built(source: Path) -> nbformat.NotebookNode:
    """The notebook of a source. The same source gives the same notebook."""
    notebook = jupytext.read(source, fmt="py:percent")
    notebook.metadata = nbformat.NotebookNode(kernelspec=KERNEL)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for i, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{i}", nbformat.NotebookNode()  # jupytext draws ids
    return notebook


async def run(source: Path, turn: asyncio.Semaphore) -> bool:
    """Runs a notebook in a process of its own, and stores it with its outputs. Returns whether it
    had no error."""
    notebook, where = built(source), {"metadata": {"path": str(FOLDER)}}
    async with turn:
        start, error = time.monotonic(), ""
        try:
            await NotebookClient(notebook, timeout=LIMIT_S, resources=where).async_execute()
        except (CellExecutionError, CellTimeoutError) as found:
            error = f"\n{found}"
        nbformat.write(notebook, EXECUTED / f"{source.stem}.ipynb")
        print(f"{source.stem}: {time.monotonic() - start:.0f} s{error}", flush=True)
    return not error


async def run_all() -> bool:
    EXECUTED.mkdir(parents=True, exist_ok=True)
    # In this order, the first two find in a cache what the third has compiled.
    turn = asyncio.Semaphore(os.cpu_count() or 1)
    return all(await asyncio.gather(*(run(source, turn) for source in reversed(SOURCES))))


def main(flags: list[str]) -> None:
    if flags not in ([], ["--check"]):
        sys.exit(f"The only flag is --check, not {' '.join(flags)}.")
    if not flags:
        for source in SOURCES:
            nbformat.write(built(source), source.with_suffix(".ipynb"))
        return
    for source in SOURCES:
        text = source.with_suffix(".ipynb").read_text(encoding="utf-8")
        if text.rstrip("\n") != nbformat.writes(built(source)).rstrip("\n"):
            sys.exit(f"{source.stem}.ipynb is not what {source.name} gives: run `make notebooks`.")
    if not asyncio.run(run_all()):
        sys.exit("A notebook has an error, see above.")


if __name__ == "__main__":
    main(sys.argv[1:])
