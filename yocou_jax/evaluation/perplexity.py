"""The loss of a model on a text: as one number, by position, and after prefixes of many lengths."""

import dataclasses
import functools
import math

import jax
import numpy as np
from jax.sharding import Mesh

from yocou_jax.config import ModelConfig
from yocou_jax.data.pipeline import Batch, Sequences, Validation
from yocou_jax.evaluation.options import Options, models
from yocou_jax.evaluation.text import open_text
from yocou_jax.model import Compute, LanguageModel, head_matrix, resolve_compute
from yocou_jax.pretrained import Pretrained
from yocou_jax.progress import progress
from yocou_jax.sharding import batch_sharding, batch_ways
from yocou_jax.training.loss import token_scores
from yocou_jax.typing import Array, Bool, Float, Int, PyTree

TOKENS_AT_ONCE = 16_384  # on each device; a longer sequence is a batch of its own
LAST = 512  # tokens after the prefixes in Figure 4 of the paper; here at most a quarter of the text


@functools.partial(jax.jit, static_argnames=("config", "compute"))
def scores(
    params: PyTree, batch: Batch, *, config: ModelConfig, compute: Compute
) -> tuple[Float[Array, "B N"], Bool[Array, "B N"]]:
    """`token_scores` of a batch, by the forward pass of training: every layer, every position."""
    output = LanguageModel(config, compute).apply(
        {"params": params}, batch.tokens, batch.positions, batch.segment_ids
    )
    head = head_matrix(params, config)
    return token_scores(output.hidden, head, batch.targets)


def scores_of(
    model: Pretrained, ids: Int[np.ndarray, "rows N1"], mesh: Mesh
) -> tuple[Float[np.ndarray, "rows N"], Bool[np.ndarray, "rows N"]]:
    """`scores` of all ids but the first of each row, with the ids before it."""
    tokens, targets = jax.device_put((ids[:, :-1], ids[:, 1:]), batch_sharding(mesh))
    batch = Batch(tokens, targets, None, None, None)
    compute = resolve_compute(model.compute)
    return jax.device_get(scores(model.params, batch, config=model.config, compute=compute))


