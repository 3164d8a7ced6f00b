"""Which text a task reads: the held-out split of training, or a source."""

import json

import numpy as np
import pytest

from tests.trained import BYTES, model, workdir
from yocou_jax.config import Config
from yocou_jax.data.pipeline import Sequences, load_data, spread
from yocou_jax.errors import UserError
from yocou_jax.evaluation.options import Options
from yocou_jax.evaluation.text import open_text
from yocou_jax.pretrained import export


@pytest.fixture
def run(tmp_path):
    """A workdir that was trained on a mixture of two files, with packing."""
    for name, letter in (("a", "x"), ("b", "y")):
        lines = [letter * (3 + i % 5) for i in range(600)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    folder = workdir(tmp_path / "run", model(), 7)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["config"]["data"] |= {
        "source": f"0.25*{tmp_path}/a.txt + 0.75*{tmp_path}/b.txt",
        "tokenizer": "bytes",
        "packing": True,
        "batch_size": 4,
        "validation_sequences": 8,
        "cache_dir": str(tmp_path / "cache"),
    }
    data = load_data(Config.from_dict(manifest["config"]).data)
    manifest["corpus"] = data.fingerprint
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder, data


def test_the_held_out_split_is_that_of_training(run):
    folder, data = run
    text = open_text(model(), Options(folder))
    assert (text.length, text.packing) == (16, True)
    assert len(text.sequences.rows) == len(data.validation.rows) == 8
    for (ours, i), (theirs, j) in zip(text.sequences.rows, data.validation.rows, strict=True):
        assert i == j
        for name in ("tokens", "targets", "segment_ids", "positions"):
            np.testing.assert_array_equal(*(getattr(x, name) for x in (ours[i], theirs[j])))
    assert text.facts() == {
        "source": f"the held-out split of 0.25*{folder.parent}/a.txt + 0.75*{folder.parent}/b.txt",
        "packing": True,
        "length": 16,
        "sequences": 8,
        "tokens": data.validation.num_tokens,
        "bytes": data.validation.num_bytes,
    }


def test_longer_sequences_have_the_same_text_in_the_same_shares(run):
    folder, data = run
    text = open_text(model(), Options(folder, lengths=(8, 40), samples=4))
    first, second = data.validation.rows[0][0], data.validation.rows[-1][0]
    longer = Sequences(second.tokens, second.starts, 40, packing=False)
    assert [i for _, i in text.sequences.rows] == [0, *spread(longer, 3)]
    for (ours, _), theirs in zip(text.sequences.rows, (first, *3 * [second]), strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        assert ours.sequence_length == 40


def test_a_text_that_has_changed_is_refused(run):
    folder, _ = run
    with (folder.parent / "a.txt").open("a") as file:
        file.write("\nmore")
    with pytest.raises(UserError, match=r"has changed since the run in .* was started"):
        open_text(model(), Options(folder))


def test_a_source_is_read_from_its_beginning(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n{"text": "de"}\n{"text": "fghijk"}\n')
    options = Options(tmp_path, source=f"{tmp_path}/a.jsonl", lengths=(3,), samples=2)
    text = open_text(model(), options)
    eot = BYTES.eot_id
    assert [row[i].tokens.tolist() for row, i in text.sequences.rows] == [
        [eot, *b"ab"],
        [ord("c"), eot, ord("d")],
    ]
    assert text.sequences.rows[1][0][1].targets.tolist() == [eot, *b"de"]
    assert (text.sequences.num_tokens, text.sequences.num_bytes) == (6, 5)
    assert (text.source, text.packing) == (f"{tmp_path}/a.jsonl", False)


def test_texts_that_cannot_be_used(tmp_path):
    one = model()
    export(tmp_path / "exported", one)
    (tmp_path / "short.txt").write_text("abc")
    for given, sentence in (
        ({}, "is an exported folder, which has no text: give --source="),
        ({"source": f"{tmp_path}/none.txt"}, "is not a file that exists"),
        ({"source": f"{tmp_path}/short.txt"}, r"has 4 tokens, but a sequence of 512 .* needs 513"),
    ):
        with pytest.raises(UserError, match=sentence):
            open_text(one, Options(tmp_path / "exported", **given))
