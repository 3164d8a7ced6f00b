"""Tasks that a program writes, as documents to train on: p-hop induction, and needles in haystacks.

    hops(p=2,letters=4,length=128)    follow a chain of p repeated letters
    needle(kind=single,length=1024)   find a number that one sentence of a long text gives to a key

Both are data sources, also in mixtures. Document i depends only on the settings and on i. The
settings that are not named have the defaults of `Hops` and `Needle`.
"""

import dataclasses
import re
import typing
from collections.abc import Iterable, Iterator, Sequence, Sized

import numpy as np

from yocou_jax.errors import UserError, shown
from yocou_jax.typing import Int

# The second seed of every random generator: texts of an evaluation are not those of a training.
TRAINING, EVALUATION = 0, 1
BLOCK = 1024  # documents that are computed together
LIMITS = {  # of the settings that are whole numbers
    "p": (1, 99),
    "letters": (3, 26),
    "length": (16, 2**24),
    "documents": (1, 10**9),
    "seed": (0, 2**31 - 1),
}


def _check(task: "Hops | Needle") -> None:
    """Raises UserError for a number that is not within LIMITS."""
    for name, (low, high) in LIMITS.items():
        value = getattr(task, name, low)
        if not low <= value <= high:
            raise UserError(f"{name}={shown(value)} of {task.name} must be from {low} to {high}.")


# --- p-hop induction ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Hops:
    """p-hop induction (Sanford, Hsu and Telgarsky 2024, arXiv 2402.09268, section 4).

    One hop from position i of the letters x leads to the position after the last earlier x_i:
    f(i) = 1 + max {j < i: x_j = x_i}. The answer of position i is the letter that p hops lead to.
    Letters are uniform, but neighbors differ (their appendix G), so a hop leads back by at least
    one position.

    A text is p, and then each letter in lower case with its answer in upper case, or with "." if a
    hop of its chain leads nowhere: for p=1 and the letters abaca it is "1a.b.aBc.aC". So the loss
    of a language model trains every answer. The paper has the answers as targets only; here the
    earlier ones are also in the text that the model reads. Because p is in the text, a mixture may
    have texts of several p. Document i has the same letters for every p, and other answers; another
    `seed` gives other letters.

    The byte tokenizer makes one token of each character. Then a document has `length` tokens with
    the end-of-text token before it, and with data.sequence_length=length each sequence is one
    document.
    """

    p: int = 2
    letters: int = 4
    length: int = 128
    documents: int = 20_000
    seed: int = 0

    source: typing.ClassVar[None] = None  # it reads no other texts

    def __post_init__(self):
        _check(self)

    @property
    def name(self) -> str:
        return f"hops(p={self.p},letters={self.letters},length={self.length},seed={self.seed})"

    @property
    def num_answers(self) -> int:
        """Answers of a text, also those that are "."."""
        return (self.length - 1 - len(str(self.p))) // 2

    def draw(self, indices: Iterable[int], stream: int = TRAINING) -> Int[np.ndarray, "rows n"]:
        """The letters of some documents, as numbers from 0. n is num_answers, or one more if the
        text ends with a letter."""
        n = -(-(self.length - 1 - len(str(self.p))) // 2)
        steps = []
        for i in indices:
            rng = np.random.default_rng((self.seed, stream, i))
            row = rng.integers(1, self.letters, n)  # from one letter to the next: never 0
            row[0] = rng.integers(self.letters)
            steps.append(row)
        return np.cumsum(steps, axis=1) % self.letters

    def texts(self, x: Int[np.ndarray, "rows n"]) -> list[str]:
        """The texts of letters, each with length - 1 characters."""
        found = follow(x, self.p)
        answers = np.take_along_axis(x, np.maximum(found, 0), axis=1) + ord("A")
        pairs = np.stack([x + ord("a"), np.where(found < 0, ord("."), answers)], axis=-1)
        rows = pairs.astype(np.uint8).reshape(len(x), -1)
        return [(str(self.p) + row.tobytes().decode())[: self.length - 1] for row in rows]

    def read(self, _: Iterable[str] = ()) -> Iterator[tuple[str, str]]:
        """(name, text) of every document."""
        for first in range(0, self.documents, BLOCK):
            indices = range(first, min(first + BLOCK, self.documents))
            for i, text in zip(indices, self.texts(self.draw(indices)), strict=True):
                yield f"{self.name}:{i}", text


def follow(x: Int[np.ndarray, "rows n"], p: int) -> Int[np.ndarray, "rows n"]:
    """The position that p hops from each position lead to; -1 if one of them leads nowhere."""
    rows, one = np.arange(len(x)), np.full(x.shape, -1)
    last = np.full((len(x), int(x.max()) + 1), -1)  # where each letter was last
    for i in range(x.shape[1]):
        before = last[rows, x[:, i]]
        one[:, i] = np.where(before < 0, -1, before + 1)
        last[rows, x[:, i]] = i
    at = one
    for _ in range(p - 1):
        at = np.where(at < 0, -1, np.take_along_axis(one, np.maximum(at, 0), axis=1))
    return at


# --- Needles in a haystack ------------------------------------------------------------------------

# The wording is that of RULER (Hsieh et al. 2024, arXiv 2404.06654) for one key and one number.
INTRODUCTION = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will "
    "quiz you about the number afterwards.\n"
)
NOISE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
)
NEEDLE = "One of the special magic numbers for {key} is: {value}.\n"
QUESTION = (
    "What is the special magic number for {key} mentioned in the provided text? The special magic "
    "number for {key} mentioned in the provided text is"
)
LINK = "The special magic number for {key} is the one for {other}.\n"  # ours, for two hops
CHAINS = 4  # of two_hop: as many keys as RULER's task with several keys has
DIGITS = 7
WORDS = """
able amber bold brave bright busy calm clever cool curly dizzy eager early fancy gentle giant
happy humble icy jolly keen lazy lucky mellow noisy odd proud quiet rapid silent tidy young

anchor apple badge basket bridge cactus candle castle dragon engine feather garden hammer island
jacket kettle ladder lemon magnet mirror needle orange pencil pillow rabbit rocket saddle teapot
tiger tunnel violin window
"""
ADJECTIVES, NOUNS = (part.split() for part in WORDS.split("\n\n"))  # a key is one of each
# For each kind, the characters that all but the haystack need with the longest keys.
KINDS = {"single": 400, "text": 400, "two_hop": 900}


