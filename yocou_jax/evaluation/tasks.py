"""The table of all tasks. The docstring of the package says what a task is."""

from collections.abc import Callable
from typing import Any, NamedTuple

from yocou_jax.evaluation import harness, hops, loops, needle, perplexity


class Task(NamedTuple):
    run: Callable[..., dict]
    draw: Callable[[dict], Any]


TASKS = {
    "perplexity": Task(perplexity.run, perplexity.draw),
    "loops": Task(loops.run, loops.draw),
    "hops": Task(hops.run, hops.draw),
    "needle": Task(needle.run, needle.draw),
    "harness": Task(harness.run, lambda report: None),
}
