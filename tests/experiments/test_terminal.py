"""What a terminal shows of texts as they come, and what is typed into it."""

import pytest

from experiments.terminal import Printer, talk
from tests.tiny import token_blocks
from yocou_jax.data.tokenizer import Tokenizer
from yocou_jax.errors import UserError
from yocou_jax.inference.text import TextRow

BYTES = Tokenizer.from_json("bytes")


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_a_character_is_shown_when_all_of_its_bytes_are_there(capsys, steps):
    text = "é日🙂!"
    printer = Printer([">"], [TextRow(BYTES, limit=len(text.encode()))])
    shown = []
    for block in token_blocks(text.encode(), steps=steps):
        printer(block)
        shown.append(capsys.readouterr().out)
    assert "".join(shown) == f">{text}\n"
    assert "\ufffd" not in "".join(shown)


def test_half_a_character_at_the_end_is_shown_as_such(capsys):
    printer = Printer([">"], [TextRow(BYTES, limit=3, stops=["\n"])])
    for block in token_blocks("ab🙂".encode()[:3], steps=2):
        printer(block)
    assert capsys.readouterr().out == ">ab\ufffd\n"


def test_a_row_of_several_is_shown_when_it_ends(capsys):
    printer = Printer(["1", "2"], [TextRow(BYTES, limit=6) for _ in range(2)])
    first, second, third = token_blocks(b"abcdef", [*b"xy", BYTES.eot_id], steps=2)
    printer(first)
    assert capsys.readouterr().out == ""
    printer(second)
    assert capsys.readouterr().out == "--- prompt 1 ---\n2xy\n"
    printer(third)
    assert capsys.readouterr().out == "--- prompt 0 ---\n1abcdef\n"


def test_rows_of_several_end_at_their_own_stop(capsys):
    printer = Printer(["b=", "2"], [TextRow(BYTES, 6, ["b", "yz"]) for _ in range(2)])
    assert [printer(block) for block in token_blocks(b"aabxxx", b"xyyyyz", steps=2)] == [
        [False, False],
        [True, False],
        [True, True],
    ]
    assert capsys.readouterr().out == "--- prompt 0 ---\nb=aa\n--- prompt 1 ---\n2xyyy\n"


def test_a_dialogue_goes_on_after_invalid_bytes_and_after_ctrl_c(typed, capsys):
    heard = []

    def write(texts):
        heard.extend(texts)
        if texts == ["stop me"]:
            raise KeyboardInterrupt
        if texts == ["too long"]:
            raise UserError("That is too long.")

    typed("é\n".encode() + b"\xff\xfe\n\nstop me\ntoo long\n\xef\xbb\xbfz\r\nend")
    talk(write)
    assert heard == ["é", "stop me", "too long", "z", "end"]
    err = capsys.readouterr().err
    assert err == "The prompt is not UTF-8 text.\n\nInterrupted.\nThat is too long.\n"


def test_ctrl_c_between_texts_ends_the_dialogue(monkeypatch, typed):
    def interrupted(_):
        raise KeyboardInterrupt

    typed(b"")
    monkeypatch.setattr("builtins.input", interrupted)
    with pytest.raises(KeyboardInterrupt):  # `cli` turns it into exit code 130
        talk(None)
