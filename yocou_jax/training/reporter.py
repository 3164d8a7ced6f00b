"""Who is told what a run does."""

from collections.abc import Mapping


class Reporter:
    """Told of everything by the loop, and silent; console.Console shows it on a terminal."""

    def banner(self, title: str, sections: Mapping[str, Mapping[str, object]]) -> None:
        """Before the first step: what the run is, section by section."""

    def start(self, total_steps: int) -> None:
        """Training begins; it ends at `total_steps`."""

    def update(self, step: int, values: Mapping[str, float | None]) -> None:
        """The metrics of a step, by the names of metrics.py."""

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        """What the evaluators found after a step."""

    def notice(self, text: str) -> None:
        """A sentence for the user."""

    def sample(self, text: str, title: str) -> None:
        """Text that the model has written."""
