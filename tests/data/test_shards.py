"""Shards of a corpus: what they give is what the whole gives, and each file is read once."""

import itertools
import json

import numpy as np
import pytest

from yocou_jax.data import corpus as corpus_module
from yocou_jax.data import load_data, shards, tokens
from yocou_jax.data.corpus import open_corpus
from yocou_jax.data.shards import in_turn
from yocou_jax.errors import UserError


@pytest.fixture
def readings(monkeypatch):
    """The names of the files that are read. Four files, more or less, are a shard."""
    names, read = [], corpus_module.read_file

    def counted(name, *args, **kwargs):
        names.append(name)
        return read(name, *args, **kwargs)

    monkeypatch.setattr(corpus_module, "read_file", counted)
    monkeypatch.setattr(corpus_module, "YOUNG", -1.0)
    monkeypatch.setattr(corpus_module, "SHARD_BYTES", 200)
    monkeypatch.setattr(tokens, "PIECE_BYTES", 300)
    return names


@pytest.fixture
def odd(tmp_path, corpus):
    """The folder of `corpus` with copies, invalid bytes and empty documents, and rows without
    text. Returns the source of rows."""
    texts = list(corpus.texts.values())
    (corpus.folder / "31.txt").write_text(texts[4], encoding="utf-8")
    (corpus.folder / "59.txt").write_text(texts[0], encoding="utf-8")
    (corpus.folder / "42.txt").write_bytes(b"bad \xff byte" * 3)
    (corpus.folder / "43.txt").write_text("")
    folder = tmp_path / "rows"
    folder.mkdir()
    for start in range(0, 60, 5):
        rows = [{"text": text} for text in texts[start : start + 5]]
        rows[1:1] = [{"text": None}, {"text": ""}, {"text": texts[7]}, {"text": "\udcff!"}]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{start:02}.jsonl").write_text(text)
    return f"{folder}/*.jsonl"


def cache_files(folder):
    (found,) = folder.glob("tokens-????????????????")
    return {path.name: path.read_bytes() for path in found.iterdir()}


@pytest.mark.parametrize("rows", [False, True])
def test_shards_give_the_same_tokens_as_the_whole(
    make_config, corpus, odd, tmp_path, readings, monkeypatch, rows
):
    how = {"source": odd, "bad_rows": "skip"} if rows else {}
    first = load_data(make_config(cache_dir=str(tmp_path / "a"), **how))
    assert len(list((tmp_path / "a").glob("shard-*.npz"))) > 5
    assert first.num_duplicates > 1
    assert first.num_invalid == 1
    assert first.num_skipped == (12 if rows else 0)
    monkeypatch.setattr(corpus_module, "SHARD_BYTES", 10**9)
    monkeypatch.setattr(tokens, "PIECE_BYTES", 10**9)
    whole = load_data(make_config(cache_dir=str(tmp_path / "b"), **how))
    assert list((tmp_path / "b").glob("shard-*.npz")) == []
    assert whole.fingerprint == first.fingerprint
    for field in ("num_documents", "num_bytes", "num_invalid", "num_duplicates", "num_skipped"):
        assert getattr(whole, field) == getattr(first, field)
    assert cache_files(tmp_path / "a") == cache_files(tmp_path / "b")


