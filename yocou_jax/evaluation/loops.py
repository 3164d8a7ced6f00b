"""The depth curve: the loss of one model when its loops run another number of times."""

import numpy as np
from jax.sharding import Mesh

from yocou_jax.errors import UserError
from yocou_jax.evaluation.options import Options, trained_counts, with_loops
from yocou_jax.evaluation.perplexity import bits_per_byte, losses, mean
from yocou_jax.evaluation.text import open_text
from yocou_jax.pretrained import Pretrained

COUNTS = (1, 2, 3, 4, 6, 8)


def run(loaded: Pretrained, mesh: Mesh, options: Options) -> dict:
    """`options.loops`: the counts, by default COUNTS; the trained count is always measured too.
    `options.lengths`: the length of the sequences.

    "difference" is the loss minus that of the model as it was trained, on the same sequences. Its
    standard error is that of the mean difference, which is much smaller than those of the losses.

    Raises UserError if the program has no loop.
    """
    program, trained = loaded.config.program, trained_counts(loaded.config)
    if not trained:
        raise UserError(
            f"The program {program} has no loop, so it has no depth curve: every layer runs once."
        )
    text = open_text(loaded, options)
    usual = losses(loaded, text.sequences, mesh)
    # If two stages have different counts, no single count is the model as it was trained.
    counts = program.loop_counts
    own = counts[0] if len(counts) == 1 else None
    rows = []
    for count in sorted({*(options.loops or COUNTS), own} - {None}):
        other = with_loops(loaded, count)
        nll = usual if count == own else losses(other, text.sequences, mesh)
        loss, difference = mean(nll), mean(nll - usual)
        rows.append(
            {
                "loops": count,
                "trained": count in trained,
                **loss,
                "difference": difference["nats"],
                "difference_stderr": difference["stderr"],
                "bits_per_byte": bits_per_byte(loss["nats"], text.sequences),
            }
        )
    return {
        **text.facts(),
        "loops": [row["loops"] for row in rows],
        "as_trained": mean(usual),
        "scalars": {f"nats_{row['loops']}": row["nats"] for row in rows},
        "tables": {"nats per token by loop count": rows},
    }


def draw(report: dict):
    """The curve, with the standard errors of the differences. A star is a trained count, and the
    dashed line is the loss of the model as it was trained."""
    from yocou_jax import plots

    figure, axes = plots.subplots()
    (rows,) = report["tables"].values()
    style = plots.styles([architecture := report["config"]["model"]["architecture"]])[architecture]
    loops, nats, errors = (
        np.array([row[name] for row in rows], float)
        for name in ("loops", "nats", "difference_stderr")
    )
    axes.errorbar(loops, nats, errors, **style)
    axes.axhline(report["as_trained"]["nats"], linestyle="--", color="gray")
    marked = np.array([row["trained"] for row in rows])
    star = {"color": "black", "markersize": 12, "zorder": 5, "label": "trained"}
    axes.plot(loops[marked], nats[marked], "*", **star)
    axes.legend()
    axes.set_xticks(loops)
    axes.set(xlabel="loops", ylabel="nats per token", title=report["program"])
    return figure
