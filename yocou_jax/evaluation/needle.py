"""Needles in haystacks (`Needle` in data/synthetic.py): can a model find what a long text says?

As in RULER (Table 4 of the paper has its S-NIAH-1 and S-NIAH-2), the model continues the text after
the question, greedily. An answer is right if the continuation begins with the right number. A
length counts all tokens: those of the text, the question and the answer.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from yocou_jax.data.sources import open_corpus
from yocou_jax.data.synthetic import (
    EVALUATION,
    INTRODUCTION,
    Needle,
    Quiz,
    draw_units,
    hide,
    lines_of,
    make_quiz,
)
from yocou_jax.data.tokenizer import Tokenizer
from yocou_jax.errors import UserError
from yocou_jax.evaluation.answers import accuracy, batches, described, settings
from yocou_jax.evaluation.options import Options, models, suffix
from yocou_jax.inference import generate, prepare
from yocou_jax.pretrained import Pretrained
from yocou_jax.typing import Int

LENGTHS, SAMPLES = (256, 512, 1024, 2048), 20
READS = ("kind", "haystack")  # of the settings of a Needle; options give the others
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # shares of the haystack before the needle
GUESSES, NEARBY, DRAFTS = 4, 100, 20  # of the search for a text with exactly so many tokens
TOKENS = 2**15  # of a batch: they limit its memory


class TooShort(UserError):
    """A length has no room for a question."""


class Exam(NamedTuple):
    """Questions of one length: quizzes, their prompts (token ids), and the most tokens that one of
    their answers has."""

    quizzes: list[Quiz]
    prompts: list[np.ndarray]
    new_tokens: int


class Draft(NamedTuple):
    """A prompt of any length. depths: of the needles. ties: the seed of the order of needles at the
    same place. source: the units of its haystack (see `draw_units`), and drawn: those so far."""

    quiz: Quiz
    depths: list[float]
    ties: int
    source: Iterator[str]
    drawn: list[str]

    def text(self, n: int) -> str:
        """Introduction, a haystack of n characters with the needles, and question. The last unit of
        the haystack lacks its beginning, if needed."""
        while sum(map(len, self.drawn)) <= n:
            self.drawn.append(next(self.source))
        ends = np.cumsum([len(unit) for unit in self.drawn])
        last = int(np.searchsorted(ends, n))
        units = [*self.drawn[:last], self.drawn[last][ends[last] - n :]]
        hidden = hide(units, self.quiz.needles, self.depths, np.random.default_rng(self.ties))
        return INTRODUCTION + "".join(hidden) + self.quiz.question


def fill(draft: Draft, length: int, tokenizer: Tokenizer) -> Int[np.ndarray, " length"] | None:
    """The ids of the draft, with such a haystack that they are `length`.

    A text is encoded as a whole, as in training, because a token may have characters of two lines.
    The number of characters is first guessed from their number in a token, and then numbers nearby
    are tried. None: none of them fits (a character may be several tokens).

    Raises TooShort if the draft without any haystack is too long.
    """

    def encode(n: int) -> np.ndarray:
        return tokenizer.encode_batch([draft.text(n)])[0]

    least = len(encode(0))
    n = room = length - least
    if room < 0:
        raise TooShort(
            f"A prompt of {length + 1} tokens is too short: without any haystack it already has "
            f"{least + 1} tokens. Give larger --lengths."
        )
    for _ in range(GUESSES):
        found = encode(n)
        if len(found) == length:
            return found
        n = round(n * room / max(1, len(found) - least))
    nearby = sorted(range(max(0, n - NEARBY), n + NEARBY), key=lambda other: abs(other - n))
    return next((ids for ids in map(encode, nearby) if len(ids) == length), None)


def make_prompt(
    quiz: Quiz,
    length: int,
    depth: float,
    lines: Sequence[str] | None,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
) -> Int[np.ndarray, " length"]:
    """A prompt of exactly `length` tokens: end-of-text, introduction, haystack and question. The
    needle with the answer is at `depth`, a share of the haystack; other needles are anywhere.

    Raises TooShort if they do not fit without any haystack, and UserError if no text was found that
    has exactly so many tokens.
    """
    for _ in range(DRAFTS):
        depths = [depth, *rng.uniform(size=len(quiz.needles) - 1).tolist()]
        draft = Draft(quiz, depths, int(rng.integers(2**32)), draw_units(lines, rng), [])
        if (ids := fill(draft, length - 1, tokenizer)) is not None:
            return np.insert(ids, 0, tokenizer.eot_id)
    raise UserError(f"No text was found that has exactly {length} tokens. Give other --lengths.")


def make_exam(
    kind: str,
    length: int,
    samples: int,
    lines: Sequence[str] | None,
    tokenizer: Tokenizer,
    seed: int,
) -> Exam:
    """`samples` questions for each of DEPTHS, in this order. A prompt and its answer have `length`
    tokens together."""
    rngs = [
        np.random.default_rng((seed, EVALUATION, length, i)) for i in range(samples * len(DEPTHS))
    ]
    quizzes = [make_quiz(kind, rng) for rng in rngs]
    new_tokens = max(map(len, tokenizer.encode_batch([f" {quiz.answer}." for quiz in quizzes])))
    prompts = [
        make_prompt(quiz, length - new_tokens, DEPTHS[i // samples], lines, tokenizer, rng)
        for i, (quiz, rng) in enumerate(zip(quizzes, rngs, strict=True))
    ]
    return Exam(quizzes, prompts, new_tokens)


def generated(model: Pretrained, exam: Exam) -> list[str]:
    """The greedy continuations of the prompts, on the mesh of the context."""
    prepared, words = prepare(model.params, model.config, model.compute), model.tokenizer
    texts = []
    for batch in batches(len(exam.prompts), TOKENS // len(exam.prompts[0])):
        chosen, stop = [exam.prompts[i] for i in batch], [words.eot_id]
        out = generate(prepared, chosen, max_new_tokens=exam.new_tokens, stop_tokens=stop)
        texts += [words.decode(row[:n]) for row, n in zip(out.tokens, out.lengths, strict=True)]
    return texts[: len(exam.prompts)]


def answered(text: str) -> str:
    """The number that a continuation begins with; "" if it does not begin with one."""
    found = re.match(r"\s*([0-9]+)", text)
    return found[1] if found else ""


def grade(quizzes: Sequence[Quiz], texts: Sequence[str]) -> dict[str, float]:
    """The share of right answers with its interval; and the share of answers that are the number of
    another needle."""
    pairs = [(quiz, answered(text)) for quiz, text in zip(quizzes, texts, strict=True)]
    right = np.array([said == quiz.answer for quiz, said in pairs])
    other = np.array([said in quiz.values for quiz, said in pairs]) & ~right
    return accuracy(right) | {"other needle": float(other.mean())}


def by_place(quizzes: Sequence[Quiz], prompts: Sequence[str]) -> float:
    """The share of right answers of a model that always says the first number of a text, or always
    the second, ...: that of the best of these guesses. NaN if the texts have one number only."""
    if len(quizzes[0].values) == 1:
        return math.nan
    pairs = zip(quizzes, prompts, strict=True)
    places = [sorted(q.values, key=text.index).index(q.answer) for q, text in pairs]
    return max(places.count(place) for place in set(places)) / len(places)


def run(loaded: Pretrained, mesh: Mesh, options: Options) -> dict:
    """How often a model finds the number, by kind, length, depth and loop count.

    `options.source`: what to ask, such as "needle(kind=text,haystack=books/*.txt)"; default: the
    needles of the training, with other numbers, or the kinds single and text. `options.lengths`: in
    tokens; default: those of LENGTHS that have room for a question. `options.samples`: questions
    for each kind, length and depth.

    The table has one row for all depths. "by place" is what a model gets that reads no
    key (`by_place`). `results` of the report has a row for each depth.

    Raises UserError for a length without room for a question, and for several haystacks.
    """
    table, results, samples = [], [], options.samples or SAMPLES
    tasks = settings(options, Needle, [Needle(), Needle("text")], READS)
    if len({task.kind for task in tasks}) < len(tasks):
        raise UserError(
            f"{described(tasks, READS)} has several haystacks, whose numbers would have the same "
            "names: give one of them with --source."
        )
    for task in tasks:
        lines = None
        if task.source is not None:
            documents = open_corpus(task.source).documents()
            lines = lines_of((document.text for document in documents), task.source)
        for length in options.lengths or LENGTHS:
            words, seed = loaded.tokenizer, options.seed
            try:
                exam = make_exam(task.kind, length, samples, lines, words, seed)
            except TooShort:
                if options.lengths is None:
                    continue
                raise
            prompts = [loaded.tokenizer.decode(prompt) for prompt in exam.prompts]
            for count, model in models(loaded, options):
                texts = generated(model, exam)
                about = {"kind": task.kind, "length": length, "loops": count}
                guess = {"by place": by_place(exam.quizzes, prompts)}
                table.append(about | grade(exam.quizzes, texts) | guess)
                for i, depth in enumerate(DEPTHS):
                    these = slice(i * samples, (i + 1) * samples)
                    cell = grade(exam.quizzes[these], texts[these])
                    cell["by place"] = by_place(exam.quizzes[these], prompts[these])
                    results.append(about | {"depth": depth} | cell)
    names = [f"{r['kind']}_length{r['length']}{suffix(r['loops'], options)}" for r in table]
    return {
        "loops": list(options.loops or loaded.config.program.loop_counts),
        "source": described(tasks, READS),
        "questions": samples,
        "seed": options.seed,
        "scalars": {
            f"accuracy_{name}": row["accuracy"] for name, row in zip(names, table, strict=True)
        },
        "tables": {"all depths": table},
        "results": results,
    }


def draw(report: dict):
    """Heat maps of the accuracy, depth by length: a row for each kind, a column for each loop
    count."""
    from yocou_jax import plots

    results = report["results"]
    kinds, loops, lengths, depths = (
        [*dict.fromkeys(cell[key] for cell in results)]
        for key in ("kind", "loops", "length", "depth")
    )
    shares = np.full((len(kinds), len(loops), len(depths), len(lengths)), np.nan)
    for cell in results:
        panel = kinds.index(cell["kind"]), loops.index(cell["loops"])
        place = depths.index(cell["depth"]), lengths.index(cell["length"])
        shares[panel + place] = cell["accuracy"]
    figure, axes = plots.subplots(len(loops), len(kinds), width=3.6, height=3)
    grid = np.array(axes).reshape(len(kinds), len(loops))
    for (row, column), panel in np.ndenumerate(grid):
        image = panel.imshow(shares[row, column], vmin=0, vmax=1, cmap="cividis", aspect="auto")
        for (y, x), value in np.ndenumerate(shares[row, column]):
            color = "black" if value > 0.6 else "white"
            panel.text(x, y, f"{value:.2f}", ha="center", va="center", color=color)
        panel.set_xticks(range(len(lengths)), lengths)
        panel.set_yticks(range(len(depths)), [f"{100 * depth:g}%" for depth in depths])
        panel.set(title=f"{kinds[row]}, loops: {loops[column]}", xlabel="tokens", ylabel="depth")
        panel.grid(False)
    figure.colorbar(image, ax=grid, label="accuracy")
    return figure