def rows_at_once(length: int, mesh: Mesh) -> int:
    """Sequences of `length` tokens in a batch over all devices of the mesh."""
    return batch_ways(mesh) * max(1, TOKENS_AT_ONCE // length)


def losses(model: Pretrained, text: Validation, mesh: Mesh) -> Float[np.ndarray, "rows N"]:
    """-log p of every target in nats. Call it inside `jax.set_mesh(mesh)`."""
    length, ways = text.rows[0][0].sequence_length, batch_ways(mesh)
    size = min(rows_at_once(length, mesh), -(-text.num_sequences // ways) * ways)
    compute = resolve_compute(model.compute)
    what = f"{text.num_sequences:,} sequences of {length:,} tokens"
    with progress(f"Reading {what} with {model.config.program}"):
        found = [
            jax.device_get(scores(model.params, batch, config=model.config, compute=compute)[0])
            for batch in text.batches(batch_sharding(mesh), size)
        ]
    return np.concatenate(found)[: text.num_sequences]


# --- Views of the losses --------------------------------------------------------------------------


def mean(nll: Float[np.ndarray, "rows N"]) -> dict[str, float]:
    """Mean nats per token, and its standard error with the rows as independent samples (NaN for a
    single row)."""
    rows = nll.mean(axis=1, dtype=np.float64)
    stderr = rows.std(ddof=1) / math.sqrt(len(rows)) if len(rows) > 1 else math.nan
    return {"nats": float(rows.mean()), "stderr": float(stderr)}


def bits_per_byte(nats: float, text: Validation) -> float:
    return nats * text.num_tokens / (math.log(2) * text.num_bytes)


def by_position(nll: Float[np.ndarray, "rows N"]) -> list[dict[str, float]]:
    """The loss of the targets that come after 1, 2, 3-4, 5-8, ... tokens of their sequence."""
    rows, last = [], 0
    while last < nll.shape[1]:
        first, last = last + 1, min(max(1, 2 * last), nll.shape[1])
        rows.append({"from": first, "to": last, **mean(nll[:, first - 1 : last])})
    return rows


def tail(sequences: Sequences, i: int, length: int) -> tuple[Sequences, int]:
    """The last `length` inputs of sequence i and their targets. They are sequence 0 of the result.
    With packing, positions still begin at the first token that is left."""
    begin = (i + 1) * sequences.sequence_length - length
    cut = dataclasses.replace(
        sequences,
        tokens=sequences.tokens[begin : begin + length + 1],
        starts=sequences.starts - begin,
        sequence_length=length,
    )
    return cut, 0


def in_one_document(sequences: Sequences, i: int) -> bool:
    """Whether all tokens of sequence i, and its last target, are of the same document."""
    begin = i * sequences.sequence_length
    later = np.searchsorted(sequences.starts, [begin, begin + sequences.sequence_length], "right")
    return bool(later[0] == later[1])


def seen_lengths(options: Options, length: int) -> tuple[list[int], int]:
    """Numbers of tokens that the model may see of a sequence of `length`, and how many tokens at
    its end count. By default, the shortest are these tokens alone; each next one is twice as long.
    """
    last = min(LAST, max(1, length // 4), *(options.lengths or ()))
    if options.lengths is not None:
        return sorted(set(options.lengths)), last
    doublings = range(int(math.log2(length / last)) + 1)
    return sorted({*(last * 2**i for i in doublings), length}), last


def run(loaded: Pretrained, mesh: Mesh, options: Options) -> dict:
    """`options.lengths`: numbers of tokens that the model may see before the last ones, and with
    them; the longest is the length of the sequences. `options.loops`: one count.

    What the text before the last tokens is worth (Figure 4 of the paper) is measured on the
    sequences that are inside one document, because the end of another one tells little. If these
    are fewer than two, it is measured on all.
    """
    ((_, loaded),) = models(loaded, options)
    text = open_text(loaded, options)
    rows, (lengths, last) = text.sequences, seen_lengths(options, text.length)
    nll, ends = losses(loaded, rows, mesh), []
    inside = np.array([in_one_document(*row) for row in rows.rows])
    if inside.sum() < 2:
        inside[:] = True
    chosen = [row for row, one in zip(rows.rows, inside, strict=True) if one]
    for length in lengths:
        short = dataclasses.replace(rows, rows=tuple(tail(*row, length) for row in chosen))
        seen = nll[inside] if length == text.length else losses(loaded, short, mesh)
        ends.append({"length": length, **mean(seen[:, -last:])})
    loss = mean(nll)
    loss["bits_per_byte"] = bits_per_byte(loss["nats"], rows)
    loss["perplexity"] = math.exp(min(loss["nats"], 700.0))  # of more, exp overflows
    seeing = {f"nats_seeing_{row['length']}": row["nats"] for row in ends}
    return {
        **text.facts(),
        "loops": loaded.config.program.loop_counts,
        "last": last,
        "sequences_of_last": len(chosen),
        "scalars": loss | seeing,
        "tables": {
            "all tokens": [loss],
            "by the number of tokens before, in the same sequence": by_position(nll),
            f"the last {last} tokens, if the model sees only `length` tokens": ends,
        },
    }


def draw(report: dict):
    """Both views: nats against the number of tokens that the model sees."""
    from yocou_jax import plots

    figure, panels = plots.subplots(2)
    style = plots.styles([architecture := report["config"]["model"]["architecture"]])[architecture]
    _, positions, ends = report["tables"].values()
    views = (
        ("by position in the sequence", positions, "to"),
        (f"the last {report['last']} tokens", ends, "length"),
    )
    for axes, (title, rows, column) in zip(panels, views, strict=True):
        axes.errorbar(
            *([row[name] for row in rows] for name in (column, "nats", "stderr")), **style
        )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set(xlabel="tokens that the model sees", ylabel="nats per token", title=title)
    figure.suptitle(report["program"])
    return figure