class Quiz(typing.NamedTuple):
    """A question about a text.

    needles: sentences to hide in the text. The first one has the number that is asked for.
    question: it ends where the answer begins. answer: the number. values: all numbers.
    """

    needles: tuple[str, ...]
    question: str
    answer: str
    values: tuple[str, ...]


def make_quiz(kind: str, rng: np.random.Generator) -> Quiz:
    """single, text: one sentence gives a number to a key (S-NIAH-1 and S-NIAH-2 of RULER).

    two_hop: CHAINS such sentences, and for each of them another key that is linked to its key. The
    question has such another key, so the number must be found in two steps.
    """
    chains = CHAINS if kind == "two_hop" else 1
    words = rng.choice(len(ADJECTIVES) * len(NOUNS), 2 * chains, replace=False)
    keys = [f"{ADJECTIVES[i // len(NOUNS)]}-{NOUNS[i % len(NOUNS)]}" for i in words]
    low = 10 ** (DIGITS - 1)
    values = [str(low + v) for v in rng.choice(9 * low, chains, replace=False, shuffle=False)]
    needles = [NEEDLE.format(key=key, value=v) for key, v in zip(keys, values, strict=False)]
    asked = keys[0]
    if kind == "two_hop":
        links = zip(keys[chains:], keys[:chains], strict=True)
        needles += [LINK.format(key=key, other=other) for key, other in links]
        asked = keys[chains]
    return Quiz(tuple(needles), QUESTION.format(key=asked), values[0], tuple(values))


Unit = typing.TypeVar("Unit", bound=Sized)


def hide(
    units: Sequence[Unit],
    needles: Sequence[Unit],
    depths: Sequence[float],
    rng: np.random.Generator,
) -> list[Unit]:
    """The units of a haystack (sentences or lines: texts, or their token ids) with the needles
    between them. depths: for each needle, the share of the haystack before it; it comes at the
    nearest end of a unit. Needles at the same place are in a random order, because their number
    must not tell which of them is asked for."""
    ends = np.cumsum([0, *map(len, units)])
    places = [int(np.abs(ends - depth * ends[-1]).argmin()) for depth in depths]
    hidden = list(units)
    for k in sorted(rng.permutation(len(needles)), key=lambda k: places[k], reverse=True):
        hidden.insert(places[k], needles[k])
    return hidden


def lines_of(texts: Iterable[str], source: str) -> list[str]:
    """The lines of texts that are not empty, each with its newline. Raises UserError if there are
    none."""
    lines = [f"{line}\n" for text in texts for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"The haystack {source!r} contains no text.")
    return lines


