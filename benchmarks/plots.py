"""What profile_inference measured, as curves."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from benchmarks import comparison
from yocou_jax import plots


def draw(report: dict[str, Any], kind: str, axes: Axes) -> bool:
    """The curves of one kind of measurement on log axes. If there are none, a sentence says so, and
    the result is False."""
    for name, style in plots.styles(report["programs"]).items():
        points = comparison.speeds(report, kind, name)
        axes.plot(list(points), list(points.values()), label=name, **style)
        rows = comparison.curve(report, kind, name).items()
        known = {n: row["paper"] for n, row in rows if row["paper"]}
        axes.plot(list(known), list(known.values()), "--", color=style["color"], alpha=0.6)
    if not any(len(line.get_xdata()) for line in axes.lines):
        # Log axes cannot be drawn without a value.
        axes.text(0.5, 0.5, "Nothing was measured.", ha="center", transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
        return False
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(report["lengths"], [comparison.short(n) for n in report["lengths"]])
    axes.set_xlabel("prompt, tokens")
    return True


def plot(report: dict[str, Any], path: Path) -> None:
    """Three panels with the length on the x axis. For the paper's model, its figures are dashed."""
    figure, panels = plots.subplots(3, height=4.6)
    measured = []
    for axes, (kind, title) in zip(panels, comparison.TITLES.items(), strict=True):
        axes.set_title(title.split(";")[0])
        if draw(report, kind, axes):
            measured.append(axes)
    dashed = "; dashed: the paper's, H100" if report["papers_model"] else ""
    figure.suptitle(f"{report['device']}, {report['dtype']}{dashed}")
    if measured:
        measured[0].legend()
    plots.save(figure, path)
