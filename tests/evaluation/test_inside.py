"""The task `inside`: which batch it measures, and what it shows. tests/analysis has the numbers."""

import jax
import numpy as np
import pytest

from tests.trained import model
from yocou_jax import analysis
from yocou_jax.config import MeshConfig
from yocou_jax.evaluation import inside
from yocou_jax.evaluation.options import Options
from yocou_jax.files import to_json
from yocou_jax.sharding import make_mesh


def measured(params, config, compute, batch) -> analysis.Inside:
    """Made up: layer i has the distance i / 10, and loop k the loss 4 - k."""
    assert batch.tokens.shape == (6, 12)  # on two devices
    assert np.asarray(batch.loss_weights).sum() == 5 * 12
    visits = list(config.program.visits())
    loops = [visit for visit in visits if visit.stage.loops and visit.layer == 0]
    return analysis.Inside(
        tuple(analysis.Application(v.name, v.loop, v.layer, i / 10) for i, v in enumerate(visits)),
        next(i for i, visit in enumerate(visits) if visit.stage.reads_global),
        tuple(
            analysis.Loop(k, v.name, v.loop, *(0.1, 0.2, 4.0 - k, 0.3), overlap, *(1.0, 2.0, 0.01))
            for k, (v, overlap) in enumerate(zip(loops, (None, (0.2, 0.6)), strict=False), start=1)
        ),
        7,
    )


@pytest.mark.parametrize(("architecture", "loops"), [("yoco_u", 2), ("yoco", None)])
def test_the_report_and_its_figure(architecture, loops, tmp_path, monkeypatch):
    monkeypatch.setattr(inside.analysis, "inside", measured)
    text = tmp_path / "a.txt"
    text.write_text("x" * 100)
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=1), jax.devices()[:2])
    options = Options(
        tmp_path, source=str(text), lengths=(12,), samples=5, loops=None if not loops else (loops,)
    )
    with jax.set_mesh(mesh):
        report = inside.run(model(architecture), mesh, options)
    runs = 2 * (loops or 1)  # of window layers; then there are two cross layers
    layers, *tables = report["tables"].values()
    assert [row["run"] for row in layers] == list(range(1, runs + 3))
    assert {row["layer"] for row in layers} == {1, 2}
    assert report["hand_over"] == runs + 1
    assert report["loops"] == ([loops] if loops else [])
    around = [report["scalars"][f"distance_{at}hand_over"] for at in ("before_", "", "after_")]
    assert around == [(runs - 1) / 10, runs / 10, (runs + 1) / 10]
    assert report["scalars"]["distance_beside_hand_over"] == (runs + 1) / 10
    ends = [report["scalars"].get(f"distance_{end}_loop_2") for end in ("first", "last")]
    assert ends == ([0.2, 0.3] if loops else [None, None])
    assert [[row["loss"] for row in table] for table in tables] == ([[3, 2]] if loops else [])
    overlaps = [row["overlap"] for table in tables for row in table]
    np.testing.assert_allclose(overlaps, [np.nan, 0.4] if loops else [])
    to_json(report)  # it has only values of JSON

    figure = inside.draw(report | {"program": "x", "config": {"model": {"architecture": "yoco"}}})
    curve, *lines = figure.axes[0].lines
    np.testing.assert_allclose(curve.get_xydata(), [(i + 1, i / 10) for i in range(runs + 2)])
    marks = {line.get_xdata()[0]: line.get_linestyle() for line in lines}
    begins = {2.5: "-"} if loops else {}
    assert marks == begins | {runs + 0.5: "--"}
    curves = [axes.lines[0].get_xydata().tolist() for axes in figure.axes[1:]]
    assert curves == ([[[1, 3], [2, 2]]] if loops else [])
