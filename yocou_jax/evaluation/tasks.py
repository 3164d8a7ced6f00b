"""The table of all tasks. The docstring of the package says what a task is.

It imports no jax, so that a command can name the tasks before jax starts.
"""

import dataclasses
import importlib
from typing import Any


@dataclasses.dataclass(frozen=True)
class Task:
    """name: of its module in this package. reads: the fields of `Options` that it reads. one: those
    of them that may have one value only."""

    name: str
    reads: tuple[str, ...]
    one: tuple[str, ...] = ()

    def run(self, *args: Any) -> dict:
        return self._module.run(*args)

    def draw(self, report: dict) -> Any:
        return self._module.draw(report)

    @property
    def _module(self) -> Any:
        return importlib.import_module(f"yocou_jax.evaluation.{self.name}")


_TEXT = ("loops", "source", "lengths", "samples")
_TASKS = (
    Task("perplexity", _TEXT, one=("loops",)),
    Task("loops", _TEXT, one=("lengths",)),
    Task("inside", _TEXT, one=("loops", "lengths")),
    Task("hops", (*_TEXT, "seed")),
    Task("needle", (*_TEXT, "seed")),
    Task(
        "harness",
        ("loops", "samples", "seed", "harness", "few_shot", "end_of_text"),
        one=("loops",),
    ),
)
TASKS = {task.name: task for task in _TASKS}
