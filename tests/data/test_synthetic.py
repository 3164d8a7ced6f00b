"""The answers of the tasks are right: solvers that share no code with them agree on every text."""

import random
import re
from itertools import pairwise

import numpy as np
import pytest

from yocou_jax.data import synthetic
from yocou_jax.data.pipeline import load_data
from yocou_jax.data.sources import open_corpus, parse_source
from yocou_jax.data.synthetic import Hops, Needle, hide, make_quiz, parse_task
from yocou_jax.errors import UserError


def texts(source):
    return [document.text for document in open_corpus(source).documents()]


def solve_hops(p: int, letters: str) -> str:
    """The answers by the definition, one position after the other."""
    answers = ""
    for position in range(len(letters)):
        for _ in range(p):
            earlier = letters.rfind(letters[position], 0, position)
            if earlier < 0:
                answers += "."
                break
            position = earlier + 1
        else:
            answers += letters[position].upper()
    return answers


def test_the_example_by_hand():
    assert solve_hops(1, "abaca") == "..B.C"
    assert solve_hops(2, "abacaba") == "....." + "BA"
    x = np.array([[0, 1, 0, 2, 0, 1, 0]])
    assert Hops(p=1, length=16).texts(x)[0] == "1a.b.aBc.aCbAaB"
    assert Hops(p=2, length=16).texts(x)[0] == "2a.b.a.c.a.bBaA"


@pytest.mark.parametrize(
    ("p", "letters", "length"), [(1, 3, 40), (2, 4, 128), (3, 4, 65), (5, 26, 400), (12, 4, 256)]
)
def test_every_answer_of_hops_is_right(p, letters, length):
    source = f"hops(p={p},letters={letters},length={length},documents=700)"
    found = texts(source)
    assert len(found) == 700
    for text in found:
        assert len(text) == length - 1
        assert text.startswith(str(p))
        pairs = text[len(str(p)) :]
        xs, answers = pairs[::2], pairs[1::2]
        assert solve_hops(p, xs)[: len(answers)] == answers
        assert all(a != b for a, b in pairwise(xs))
        assert set(xs) <= set("abcdefghijklmnopqrstuvwxyz"[:letters])
    counts = [sum(text.count(letter) for text in found) for letter in "abc"]
    assert max(counts) < 1.1 * min(counts)


def solve_needle(text: str) -> tuple[str, int]:
    """The answer that the text implies, and how many sentences lead to it."""
    context, _, question = text.rpartition("\nWhat is the special magic number for ")
    numbers = dict(re.findall(r"One of the special magic numbers for (\S+) is: (\d+)\.", context))
    links = dict(re.findall(r"The special magic number for (\S+) is the one for (\S+)\.", context))
    key, hops = question.split(" ", 1)[0], 1
    while key not in numbers:
        key, hops = links[key], hops + 1
    return numbers[key], hops


@pytest.mark.parametrize(("kind", "hops"), [("single", 1), ("text", 1), ("two_hop", 2)])
def test_every_answer_of_needle_is_right(tmp_path, kind, hops):
    (tmp_path / "a.txt").write_text("".join(f"line {i}\n\n" for i in range(999)))
    haystack = f",haystack={tmp_path}/*.txt" if kind == "text" else ""
    found = texts(f"needle(kind={kind},length=1500,documents=700{haystack})")
    assert len(found) == 700
    for text in found:
        said, dot = text[-8:-1], text[-1]
        assert (said, dot) == (solve_needle(text)[0], ".")
        assert solve_needle(text)[1] == hops
        assert len(re.findall(r"is: \d{7}\.\n", text)) == (4 if kind == "two_hop" else 1)
    sizes = [len(text) for text in found]
    assert 1400 < max(sizes) <= 1500
    assert min(sizes) < 1000
    places = [text.index(said) / len(text) for text in found for said in [text[-8:-1]]]
    assert min(places) < 0.25
    assert max(places) > 0.75
    lines = {line for text in found for line in text.splitlines()}
    assert ("line 7" in lines) == (kind == "text")
    assert (synthetic.NOISE.strip() in lines) == (kind != "text")


def test_the_longest_needles_fit_into_the_shortest_document(monkeypatch):
    for name in ("ADJECTIVES", "NOUNS"):
        longest = max(getattr(synthetic, name), key=len)
        monkeypatch.setattr(synthetic, name, [longest] * len(getattr(synthetic, name)))
    for kind, least in synthetic.KINDS.items():
        quiz = make_quiz(kind, np.random.default_rng(0))
        parts = synthetic.INTRODUCTION, *quiz.needles, f"{quiz.question} {quiz.answer}."
        assert least - 100 < sum(map(len, parts)) <= least


