"""The interface through which a run reports its events."""

from collections.abc import Mapping


class Reporter:
    """Receives the events of a run. This class ignores them. console.Console shows them on a
    terminal."""

    def banner(self, title: str, sections: Mapping[str, Mapping[str, object]]) -> None:
        """Before the first step: the facts of the run, by section."""

    def start(self, total_steps: int) -> None:
        """Training begins. It ends at the step `total_steps`."""

    def update(self, step: int, values: Mapping[str, float | None]) -> None:
        """The metrics of a step, under the names in metrics.py."""

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        """The metrics of the evaluators after a step."""

    def notice(self, text: str) -> None:
        """A sentence for the user."""

    def sample(self, text: str, title: str) -> None:
        """A text that the model has written."""
