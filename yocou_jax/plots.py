"""One style for all figures: legible in print and for color-blind readers (Okabe and Ito's colors).

A program has the same color and marker in every figure.
"""

import os
from collections.abc import Iterable
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

# Okabe and Ito's eight colors without yellow, which is too light on paper: gray takes its place.
STYLES = {
    "yoco_u": ("#D55E00", "o"),
    "yoco": ("#E69F00", "s"),
    "transformer": ("#000000", "D"),
    "universal_transformer": ("#0072B2", "^"),
    "rins": ("#56B4E9", "v"),
    "upper_loop": ("#009E73", "P"),
    "upper_loop_unshared": ("#CC79A7", "X"),
    "parscale": ("#777777", "*"),
}
# loops_N of several studies: a color and a marker for each number of loops.
LOOPS = (
    *(("1", "yoco", "1"), ("2", "universal_transformer", "2"), ("3", "yoco_u", "3")),
    *(("4", "upper_loop", "4"), ("5", "upper_loop_unshared", "4"), ("random", "transformer", "d")),
)
THIN = "1234"  # markers of three lines, which are hardly seen at the size of the others
# Entries of the studies that are a program of STYLES with other sizes or another budget.
VARIANTS = {
    "yoco_deep": (STYLES["yoco"][0], "p", "--"),
    "yoco_equal_flops": (STYLES["yoco"][0], "<", "--"),
    "yoco_equal_layers": (STYLES["yoco"][0], ">", ":"),
    "yoco_u_deep": (STYLES["yoco_u"][0], "p", "--"),
    "rins_late": (STYLES["rins"][0], "<", "--"),
    **{f"loops_{n}": (STYLES[like][0], marker, "-") for n, like, marker in LOOPS},
}
# Of all other names: no marker of STYLES, so that none of them is taken for one of its programs.
OTHERS = (("H", "-"), ("d", "--"), ("h", ":"))
SETTINGS = {"font.size": 9, "axes.grid": True, "grid.alpha": 0.3}


def styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """`color`, `marker`, `linestyle` and `markersize` of each name, all different. A name that
    neither STYLES nor VARIANTS has gets a color with a marker that no program has.

    Raises:
      ValueError: there are more names than styles.
    """
    names = list(dict.fromkeys(names))
    chosen = {name: (*STYLES[name], "-") for name in names if name in STYLES}
    chosen |= {name: VARIANTS[name] for name in names if name in VARIANTS}
    colors = [color for color, _ in STYLES.values()]
    left = [(color, marker, line) for marker, line in OTHERS for color in colors]
    others = [name for name in names if name not in chosen]
    if len(others) > len(left):
        raise ValueError(f"There are only {len(left)} styles for {len(others)} other names.")
    chosen |= dict(zip(others, left, strict=False))
    keys = ("color", "marker", "linestyle", "markersize")
    sizes = {name: 8 if chosen[name][1] in THIN else 4 for name in names}
    return {name: dict(zip(keys, (*chosen[name], sizes[name]), strict=True)) for name in names}


def subplots(columns: int = 1, rows: int = 1, *, width: float = 5.0, height: float = 3.6):
    """Returns a figure without a window, and its axes as `Figure.subplots` does. width, height: of
    each of the axes, in inches."""
    with rc_context(SETTINGS):
        figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
        return figure, figure.subplots(rows, columns)


def save(figure: Figure, path: str | os.PathLike) -> None:
    """Writes a file in the format of its suffix. A PNG has no date and no version, so that the same
    figure gives the same bytes."""
    png = os.fspath(path).lower().endswith(".png")  # only this format knows the key
    figure.savefig(path, dpi=150, metadata={"Software": None} if png else None)
