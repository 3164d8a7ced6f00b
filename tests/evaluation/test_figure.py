"""The figures show what the results of the studies say."""

import json
from pathlib import Path

import pytest

from yocou_jax import plots
from yocou_jax.evaluation import figure

RESULTS = sorted((Path(__file__).parents[2] / "results").glob("*/studies/*.json"))


def report(runs: dict[str, list[dict]]) -> dict:
    """Entries with records of tasks, one for each seed, and the runs of a sweep with seed 0."""
    outlier = {"seed": 0, "curve": [(1, 9.0)], "evaluation": {"perplexity": {"scalars": {}}}}
    return {
        "seeds": [1, 2, 3],
        "entries": {
            name: {
                "runs": [
                    *(outlier | {"learning_rate": rate} for rate in (0.5, 0.1)),
                    *(
                        {"seed": i, "learning_rate": 0.1, "curve": [], "evaluation": r}
                        for i, r in enumerate(records, start=1)
                    ),
                ],
                "learning_rate": 0.1,
                "matched": ["tokens"],
                "amounts": {"tokens": 10},
            }
            for name, records in runs.items()
        },
    }


def test_tasks_have_a_panel_for_each_thing_that_they_measure(tmp_path):
    def hops(p, accuracy):
        bins = [{"first": 2, "last": 4, "accuracy": 0.9}, {"first": 6, "last": 6, "accuracy": 0.2}]
        return {"p": p, "accuracy": accuracy, "by_distance": bins, "reach": 5}

    scalars = {"accuracy_two_hop_length64": 0.5, "accuracy_two_hop_length8": 1.0, "other": 3}
    needle = {"needle": {"scalars": scalars}}
    several = {"hops": {"results": [hops(1, 1.0), hops(2, 0.5)]}}
    prefixes = {"perplexity": {"scalars": {"nats": 2, "nats_seeing_8": 4.0, "nats_seeing_16": 3.0}}}
    runs = [{"run": 1, "distance": 0.2}, {"run": 2, "distance": 0.1}]
    layers = {"inside": {"tables": {"layers": runs}, "hand_over": 2}}
    found = figure.panels(
        made := report(
            {
                "a": [several | needle, several | needle],
                "b": [{"hops": {"results": [hops(2, 0.7)]}} | prefixes | layers],
            }
        )
    )
    curves = {kind.title: panel.curves for kind, panel in found.items()}
    assert curves == {
        "right answers": {"a": [[(1, 1.0), (2, 0.5)]] * 2},
        "needle: two_hop": {"a": [[(8, 1.0), (64, 0.5)]] * 2},
        "2 hops, by distance": {"b": [[(3, 0.9), (6, 0.2)]]},
        "loss of the last tokens": {"b": [[(8, 4.0), (16, 3.0)]]},
        "angular distance": {"b": [[(1, 0.2), (2, 0.1)]]},
    }
    marks = {kind.title: panel.marks for kind, panel in found.items() if panel.marks}
    assert marks == {"2 hops, by distance": {"b": 5}, "angular distance": {"b": 2}}
    assert figure.draw(made, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert not figure.draw(report({"a": [{}]}), tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_study_has_a_figure(path):
    """With a curve of each entry that has run: its validation loss, or what a task has measured."""
    found = json.loads(path.read_text())
    shown = {name for panel in figure.panels(found).values() for name in panel.curves}
    assert shown == {name for name, entry in found["entries"].items() if entry["values"]}


def test_no_other_name_looks_like_a_program():
    names = [*plots.STYLES, *plots.VARIANTS, *(f"other_{i}" for i in range(24))]
    styles = plots.styles(names)
    looks = [(s["color"], s["marker"], s["linestyle"]) for s in styles.values()]
    assert len(set(looks)) == len(names)
    markers = {marker for _, marker in plots.STYLES.values()}
    assert all(styles[name]["marker"] not in markers for name in names if name.startswith("other"))
    for name in (name for name in plots.VARIANTS if not name.startswith("loops")):
        family = max((p for p in plots.STYLES if name.startswith(p)), key=len)
        assert styles[name]["color"] == styles[family]["color"]
    # Markers of lines alone are hardly seen if they are as small as the others.
    thin = {style["markersize"] for style in styles.values() if style["marker"] in "1234"}
    assert thin == {8}
    with pytest.raises(ValueError, match="There are only 24 styles for 25 other names"):
        plots.styles([*names, "one more"])
