"""The figure of a comparison: validation loss, and what its tasks have measured.

Thick lines are means over seeds. If they are few, thin ones are single seeds. All numbers come from
the report (findings.py).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from yocou_jax.study import AXES

FEW = 5  # curves of which the seeds are drawn too
Points = list[Sequence[float]]
# Axes that can be the x axis of a curve of validation losses, and the words there.
BUDGETS = {name: AXES[name].words for name in ("tokens", "flops", "tokens_layers")}


class Kind(NamedTuple):
    """What a panel shows. ends: its curves fall from so high that the ends could not be told
    apart."""

    title: str
    x: str
    y: str
    ends: bool = False


class Panel(NamedTuple):
    """curves: by entry, one for each seed. marks: by entry, an x that its curves are about."""

    curves: dict[str, list[Points]]
    marks: dict[str, float]


def mean(curves: list[Points]) -> Points:
    """The mean of several curves, at the x that all of them have."""
    found: dict[float, list[float]] = {}
    for x, y in (point for curve in curves for point in curve):
        found.setdefault(x, []).append(y)
    full = {x: values for x, values in sorted(found.items()) if len(values) == len(curves)}
    return [(x, sum(values) / len(values)) for x, values in full.items()]


# --- What a task has measured: its panels, each with a curve and perhaps a mark -------------------

Curves = Iterator[tuple[Kind, Points, float | None]]


def _loops(record: Mapping[str, Any]) -> Curves:
    """The axis of Figure 6."""
    rows = next(iter(record["tables"].values()))
    kind = Kind("validation, by loops", "loops in the evaluation", "bits/byte")
    yield kind, [(row["loops"], row["bits_per_byte"]) for row in rows], None


def _hops(record: Mapping[str, Any]) -> Curves:
    """Of several numbers of hops, the accuracy of each. Of one, the accuracy by how far back the
    answer is, and the reach of the looped window."""
    found = record["results"]
    if len(found) > 1:
        kind = Kind("right answers", "hops", "share")
        yield kind, [(one["p"], one["accuracy"]) for one in found], None
        return
    (one,) = found
    kind = Kind(f"{one['p']} hops, by distance", "tokens back to the answer", "share of right ones")
    bins = one["by_distance"]
    points = [((part["first"] + part["last"]) / 2, part["accuracy"]) for part in bins]
    reach = one["reach"]
    inside = reach is not None and points and reach <= points[-1][0]
    yield kind, points, reach if inside else None


def _needle(record: Mapping[str, Any]) -> Curves:
    """Table 4."""
    kinds: dict[str, Points] = {}
    for name, value in record["scalars"].items():
        if match := re.fullmatch(r"accuracy_(\w+)_length(\d+)", name):
            kinds.setdefault(match[1], []).append((int(match[2]), value))
    for name, points in kinds.items():
        yield Kind(f"needle: {name}", "tokens of the prompt", "share found"), sorted(points), None


def _perplexity(record: Mapping[str, Any]) -> Curves:
    """Figure 4."""
    seeing = re.compile(r"nats_seeing_(\d+)")
    found = ((seeing.fullmatch(name), value) for name, value in record["scalars"].items())
    points = [(int(match[1]), value) for match, value in found if match]
    if points:
        yield Kind("loss of the last tokens", "tokens that they see", "nats/token"), points, None


def _inside(record: Mapping[str, Any]) -> Curves:
    """Figure 8."""
    rows = next(iter(record["tables"].values()))
    points = [(row["run"], row["distance"]) for row in rows]
    yield (
        Kind("angular distance", "layer application", "of input and output, / pi"),
        points,
        record["hand_over"],
    )


TASKS = {
    "loops": _loops,
    "hops": _hops,
    "needle": _needle,
    "perplexity": _perplexity,
    "inside": _inside,
}


def runs(report: Mapping[str, Any], entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The runs that count: those of the seeds of the study, at the learning rate of the entry. The
    seed of the sweep, which has chosen the rate, is none of them."""
    chosen = (run for run in entry["runs"] if run["learning_rate"] == entry["learning_rate"])
    return [run for run in chosen if run["seed"] in report["seeds"]]


def panels(report: Mapping[str, Any]) -> dict[Kind, Panel]:
    """The panels of the figure.

    Validation loss against tokens, FLOPs, and tokens times layers (the FLOPs in Figure 2 of the
    paper). Each has the entries that match the reference on its axis, if there are at least
    two: others would have another budget, and their schedules would end elsewhere. Then what the
    tasks of the study have measured.
    """
    found: dict[Kind, Panel] = {}
    for axis, words in BUDGETS.items():
        panel = Panel({}, {})
        for name, entry in report["entries"].items():
            curves = [run["curve"] for run in runs(report, entry) if run["curve"]]
            if axis in entry["matched"] and curves:
                scale = entry["amounts"][axis] / entry["amounts"]["tokens"]
                panel.curves[name] = [[(x * scale, y) for x, y in curve] for curve in curves]
        if len(panel.curves) > 1:
            found[Kind(f"validation, equal {axis}", words, "bits/byte", ends=True)] = panel
    for name, entry in report["entries"].items():
        for run in runs(report, entry):
            for task, record in run["evaluation"].items():
                for kind, points, mark in TASKS[task](record) if task in TASKS else ():
                    panel = found.setdefault(kind, Panel({}, {}))
                    panel.curves.setdefault(name, []).append(points)
                    if mark is not None:
                        panel.marks[name] = mark
    return found


# --- The picture ----------------------------------------------------------------------------------


def draw(report: Mapping[str, Any], path: Path) -> bool:
    """Writes the figure as a PNG. False: there is nothing to draw, and no file. Needs
    matplotlib."""
    from yocou_jax import plots

    if not (found := panels(report)):
        return False
    columns = len(found) if len(found) < 4 else -(-len(found) // 2)
    rows = -(-len(found) // columns)
    figure, axes = plots.subplots(columns, rows, width=5.6, height=4.2)
    places = list(axes.flat) if len(found) > 1 else [axes]
    styles = plots.styles(report["entries"])
    for (kind, panel), at in zip(found.items(), places, strict=False):
        _draw(at, kind, panel, styles)
    for at in places[len(found) :]:
        at.set_visible(False)
    plots.save(figure, path)
    return True


def _draw(at, kind: Kind, panel: Panel, styles: Mapping[str, Mapping[str, Any]]) -> None:
    for name, curves in panel.curves.items():
        color = styles[name]["color"]
        for points in curves if len(curves) > 1 and len(panel.curves) <= FEW else ():
            at.plot(*zip(*points, strict=True), color=color, linewidth=0.6, alpha=0.5)
        at.plot(*zip(*mean(curves), strict=True), label=name, **styles[name])
        if name in panel.marks:
            at.axvline(panel.marks[name], color=color, linewidth=0.8, linestyle=":")
    if kind.ends:
        ends = [points[-1][1] for curves in panel.curves.values() for points in curves]
        room = max(max(ends) - min(ends), 0.02)
        at.set_ylim(min(ends) - 0.2 * room, max(ends) + 4 * room)
    at.set(title=kind.title, xlabel=kind.x, ylabel=kind.y)
    at.legend(fontsize=7)