def test_each_process_begins_with_shards_of_its_own():
    for count, processes in ((1, 1), (7, 3), (2, 5), (16, 4)):
        orders = [in_turn(count, index, processes) for index in range(processes)]
        assert all(sorted(order) == list(range(count)) for order in orders)
        shares = [count * (p + 1) // processes - count * p // processes for p in range(processes)]
        own = [order[:share] for order, share in zip(orders, shares, strict=True)]
        assert sorted(itertools.chain(*own)) == list(range(count))
    assert in_turn(6, 1, 3) == [2, 3, 5, 4, 1, 0]


def opened(corpus, tmp_path, share, **changes):
    return open_corpus(corpus.source, known=tmp_path / "cache", share=share, **changes)


def test_a_shard_that_another_process_has_stored_is_not_read(corpus, tmp_path, readings):
    first = opened(corpus, tmp_path, (0, 2))
    assert first.summary.documents == 60
    assert sorted(readings) == sorted(corpus.texts)  # the other has not begun
    readings.clear()
    (memory,) = (tmp_path / "cache").glob("corpus-*.npz")
    memory.unlink()
    stored = sorted((tmp_path / "cache").glob("shard-*.npz"))
    stored[2].unlink()
    second = opened(corpus, tmp_path, (1, 2))
    assert second.summary == first.summary
    assert 0 < len(readings) < 10
    readings.clear()
    assert opened(corpus, tmp_path, (0, 1), verify=True).summary == first.summary
    assert sorted(readings) == sorted(corpus.texts)


def test_a_process_reads_only_the_files_of_its_pieces(corpus, tmp_path, readings, monkeypatch):
    documents, parts = opened(corpus, tmp_path, (0, 1)), []
    expected = list(documents.documents())
    _ = documents.summary
    for index in range(3):
        readings.clear()
        pieces = list(documents.pieces(300, (index, 3)))
        parts.append([d for piece in pieces if piece.mine for d in piece.documents()])
        assert len(readings) < len(corpus.texts) / 2
        assert readings == sorted(set(readings))  # each file once
    assert list(itertools.chain(*parts)) == expected
    readings.clear()
    later = [piece for piece in documents.pieces(300, (0, 1))][5:8]  # the others exist already
    assert [d for piece in later for d in piece.documents()]
    assert len(readings) < 30
    monkeypatch.setattr(corpus_module, "SHARD_BYTES", 10**9)
    whole = open_corpus(corpus.source)
    assert [p.digest for p in whole.pieces(300, (0, 1))] == [p.digest for p in pieces]


def test_a_start_after_a_kill_reads_no_shard_twice(corpus, tmp_path, readings, monkeypatch):
    count = corpus_module.read_file

    def killed(name, *args, **kwargs):
        if name == "30.txt":
            raise KeyboardInterrupt
        return count(name, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(corpus_module, "read_file", killed)
        with pytest.raises(KeyboardInterrupt):
            _ = opened(corpus, tmp_path, (0, 1)).summary
    before = set(readings)
    readings.clear()
    assert opened(corpus, tmp_path, (0, 1)).summary.documents == 60
    assert set(corpus.texts) - before <= set(readings)
    assert len(set(readings) & before) < 5  # of the shard that was not stored


@pytest.mark.parametrize("change", ["other", "more", "fewer"])
def test_a_shard_that_changes_before_it_is_tokenized(
    make_config, corpus, tmp_path, readings, monkeypatch, change
):
    rows = tmp_path / "rows"
    rows.mkdir()
    for number, text in enumerate(corpus.texts.values()):
        lines = "".join(json.dumps({"text": f"{text} {i}"}) + "\n" for i in range(4))
        (rows / f"{number:02}.jsonl").write_text(lines)
    path, make = rows / "20.jsonl", tokens._make_pieces
    text = path.read_text()
    changed = {"other": text.replace("<20>", "<2!>"), "fewer": text[: text.index("\n") + 1]}
    changed["more"] = text + json.dumps({"text": "poison"}) + "\n"

    def swap(*args):
        path.write_text(changed[change])
        return make(*args)

    monkeypatch.setattr(tokens, "_make_pieces", swap)
    config = make_config(source=f"{rows}/*.jsonl")
    with pytest.raises(UserError, match="has changed while it was read"):
        load_data(config)
    monkeypatch.setattr(tokens, "_make_pieces", make)
    path.write_text(text)
    assert load_data(config).num_documents > 100


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 damaged"])
def test_damaged_digests_are_made_again(corpus, tmp_path, readings, content):
    expected = opened(corpus, tmp_path, (0, 1)).summary
    for path in (tmp_path / "cache").glob("*.npz"):
        path.write_bytes(content)
    assert opened(corpus, tmp_path, (0, 1)).summary == expected


def test_a_cache_that_cannot_be_written_costs_only_time(corpus, tmp_path, readings):
    (tmp_path / "cache").write_text("a file")
    assert opened(corpus, tmp_path, (1, 2)).summary.documents == 60


def test_errors_name_the_row(corpus, odd, tmp_path, readings):
    corpus.source = odd
    with pytest.raises(UserError, match=r"Line 2 of .*jsonl' has null in the field 'text'"):
        _ = opened(corpus, tmp_path, (0, 2)).summary
    empty = tmp_path / "empty"
    empty.mkdir()
    for number in range(3):
        (empty / f"{number}.txt").write_text("")
        (empty / f"{number}.jsonl").write_text(json.dumps({"text": None}) + "\n" * 300)
    corpus.source = f"{empty}/*"
    with pytest.raises(UserError, match="contains no text; 3 rows had none and were left out"):
        _ = opened(corpus, tmp_path, (0, 1), bad_rows="skip").summary


def test_digests_of_nothing():
    empty = shards.digests_of([None])
    assert empty.keys.shape == (0, 64)
    whole, first = shards.joined([empty, empty])
    assert len(first) == 0
    assert whole.skipped == 2
    assert whole.sizes.dtype == np.int64