def draw_units(lines: Sequence[str] | None, rng: np.random.Generator) -> Iterator[str]:
    """The units of a haystack, without end: lines of a text from a random one on, or NOISE."""
    i = 0 if lines is None else int(rng.integers(len(lines)))
    while True:
        yield NOISE if lines is None else lines[i % len(lines)]
        i += 1


@dataclasses.dataclass(frozen=True)
class Needle:
    """Needles in haystacks: a text that has sentences about numbers, a question, and its answer.

    kind: `single` repeats a noise sentence (S-NIAH-1 of RULER). `text` has lines of a real text (as
    S-NIAH-2, which has essays). `two_hop` repeats the noise sentence, and the question needs two of
    eight needles.
    haystack: the data source of the lines, only for `text`; "": the source `python`.
    length: characters of the longest documents. The length of a haystack, and the places of its
    needles, are uniform.
    """

    kind: str = "single"
    length: int = 1024
    documents: int = 10_000
    seed: int = 0
    haystack: str = ""

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(
                f"kind={shown(self.kind)} of needle(...) is not one of {', '.join(KINDS)}."
            )
        _check(self)
        if self.haystack and self.kind != "text":
            raise UserError(
                f"haystack={shown(self.haystack)} of {self.name} is not used: only kind=text reads "
                "a text."
            )
        if self.length < KINDS[self.kind]:
            raise UserError(
                f"length={self.length} of {self.name} is too short: the question and the needles "
                f"need {KINDS[self.kind]} characters."
            )

    @property
    def name(self) -> str:
        return f"needle(kind={self.kind},length={self.length},seed={self.seed})"

    @property
    def source(self) -> str | None:
        """The data source that it reads, if any."""
        return (self.haystack or "python") if self.kind == "text" else None

    def text(self, i: int, lines: Sequence[str] | None) -> str:
        """Document i. lines: of the haystack; None: the noise sentence."""
        rng = np.random.default_rng((self.seed, TRAINING, i))
        quiz = make_quiz(self.kind, rng)
        end = f"{quiz.question} {quiz.answer}."
        room = self.length - len(INTRODUCTION) - len(end) - sum(map(len, quiz.needles))
        room, units = int(rng.integers(room + 1)), []
        for unit in draw_units(lines, rng):
            room -= len(unit)
            if room < 0:
                break
            units.append(unit)
        depths = rng.uniform(size=len(quiz.needles)).tolist()
        hidden = hide(units, quiz.needles, depths, rng)
        return INTRODUCTION + "".join(hidden) + end

    def read(self, texts: Iterable[str] = ()) -> Iterator[tuple[str, str]]:
        """(name, text) of every document. texts: those of `source`."""
        lines = None if self.source is None else lines_of(texts, self.source)
        for i in range(self.documents):
            yield f"{self.name}:{i}", self.text(i, lines)


# --- Sources --------------------------------------------------------------------------------------

TASKS = {"hops": Hops, "needle": Needle}


def parse_task(source: str) -> Hops | Needle | None:
    """The task that a data source names, such as "hops(p=2,letters=4)". None: it is another source.

    Raises UserError for a setting that does not exist, or a value that is not possible.
    """
    found = parse_settings(source)
    return None if found is None else found[0](**found[1])


def parse_settings(source: str) -> tuple[type[Hops] | type[Needle], dict[str, int | str]] | None:
    """The kind of a task that a data source names, and those of its settings that the source gives.
    None: it is another source.

    Raises UserError for a setting that does not exist, or a value that is not a number.
    """
    match = re.fullmatch(rf"({'|'.join(TASKS)})\((.*)\)", source.strip(), re.DOTALL)
    if match is None:
        return None
    task = TASKS[match[1]]
    kinds = {field.name: field.type for field in dataclasses.fields(task)}
    settings: dict[str, int | str] = {}
    for part in match[2].split(",") if match[2].strip() else ():
        name, equals, value = (text.strip() for text in part.partition("="))
        if name not in kinds or not equals or name in settings:
            raise UserError(
                f"The data source {shown(source)} has {shown(part)} in parentheses, which must be "
                f"settings, each once: {', '.join(f'{known}=...' for known in kinds)}."
            )
        if kinds[name] is int and not re.fullmatch(r"[0-9]{1,12}", value):
            raise UserError(
                f"The data source {shown(source)} has {name}={shown(value)}, which must be a whole "
                "number."
            )
        settings[name] = kinds[name](value)
    return task, settings
