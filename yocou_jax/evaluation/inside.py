"""What happens inside a model: Figure 8 of the paper, and what each loop does."""

import dataclasses
import math

import numpy as np
from jax.sharding import Mesh

from yocou_jax import analysis
from yocou_jax.evaluation.options import Options, models
from yocou_jax.evaluation.text import open_text
from yocou_jax.model import resolve_compute
from yocou_jax.pretrained import Pretrained
from yocou_jax.sharding import batch_sharding, batch_ways

SEQUENCES = 8  # they are one batch, and a backward pass of it must fit into memory
LAYERS, LOOPS = "angular distance of input and output, layer by layer", "after each loop"


def run(loaded: Pretrained, mesh: Mesh, options: Options) -> dict:
    """`options.samples`: number of sequences, by default SEQUENCES. `options.loops`: one count, by
    default that of the model. `options.lengths`: the length of the sequences.

    `analysis.Loop` explains the columns.
    """
    ((_, loaded),) = models(loaded, options)
    samples = options.samples or SEQUENCES
    text = open_text(loaded, dataclasses.replace(options, samples=samples))
    ways = batch_ways(mesh)
    size = -(-text.sequences.num_sequences // ways) * ways
    batch = next(text.sequences.batches(batch_sharding(mesh), size))
    found = analysis.inside(loaded.params, loaded.config, resolve_compute(loaded.compute), batch)
    layers = [
        {
            "run": i,
            "stage": a.stage,
            "loop": a.loop + 1,
            "layer": a.layer + 1,
            "distance": a.distance,
        }
        for i, a in enumerate(found.applications, start=1)
    ]
    tables = {LAYERS: layers} | ({LOOPS: _loops(found)} if found.loops else {})
    return {
        **text.facts(),
        "loops": loaded.config.program.loop_counts,
        "hand_over": None if found.hand_over is None else found.hand_over + 1,  # as "run"
        "receptive_field": found.receptive_field,
        "overlap_by_layer": [loop.overlap for loop in found.loops],
        "scalars": found.scalars() | _ends(found) | _neighbors(found),
        "tables": tables,
    }


def _ends(found: analysis.Inside) -> dict[str, float]:
    """The distances of the first and of the last layer of each loop. In Figure 8 of the paper, they
    fall inside each loop."""
    ends = {}
    for loop in found.loops:
        run = [a for a in found.applications if (a.stage, a.loop) == (loop.stage, loop.loop)]
        ends[f"distance_first_loop_{loop.number}"] = run[0].distance
        ends[f"distance_last_loop_{loop.number}"] = run[-1].distance
    return ends


def _neighbors(found: analysis.Inside) -> dict[str, float]:
    """The distances of the last layer before the hand-over (layer 30 of 40 with three loops, in
    Figure 8 of the paper), of the first one after it, and the larger one of both ("beside"), which
    a spike is above."""
    if (at := found.hand_over) is None:
        return {}
    places = {"before": at - 1, "after": at + 1}
    layers = found.applications
    near = {name: layers[i].distance for name, i in places.items() if i < len(layers)}
    near["beside"] = max(near.values())
    return {f"distance_{name}_hand_over": distance for name, distance in near.items()}


def _loops(found: analysis.Inside) -> list[dict]:
    columns = ["stage", "distance", "step", "loss", "kl", "radius", "radius_max", "residual"]
    rows = [
        {"loop": loop.number} | {name: getattr(loop, name) for name in columns}
        for loop in found.loops
    ]
    if any(loop.overlap for loop in found.loops):
        for row, loop in zip(rows, found.loops, strict=True):
            row["overlap"] = float(np.mean(loop.overlap or math.nan))
    return rows


def draw(report: dict):
    """Left: Figure 8. Vertical lines are where a loop begins; the dashed one is the hand-over to
    the cross-decoder. Right, if there are loops: the loss if the text is decoded after each."""
    from yocou_jax import plots

    layers, loops = (report["tables"].get(title, []) for title in (LAYERS, LOOPS))
    figure, panels = plots.subplots(columns=2 if loops else 1)
    axes = panels[0] if loops else panels
    style = next(iter(plots.styles([report["config"]["model"]["architecture"]]).values()))
    axes.plot([row["run"] for row in layers], [row["distance"] for row in layers], **style)
    for row in layers:
        if row["layer"] == 1 and row["run"] > 1:
            dashed = row["run"] == report["hand_over"]
            axes.axvline(row["run"] - 0.5, color="gray", linestyle="--" if dashed else "-", lw=0.8)
    axes.set(xlabel="layer, in the order of the runs", ylabel="angular distance")
    if loops:
        panels[1].plot([row["loop"] for row in loops], [row["loss"] for row in loops], **style)
        panels[1].set_xticks([row["loop"] for row in loops])
        panels[1].set(xlabel="decoded after loop", ylabel="nats per token")
    figure.suptitle(report["program"])
    return figure