def test_needles_are_hidden_at_the_nearest_end_of_a_unit():
    units, rng = ["aaaa", "bb", "cccc"], np.random.default_rng(0)
    assert hide(units, ["x"], [0.0], rng) == ["x", *units]
    assert hide(units, ["x"], [1.0], rng) == [*units, "x"]
    assert hide(units, ["x"], [0.55], rng) == ["aaaa", "bb", "x", "cccc"]
    assert hide(units, ["x", "y"], [0.9, 0.4], rng) == ["aaaa", "y", "bb", "cccc", "x"]


def test_the_place_of_a_number_does_not_tell_whether_it_is_asked_for():
    """Also in short documents, in which many needles are at the same place."""
    places = []
    for text in texts("needle(kind=two_hop,documents=800)"):
        numbers = re.findall(r"[0-9]{7}", text)
        assert len(set(numbers)) == 4
        places.append(numbers.index(numbers[-1]))
    shares = np.bincount(places, minlength=4) / len(places)
    np.testing.assert_allclose(shares, 0.25, atol=0.06)


def test_documents_depend_only_on_the_settings_and_their_number():
    for source in ("hops(p=3", "needle(kind=two_hop"):
        few, many = (list(open_corpus(f"{source},documents={n})").documents()) for n in (20, 1100))
        assert few == many[:20]
        other = texts(f"{source},documents=20,seed=1)")
        assert not set(other) & {document.text for document in few}


def test_each_sequence_of_hops_is_one_text(make_config):
    source = "hops(p=2,length=64,documents=400)"
    data = load_data(make_config(source=source, sequence_length=64, batch_size=4))
    found = set(texts(source))
    for i in range(20):
        tokens = data.stream[i].tokens
        assert tokens[0] == data.tokenizer.eot_id
        assert data.tokenizer.decode(tokens) in found
    both = f"0.5*{source} + 0.5*needle(kind=single,length=512,documents=60)"
    assert load_data(make_config(source=both)).num_documents > 300


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("hops(q=2)", r"'hops\(q=2\)' has 'q=2' in parentheses.* p=..., letters=..., length=...,"),
        ("hops(2)", "has '2' in parentheses"),
        ("hops(p=1,p=2)", "has 'p=2' in parentheses"),
        ("hops(p=two)", "has p='two', which must be a whole number"),
        ("hops(p=-1)", "has p='-1', which must be a whole number"),
        ("hops(p=0)", "p=0 of hops.* must be from 1 to 99"),
        ("hops(letters=2)", "letters=2 of hops.* must be from 3 to 26"),
        ("hops(length=99999999999)", "must be from 16 to"),
        ("needle(kind=double)", "kind='double' of needle.* is not one of single, text, two_hop"),
        ("needle(kind=two_hop,length=500)", "length=500 of .* is too short"),
        ("needle(kind=single,haystack=python)", "haystack='python' of .* is not used"),
        ("needle(kind=text,haystack=nowhere)", "'nowhere' is not a file that exists"),
        ("needle(kind=text,haystack={tmp}/blank.txt)", "blank.txt' contains no text"),
        ("hops(p=2", r"is not a file that exists, nor .*'hops\(p=2\)'"),
    ],
)
def test_a_task_that_is_not_possible(tmp_path, source, sentence):
    (tmp_path / "blank.txt").write_text(" \n\n")
    with pytest.raises(UserError, match=sentence):
        texts(source.format(tmp=tmp_path))


def test_a_mistyped_task_gives_a_sentence():
    rng = random.Random(0)
    right = "0.5*hops(p=2,letters=4,length=64)+0.5*needle(kind=two_hop,seed=3)"
    kinds = set()
    for _ in range(500):
        source = list(right)
        for _ in range(rng.randint(1, 3)):
            i = rng.randrange(len(source))
            source[i : i + rng.randint(0, 2)] = rng.choice(["", "=", ",", "(", ")", "0", "p", "é"])
        try:
            kinds |= {type(parse_task(name)) for _, name in parse_source("".join(source))}
        except UserError as error:
            kinds.add(str(error)[-1])
    assert kinds == {Hops, Needle, type(None), "."}


def test_the_defaults_are_those_that_the_documents_say():
    assert parse_task("hops()") == Hops(p=2, letters=4, length=128, documents=20_000, seed=0)
    assert parse_task("needle( kind = text )") == Needle("text", 1024, 10_000, 0, "")
    assert parse_task("hops") is None
    assert parse_task("python") is None
