"""p-hop induction (`Hops` in data/synthetic.py): which chains can a model follow, with which loops?

Only answers count: the letters between them are random. Every answer is predicted from the true
text before it, in one full forward pass. The texts are drawn anew; only short ones may have been
in training too.
"""

import math
from typing import Any

import numpy as np
from jax.sharding import Mesh

from yocou_jax.config import ModelConfig
from yocou_jax.data.synthetic import EVALUATION, Hops, follow
from yocou_jax.data.tokenizer import Tokenizer
from yocou_jax.errors import UserError
from yocou_jax.evaluation.answers import batches, bins, described, settings, summary
from yocou_jax.evaluation.options import Options, models, suffix
from yocou_jax.evaluation.perplexity import scores_of
from yocou_jax.mixers import MIXERS
from yocou_jax.pretrained import Pretrained
from yocou_jax.typing import Bool, Float, Int

SAMPLES = 512
PARTS = 32  # bins of a view by position or distance, at most
LEAST = 100  # answers of a bin, so that its 95% interval is at most 0.2 wide
TOKENS = 2**15  # of a batch: they limit its memory


def losses(
    model: Pretrained, tokens: Int[np.ndarray, "rows N1"], mesh: Mesh
) -> tuple[Float[np.ndarray, "rows N"], Bool[np.ndarray, "rows N"]]:
    """`perplexity.scores` of each token but the first. Call it inside `jax.set_mesh(mesh)`."""
    rows, length = tokens.shape
    found = [scores_of(model, tokens[i], mesh) for i in batches(rows, TOKENS // length)]
    nll, right = (np.concatenate(parts)[:rows] for parts in zip(*found, strict=True))
    return nll, right


def encode(task: Hops, texts: list[str], tokenizer: Tokenizer) -> Int[np.ndarray, "rows N1"]:
    """End-of-text and the tokens of each text. Raises UserError if a character is not a token."""
    encoded = tokenizer.encode_batch(texts)
    if any(len(ids) != task.length - 1 for ids in encoded):
        raise UserError(
            "The task hops needs a tokenizer with one token for each character, such as bytes; "
            f"with that of this model, {len(texts[0])} characters are {len(encoded[0])} tokens."
        )
    return np.insert(np.array(encoded), 0, tokenizer.eot_id, axis=1).astype(np.int32)


def guesses(x: Int[np.ndarray, "rows n"], at: Int[np.ndarray, "rows n"]) -> dict[str, float]:
    """Shares of the defined answers that guesses get right on these letters.

    x: letters. at: where the chain of each leads, or -1. Each guess is the most frequent answer:
    "constant" of all answers, "letter" after the same letter, "pair" after the same two letters.
    (Three letters decide the shortest hops: a guess that knows them begins to solve the task.)
    The answers of every second text decide the guesses, and they are tried on the other texts: on
    the same ones, a guess from few answers would look better than it is. NaN for a single text.
    """
    rows, i = np.nonzero(at >= 0)
    answers, tried = x[rows, at[rows, i]], rows % 2 == 1
    pairs = x[rows, i] + 64 * x[rows, np.maximum(i - 1, 0)]
    found = {}
    for name, known in {"constant": 0 * pairs, "letter": x[rows, i], "pair": pairs}.items():
        _, number = np.unique(known, return_inverse=True)
        table = np.zeros((number.max() + 1, 64), np.int64)
        np.add.at(table, (number[~tried], answers[~tried]), 1)
        right = (table.argmax(axis=1)[number] == answers)[tried]
        found[name] = float(right.mean()) if right.size else math.nan
    return found


def reach(config: ModelConfig) -> int | None:
    """How many tokens before its own a position of the self-decoder depends on: W - 1 for each run
    of a window layer. None: on all of them."""
    total = 0
    for _, stage in config.program.self_decoder:
        kernel = MIXERS[stage.mixer].kernel(config)
        if kernel is None or kernel.window is None:
            return None
        total += stage.depth * (kernel.window - 1)
    return total


def views(
    task: Hops,
    at: Int[np.ndarray, "rows n"],
    nll: Float[np.ndarray, "rows N"],
    right: Bool[np.ndarray, "rows N"],
) -> dict[str, Any]:
    """The defined answers: all, by position, and by how far back the letter of the answer is. Both
    are in tokens. Intervals are those of `clustered`: the answers of a text share its letters.

    at: see `follow`. nll, right: of all tokens of the texts.
    """
    answers = len(str(task.p)) + 1 + 2 * np.arange(task.num_answers)  # their places in a text
    rows, i = np.nonzero(at >= 0)
    nll, right = nll[rows, answers[i]], right[rows, answers[i]]
    found = summary(right, nll, rows)
    least = max(LEAST, -(-len(rows) // PARTS))
    for name, values in {"position": answers[i] + 1, "distance": 2 * (i - at[rows, i])}.items():
        found[f"by_{name}"] = [
            {"first": first, "last": last} | summary(right[these], nll[these], rows[these])
            for first, last, these in bins(values, least)
        ]
    return found


def run(loaded: Pretrained, mesh: Mesh, options: Options) -> dict:
    """The accuracy and loss at the answers, for each p, length and loop count.

    `options.source`: the texts, such as "hops(p=2,letters=4)"; default: those of the training, with
    other letters. `options.lengths`: tokens of a text with its end-of-text token; default: as in
    the source, and twice as many. `options.samples`: texts for each p and length.

    `results` of the report has the views of each case; `distances`, quantiles of how many tokens
    back the letter of an answer is; `guesses`, what is right by chance; and `reach` (which is
    no limit for the distance of an answer: the cross layers see all of the text).

    Raises UserError for a tokenizer that joins letters, or a length without a defined answer.
    """
    results, reads = [], ("p", "letters") if options.lengths else ("p", "letters", "length")
    asked = settings(options, Hops, [Hops()], reads)
    tasks = [
        Hops(task.p, task.letters, length, seed=options.seed)
        for task in asked
        for length in options.lengths or (task.length, 2 * task.length)
    ]
    for task in dict.fromkeys(tasks):
        x = task.draw(range(options.samples or SAMPLES), EVALUATION)
        tokens = encode(task, task.texts(x), loaded.tokenizer)
        x = x[:, : task.num_answers]
        at = follow(x, task.p)
        back = 2 * (np.arange(x.shape[1])[None] - at)[at >= 0]
        if not back.size:
            raise UserError(f"No answer of {task.name} is defined; give larger --lengths.")
        about = {"p": task.p, "letters": task.letters, "length": task.length}
        quantiles = {f"{q:g}": float(np.quantile(back, q)) for q in (0.1, 0.5, 0.9, 0.99)}
        facts = {"guesses": guesses(x, at), "distances": quantiles}
        for count, model in models(loaded, options):
            found = views(task, at, *losses(model, tokens, mesh))
            case = about | {"loops": count} | found
            results.append(case | facts | {"reach": reach(model.config)})
    return {
        "loops": list(options.loops or loaded.config.program.loop_counts),
        "source": described(asked, reads),
        "texts": options.samples or SAMPLES,
        "length": max(r["length"] for r in results),
        "seed": options.seed,
        "scalars": _scalars(results, options),
        "tables": {"answers": [_row(r) for r in results]},
        "results": results,
    }


def _scalars(results: list[dict], options: Options) -> dict[str, float]:
    """The names have the number of letters only if there are several numbers."""
    several = len({r["letters"] for r in results}) > 1
    found = {}
    for r in results:
        letters = f"_letters{r['letters']}" if several else ""
        which = f"p{r['p']}{letters}_length{r['length']}{suffix(r['loops'], options)}"
        found |= {f"{name}_{which}": r[name] for name in ("accuracy", "nats")}
    return found


def _row(result: dict) -> dict:
    shown = ("p", "letters", "length", "loops", "answers", "accuracy", "low", "high", "nats")
    row = {name: result[name] for name in shown}
    return row | {"best guess": max(result["guesses"].values())}


def draw(report: dict):
    """Accuracy by how far back the letter of the answer is: a row for each p, a column for each
    length, a line for each loop count. Dashed: the best guess."""
    from yocou_jax import plots

    results = report["results"]
    rows, columns = (
        [*dict.fromkeys(tuple(r[key] for key in keys) for r in results)]
        for keys in (("p", "letters"), ("length",))
    )
    figure, axes = plots.subplots(len(columns), len(rows), width=4, height=3)
    grid = np.array(axes).reshape(len(rows), len(columns))
    styles = plots.styles(str(r["loops"]) for r in results)
    for r in results:
        panel = grid[rows.index((r["p"], r["letters"])), columns.index((r["length"],))]
        style = styles[str(r["loops"])]
        middle = [(part["first"] + part["last"]) / 2 for part in r["by_distance"]]
        shares = [part["accuracy"] for part in r["by_distance"]]
        panel.plot(middle, shares, label=f"loops: {r['loops']}", **style)
        panel.axhline(max(r["guesses"].values()), color="gray", linestyle="--")
        panel.set(title=f"{r['p']} hops, {r['length']} tokens", ylim=(0, 1.02))
        panel.set(xlabel="tokens back to the answer's letter", ylabel="accuracy")
    grid[0, 0].legend()
    return figure
