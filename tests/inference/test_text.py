"""Text as its tokens come: complete characters, up to a stop text."""

import numpy as np
import pytest

from tests.tiny import token_blocks
from yocou_jax.data.tokenizer import load_tokenizer, train_bpe
from yocou_jax.inference.text import TextRow

STOPS = [  # text, stops, what is shown
    ("one two three", ["two"], "one "),
    ("one two three", ["three", "two", "two t"], "one "),
    ("aaab!", ["aab"], "a"),
    ("ababac", ["abac"], "ab"),
    ("x\n\ny", ["\n\n"], "x"),
    ("x\n y", ["\n\n"], "x\n y"),
    ("é日🙂!", ["日🙂"], "é"),
    ("é日🙂!", ["日!", "🙂🙂"], "é日🙂!"),
    ("stop", ["stop"], ""),
    ("ends in st", ["stop"], "ends in st"),
    ("a<|endoftext|>b", ["<|end"], "a"),
]


@pytest.mark.parametrize(("text", "stops", "shown"), STOPS)
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_stop_text_ends_a_row_wherever_its_tokens_are_cut(kind, text, stops, shown, steps):
    tokenizer = (
        load_tokenizer("bytes") if kind == "bytes" else train_bpe(["one two three"] * 9, 275)
    )
    row, ids, seen = TextRow(tokenizer, 999, stops), tokenizer.encode(text), ""
    for (block,) in token_blocks([*ids, tokenizer.eot_id], steps=steps):
        row.add(block)
        assert row.text.startswith(seen)  # text that was shown stays
        assert shown.startswith(row.text)
        seen = row.text
    assert row.text == shown
    assert row.ended


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_invalid_bytes_do_not_delay_the_text_before_them(steps):
    """A text that ends in half a character, or in invalid bytes, is shown up to them."""
    tokenizer = load_tokenizer("bytes")
    row, ids = TextRow(tokenizer, 99, ["!"]), [*b"ab", 0xE6, *b"c", 0x97, 0x97, *b"d!ef", 0xE6]
    for i, (block,) in enumerate(token_blocks(ids, steps=steps)):
        row.add(block)
        text = tokenizer.decode(ids[: (i + 1) * steps]).partition("!")[0]
        assert row.text == (text if row.ended else text.rstrip("\ufffd"))
    assert row.text == "ab\ufffdc\ufffd\ufffdd"


@pytest.mark.parametrize("ends", ["limit", "end of text", "stop"])
def test_a_row_that_has_ended_ignores_more_tokens(ends):
    tokenizer = load_tokenizer("bytes")
    row = TextRow(tokenizer, 2 if ends == "limit" else 9, ["b"] if ends == "stop" else ["c"])
    last = tokenizer.eot_id if ends == "end of text" else ord("b")
    row.add(np.array([ord("a"), last]))
    assert row.ended
    row.add(np.array(list(b"xyz")))
    assert row.text == ("ab" if ends == "limit" else "a")
