"""The tasks hops and needle: what they count, and where they look."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import oracle, trained
from yocou_jax import manifest
from yocou_jax.config import MeshConfig
from yocou_jax.data.synthetic import EVALUATION, NOISE, Hops, Needle, Quiz, follow, lines_of
from yocou_jax.data.tokenizer import train_bpe
from yocou_jax.errors import UserError
from yocou_jax.evaluation import answers, hops, needle
from yocou_jax.evaluation.options import Options
from yocou_jax.files import to_json
from yocou_jax.sharding import make_mesh


@pytest.fixture
def options(tmp_path):
    def make(**fields):
        return Options(folder=tmp_path, **fields)

    return make


def run(task, loaded, options):
    mesh = make_mesh(MeshConfig(data=-1, fsdp=1, tensor=1))
    with jax.set_mesh(mesh):
        return task.run(loaded, mesh, options)


def test_bins_have_enough_values_and_miss_none():
    values = np.array([4, 1, 1, 2, 9, 4, 4, 9, 7])
    found = [(a, b, values[these].tolist()) for a, b, these in answers.bins(values, 3)]
    assert found == [(1, 2, [1, 1, 2]), (4, 4, [4, 4, 4]), (7, 9, [9, 9, 7])]
    assert [part[:2] for part in answers.bins(values, 4)] == [(1, 4), (7, 9)]
    assert answers.bins(values[:0], 3) == []


def test_batches_have_one_size_and_all_rows():
    found = list(answers.batches(10, 4))
    assert [len(batch) for batch in found] == [4, 4, 4]
    assert np.concatenate(found).tolist() == [*range(10), 0, 1]
    assert [batch.tolist() for batch in answers.batches(3, 8)] == [[0, 1, 2]]


@pytest.mark.parametrize(("p", "length"), [(1, 64), (2, 65), (12, 100)])
def test_the_views_look_at_the_answers(p, length):
    """An answer is a capital letter, and it stands after a letter of the same chain."""
    task = Hops(p, letters=4, length=length)
    x = task.draw(range(200))
    texts = task.texts(x)
    at = follow(x, p)[:, : task.num_answers]
    right = np.array([[letter.isupper() for letter in text] for text in texts])
    nll = np.where(right, 2.0, 7.0)
    found = hops.views(task, at, nll, right)
    count = sum(letter.isupper() for text in texts for letter in text)
    assert (found["answers"], found["accuracy"], found["nats"]) == (count, 1, 2)
    assert hops.views(task, at, nll, ~right)["accuracy"] == 0
    # Half of the texts are all right: so much for 200 texts, and not for thousands of answers.
    half = hops.views(task, at, nll, right & (np.arange(200)[:, None] % 2 == 0))
    assert half["high"] - half["low"] == pytest.approx(2 * 1.96 * 0.5 / 200**0.5, rel=0.05)
    for view in ("by_position", "by_distance"):
        assert sum(part["answers"] for part in found[view]) == count
        assert all(part["answers"] >= hops.LEAST for part in found[view][:-1])
    # Only the answers at one place of the texts are right.
    place = length - 2 - (length - 1 - len(str(p))) % 2
    only = right & (np.arange(length - 1)[None] == place)
    *others, last = hops.views(task, at, nll, only)["by_position"]
    assert last["last"] == place + 1
    assert last["accuracy"] > 0
    assert all(part["accuracy"] == 0 for part in others)


def test_the_distance_is_that_of_the_letter_of_the_answer():
    """abcacba has the answers ...BACC, whose letters are 2, 1, 3 and 2 letters back: two tokens
    for each."""
    x = np.array([[0, 1, 2, 0, 2, 1, 0]])
    right, nll = np.zeros((1, 15), bool), np.zeros((1, 15))
    found = hops.views(Hops(1, length=16), follow(x, 1), nll, right)["by_distance"]
    (part,) = found
    assert (part["first"], part["last"], part["answers"]) == (2, 6, 4)


def test_quantiles_of_distances_are_in_tokens(options, monkeypatch):
    monkeypatch.setattr(hops, "LEAST", 1)  # each distance is a bin
    given = options(source="hops(p=1)", lengths=(48,), samples=12)
    (row,) = run(hops, trained.model("window*1@2 | cross*1"), given)["results"]
    parts = row["by_distance"]
    middles = [(part["first"] + part["last"]) / 2 for part in parts]
    values = np.repeat(middles, [part["answers"] for part in parts])
    for share in ("0.5", "0.9"):
        assert row["distances"][share] == pytest.approx(np.quantile(values, float(share)), rel=0.25)


def test_texts_of_an_evaluation_are_not_those_of_training():
    task = Hops(2, length=64)
    training, evaluation = ({*task.texts(task.draw(range(50), *of))} for of in ((), (EVALUATION,)))
    assert not training & evaluation


def test_what_is_right_by_chance():
    """Of four letters: 1/4. The answer is never the letter itself: 1/3. The letter before is the
    answer if the hop is from 2 letters back, with a chance of 1/3; and from g letters back with a
    chance of 1/3 (2/3)^(g-2), if a walk over the three other letters has come back to it in g - 2
    steps, with a chance of 1/3 + 2/3 (-1/2)^(g-2). The sum over g is 1/2."""
    task = Hops(1, length=1024)
    x = task.draw(range(200))
    found = hops.guesses(x, follow(x, 1))
    expected = {"constant": 1 / 4, "letter": 1 / 3, "pair": 1 / 2}
    assert found == pytest.approx(expected, abs=0.01)
    # Of 600 pairs of 26 letters, each is in few answers: the best of each would look much better.
    rare = Hops(1, letters=26, length=128).draw(range(100))
    assert hops.guesses(rare, follow(rare, 1))["letter"] == pytest.approx(1 / 25, abs=0.02)
    assert math.isnan(hops.guesses(x[:1], follow(x[:1], 1))["pair"])


def test_what_two_hops_give_by_chance():
    """They often lead back to the letter itself. How often, other texts say, solved in another
    way."""
    x = Hops(2, length=512).draw(range(200))
    texts = Hops(2, length=512, seed=1).texts(Hops(2, length=512, seed=1).draw(range(60)))
    pairs = [text[i : i + 2] for text in texts for i in range(1, 510, 2)]
    asked = [pair for pair in pairs if pair[1] != "."]
    same = sum(pair[0].upper() == pair[1] for pair in asked) / len(asked)
    assert hops.guesses(x, follow(x, 2))["letter"] == pytest.approx(same, abs=0.02)


def test_the_reach_of_the_self_decoder():
    assert hops.reach(trained.small("window*2@3 | cross*1", window=4).model) == 2 * 3 * 3
    assert hops.reach(trained.small("full*1@3 | cross*1").model) is None


def scores(loaded, tokens, loops):
    """All logits [B, N, V] by numpy."""
    config = dataclasses.replace(loaded.config, num_loops=loops)
    return oracle.logits(oracle.to_float64(loaded.params), config, np.asarray(tokens))[0]


def test_hops_of_a_model(options):
    """The losses are those of the oracle, for each loop count."""
    loaded = trained.model("window*1@2 | cross*1")
    source = "0.4*hops(p=1)+0.4*hops(p=2)+0.2*hops(p=1)"
    report = run(hops, loaded, options(source=source, loops=(2, 1), lengths=(24,), samples=12))
    assert (report["loops"], report["length"]) == ([2, 1], 24)
    assert report["source"] == "hops(p=1,letters=4) + hops(p=2,letters=4)"
    cases = [(r["p"], r["loops"]) for r in report["results"]]
    assert cases == [(1, 2), (1, 1), (2, 2), (2, 1)]
    json.loads(to_json(report))
    for p, loops in cases:
        task = Hops(p, length=24)
        texts = task.texts(task.draw(range(12), hops.EVALUATION))
        asked = np.array([[letter.isupper() for letter in text] for text in texts])
        targets = np.array([list(text.encode()) for text in texts])
        tokens = np.insert(targets, 0, trained.BYTES.eot_id, axis=1)[:, :-1]
        logits = scores(loaded, tokens, loops)
        logp = logits - oracle.logsumexp(logits)[..., None]
        nll = -np.take_along_axis(logp, targets[..., None], axis=-1)[..., 0][asked]
        right = (logits.argmax(-1) == targets)[asked]
        (row,) = (r for r in report["tables"]["answers"] if (r["p"], r["loops"]) == (p, loops))
        assert (row["answers"], row["accuracy"]) == (asked.sum(), right.mean())
        assert row["nats"] == pytest.approx(nll.mean(), rel=1e-5)
        assert report["scalars"][f"accuracy_p{p}_length24_loops{loops}"] == right.mean()
    several = [row | {"letters": n} for n in (4, 5) for row in report["results"]]
    names = hops._scalars(several, options(loops=(2, 1)))
    assert len(names) == 2 * len(report["scalars"])
    assert "accuracy_p1_letters5_length24_loops2" in names
    for axes in hops.draw(report).axes:
        assert axes.get_legend_handles_labels()[1] == ["loops: 2", "loops: 1"]


def test_the_settings_are_those_of_the_training(options, tmp_path):
    default, reads = [Hops()], ("p", "letters", "length")

    def settings(kind=Hops, default=default, reads=reads, **fields):
        return answers.settings(options(**fields), kind, default, reads)

    assert settings() == default
    config = trained.small(data={"source": "0.5*python+0.5*hops(p=3)", "tokenizer": "bytes"})
    manifest.write(tmp_path, manifest.describe(config.to_dict()))
    assert settings() == [Hops(p=3)]
    assert settings(Needle, [Needle()], needle.READS) == [Needle()]
    assert settings(source="hops(p=4)") == [Hops(p=4)]
    # What is not read is that of the training, or is refused in --source.
    source = "0.5*hops(p=3,seed=1)+0.5*hops(p=3,length=64,documents=9)"
    data = {"source": source, "tokenizer": "bytes"}
    manifest.write(tmp_path, manifest.describe(trained.small(data=data).to_dict()))
    assert settings() == [Hops(p=3), Hops(p=3, length=64)]
    assert settings(reads=("p", "letters")) == [Hops(p=3)]
    assert (
        answers.described(settings(), ("p", "length"))
        == "hops(p=3,length=128) + hops(p=3,length=64)"
    )
    for given in ("python", "needle(kind=text)", "0.5*hops(p=2)+0.5*python"):
        with pytest.raises(UserError, match="is no task of this kind; hops"):
            settings(source=given)
    for name, flag in answers.FLAGS.items():
        with pytest.raises(UserError, match=rf"^{name} in .* would be ignored: give {flag} inst"):
            settings(source=f"hops(p=2,{name}=100)", reads=("p", "letters"))


@pytest.fixture(scope="module")
def tokenizers():
    """Bytes, and a BPE that has tokens with the end of a line and the indentation of the next."""
    code = Path(__file__).read_text()
    return {"bytes": trained.BYTES, "bpe": train_bpe([code, *[NOISE] * 50], 600)}


@pytest.mark.parametrize("name", ["bytes", "bpe"])
@pytest.mark.parametrize("kind", ["single", "two_hop", "text"])
def test_prompts_have_exactly_the_length_and_the_needle_at_its_depth(kind, name, tokenizers):
    """They are encoded as a whole, as in training."""
    words = tokenizers[name]
    code = Path(__file__).read_text() + "日本語の\n" * 9  # three bytes in each character
    lines = lines_of([code], "code") if kind == "text" else None
    for length in (1100, 2048):
        exam = needle.make_exam(kind, length, 2, lines, words, seed=0)
        assert exam.new_tokens == max(len(words.encode(f" {q.answer}.")) for q in exam.quizzes)
        for i, (quiz, prompt) in enumerate(zip(exam.quizzes, exam.prompts, strict=True)):
            assert len(prompt) == length - exam.new_tokens
            text = words.decode(prompt)
            assert prompt.tolist() == [words.eot_id, *words.encode(text)]
            assert text.startswith(needle.INTRODUCTION)
            assert text.endswith(quiz.question)
            assert all(text.count(sentence) == 1 for sentence in quiz.needles)
            # Without the other needles, the haystack is before and after the one with the answer.
            for other in quiz.needles[1:]:
                text = text.replace(other, "")
            before, after = text.split(quiz.needles[0])
            before, after = len(before) - len(needle.INTRODUCTION), len(after) - len(quiz.question)
            wanted = needle.DEPTHS[i // 2] * (before + after)
            assert abs(before - wanted) <= (len(NOISE) if lines is None else 101) / 2


def test_a_number_of_bytes_that_few_texts_have(monkeypatch):
    """A haystack is cut between characters of three bytes, so other lines must be tried."""
    lines = ["日" * (i % 37 + 1) + "\n" for i in range(99)]
    for length in (700, 701):
        exam = needle.make_exam("text", length, 1, lines, trained.BYTES, 0)
        assert {len(prompt) for prompt in exam.prompts} == {length - 9}
    monkeypatch.setattr(needle, "DRAFTS", 1)
    with pytest.raises(UserError, match="No text was found that has exactly 691 tokens"):
        needle.make_exam("text", 700, 1, ["\U0001f600" * 99 + "\n"], trained.BYTES, 0)


def test_what_is_right_without_reading_a_key():
    quizzes = [Quiz((), "?", answer, ("17", "28", "39")) for answer in ("17", "28", "28", "39")]
    texts = ["28 17 39", "28 17 39", "17 28 39", "17 28 39"]  # second, first, second, third
    assert needle.by_place(quizzes, texts) == 0.5
    assert math.isnan(needle.by_place([Quiz((), "?", "17", ("17",))], ["17"]))
    # At depth d, all three other numbers come before with a chance of d^3. The mean over DEPTHS:
    exam = needle.make_exam("two_hop", 4096, 60, None, trained.BYTES, seed=0)
    texts = [trained.BYTES.decode(prompt) for prompt in exam.prompts]
    assert needle.by_place(exam.quizzes, texts) == pytest.approx(0.3125, abs=0.06)
    assert needle.by_place(exam.quizzes[:60], texts[:60]) > 0.9  # before the haystack


def test_a_needle_is_found_or_not(options, monkeypatch):
    """Answers that a hand wrote: right only at the depth 0.5, and the number of another needle at
    1.0."""

    def generated(model, exam):
        wrong = {1.0: lambda quiz: f" {quiz.values[1]}.", 0.0: lambda quiz: " I do not know 1"}
        texts = []
        for i, quiz in enumerate(exam.quizzes):
            depth = needle.DEPTHS[i // 3]
            said = f"\n {quiz.answer}, I think." if depth == 0.5 else f" {quiz.answer}5."
            texts.append(wrong.get(depth, lambda _, said=said: said)(quiz))
        return texts

    monkeypatch.setattr(needle, "generated", generated)
    twice = "0.5*needle(kind=two_hop)+0.5*needle(kind=two_hop)"
    given = options(source=twice, samples=3, lengths=(1100, 1200))
    report = run(needle, trained.model(), given)
    assert report["source"] == "needle(kind=two_hop)"
    shares = {r["depth"]: (r["accuracy"], r["other needle"]) for r in report["results"][5:]}
    assert shares == {0.0: (0, 0), 0.25: (0, 0), 0.5: (1, 0), 0.75: (0, 0), 1.0: (0, 1)}
    (first, second) = report["tables"]["all depths"]
    assert first["accuracy"] == second["accuracy"] == 0.2
    assert (first["answers"], first["loops"]) == (15, 3)
    assert 0.25 < first["by place"] < 1
    json.loads(to_json(report))
    figure = needle.draw(report)
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array()[2], [1, 1])
    with pytest.raises(UserError, match="A prompt of 291 tokens is too short"):
        run(needle, trained.model(), options(lengths=(300,)))
    two = "0.5*needle(kind=text,haystack=a)+0.5*needle(kind=text)"
    with pytest.raises(UserError, match=r"^needle\(kind=text,haystack=a\) \+ .* several haystacks"):
        run(needle, trained.model(), options(source=two))


def test_answers_are_the_likeliest_tokens():
    loaded = trained.model("window*1@2 | cross*1")
    prompts = np.random.default_rng(0).integers(0, 256, (3, 12))
    exam = needle.Exam([], list(prompts), new_tokens=2)
    tokens = prompts
    for _ in range(2):
        likeliest = scores(loaded, tokens, 2)[:, -1].argmax(-1)
        tokens = np.concatenate([tokens, likeliest[:, None]], axis=1)
    mesh = make_mesh(MeshConfig(data=-1, fsdp=1, tensor=1))
    with jax.set_mesh(mesh):
        found = needle.generated(loaded, exam)
        _, right = hops.losses(loaded, tokens, mesh)
    assert found == [loaded.tokenizer.decode(row[-2:]) for row in tokens]
    assert right[:, -2:].all()  # only such tokens are right answers
    assert not right[:, :-2].all()
