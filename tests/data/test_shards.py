"""Shards of a corpus: what they give is what the whole gives, and each file is read once."""

import itertools
import json
import re

import jax
import numpy as np
import pytest

from yocou_jax import progress
from yocou_jax.data import corpus as corpus_module
from yocou_jax.data import load_data, pipeline, shards, sources, tokens
from yocou_jax.data.corpus import is_held_out
from yocou_jax.data.shards import in_turn
from yocou_jax.data.sources import open_corpus
from yocou_jax.data.tokenizer import load_tokenizer
from yocou_jax.errors import UserError


@pytest.fixture
def readings(readings, monkeypatch):
    """`readings`, if four files, more or less, are a shard."""
    monkeypatch.setattr(sources, "SHARD_BYTES", 200)
    monkeypatch.setattr(tokens, "PIECE_BYTES", 300)
    return readings


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
    monkeypatch.setattr(sources, "SHARD_BYTES", 10**9)
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
    monkeypatch.setattr(sources, "SHARD_BYTES", 10**9)
    whole = open_corpus(corpus.source)
    assert [p.digest for p in whole.pieces(300, (0, 1))] == [p.digest for p in pieces]


def test_gaps_between_pieces_read_no_row_twice(tmp_path, readings):
    """Another run in the same folder has made every second piece."""
    for name in ("a", "b"):
        rows = "".join(json.dumps({"text": f"{name} {i:3}"}) + "\n" for i in range(200))
        (tmp_path / f"{name}.jsonl").write_text(rows)
    corpus = open_corpus(f"{tmp_path}/*.jsonl")
    expected = list(corpus.documents())
    readings.clear()
    found = [d for piece in list(corpus.pieces(20, (0, 1)))[::2] for d in piece.documents()]
    assert found == [d for i, d in enumerate(expected) if i % 8 < 4]
    assert readings == ["a.jsonl", "b.jsonl"] * 2  # for the digests, and for the pieces
    readings.clear()
    late = list(corpus.pieces(20, (0, 1)))[-10:]
    assert [d for piece in late for d in piece.documents()] == expected[-40:]
    assert readings == ["b.jsonl"]


def test_a_process_reads_no_shard_before_its_pieces(tmp_path, readings):
    """Also if the first shards have no documents."""
    for i in range(5):
        (tmp_path / f"0-{i}.jsonl").write_text('{"text": null}\n' * 20)
    for i in range(6):
        rows = "".join(json.dumps({"text": f"text {i} {j:2}"}) + "\n" for j in range(20))
        (tmp_path / f"1-{i}.jsonl").write_text(rows)
    corpus = open_corpus(f"{tmp_path}/*.jsonl", bad_rows="skip")
    assert corpus.summary.documents == 120
    readings.clear()
    for piece in corpus.pieces(40, (1, 2)):
        if piece.mine:
            piece.documents()
    assert readings == ["1-3.jsonl", "1-4.jsonl", "1-5.jsonl"]


def test_pieces_end_where_those_of_the_whole_end(tmp_path, readings, monkeypatch):
    for i in range(30):
        (tmp_path / f"{i:02}.txt").write_text(f"{i:02}" * 50)
    source = f"{tmp_path}/*.txt"
    in_shards = [p.digest for p in open_corpus(source).pieces(300, (0, 1))]
    monkeypatch.setattr(sources, "SHARD_BYTES", 10**9)
    assert [p.digest for p in open_corpus(source).pieces(300, (0, 1))] == in_shards


def test_a_process_begins_with_shards_of_its_own(corpus, tmp_path, readings, make_config):
    assert opened(corpus, tmp_path, (1, 2)).summary.documents == 60
    assert readings[0] >= "25.txt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "process_index", lambda: 1)
        patch.setattr(jax, "process_count", lambda: 2)
        ((_, split),) = pipeline._parts(make_config())
    assert split.corpus.share == (1, 2)


def test_long_reading_reports_its_progress(corpus, readings, monkeypatch, caplog):
    """Also if each of many shards takes less time than that between two lines."""
    clock = iter(range(10**6))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock) / 2)
    with caplog.at_level("INFO", logger="yocou_jax.progress"):
        pieces = open_corpus(corpus.source).pieces(100, (0, 1))
        for piece in pieces:
            piece.documents()
    lines = [line for line in caplog.messages if "0.0 MB" in line]
    assert sum("Reading" in line for line in lines) >= 2
    assert sum("Tokenizing" in line for line in lines) >= 1


def test_a_sample_is_the_beginning_of_each_shard(corpus, readings):
    """So to train a BPE, a process reads little of a large text."""
    found = open_corpus(corpus.source)
    total, ends = found.summary.bytes, [0, *found.shard_ends]
    assert len(ends) > 10
    readings.clear()
    documents = list(found.sample(total / 3, 0.2))
    assert len(readings) < 0.75 * len(corpus.texts)
    assert total / 3 <= sum(shards.text_bytes(d) for d in documents) <= total / 3 + 90
    everything = list(found.documents())
    names, parts = [d.name for d in everything], 0
    for begin, end in itertools.pairwise(ends):
        wanted = [name for name in names[begin:end] if not is_held_out(name, 0.2)]
        mine = [d.name for d in documents if d.name in names[begin:end]]
        assert mine == wanted[: len(mine)]
        parts += bool(mine)
    assert parts > len(ends) / 2
    readings.clear()
    assert list(found.sample(1e9, 0.0)) == everything
    assert sorted(readings) == sorted(corpus.texts)  # no shard was opened twice


def test_a_sample_opens_few_shards_if_these_have_enough(corpus, readings, monkeypatch):
    """They are spread over the source. Small shards have too little, so more are opened."""
    monkeypatch.setattr(corpus_module, "SAMPLED", 3)
    found = open_corpus(corpus.source)
    total, count = found.summary.bytes, len(found.shards)
    shard_of = {
        document.name: sum(end <= number for end in found.shard_ends)
        for number, document in enumerate(found.documents())
    }
    for size, least, most in ((0.05, 3, 3), (0.5, 0.4 * count, 0.8 * count), (1.0, count, count)):
        readings.clear()
        names = [d.name for d in found.sample(size * total, 0.0)]
        opened = {shard_of[name] for name in names}
        assert least <= len(opened) <= most
        assert {shard_of[name] for name in readings} == opened
        got = sum(len(corpus.texts[name].encode()) for name in names)
        assert size * total <= got <= size * total + 90  # one document more
        if size < 0.1:
            assert max(opened) > count / 2


def test_a_start_with_a_bpe_needs_no_digests(make_config, corpus, readings, tmp_path, monkeypatch):
    """They are removed after a week without use, and take memory: the tokens must be enough."""
    config = make_config(tokenizer="bpe")
    first = load_data(config)
    for path in (tmp_path / "cache").glob("shard-*.npz"):
        path.unlink()
    readings.clear()
    second = load_data(config)
    assert readings == []
    assert second.fingerprint == first.fingerprint


def test_a_bpe_depends_on_the_shards_that_its_sample_is_taken_from(
    make_config, corpus, readings, tmp_path, monkeypatch
):
    keys = []

    def train(texts, size, folder, key):
        keys.append(key)
        return load_tokenizer("bytes")

    monkeypatch.setattr(pipeline, "cached_bpe", train)
    for limit in (200, 300, 10**9, 10**8):
        monkeypatch.setattr(sources, "SHARD_BYTES", limit)
        load_data(make_config(tokenizer="bpe", cache_dir=str(tmp_path / str(limit))))
    assert len(set(keys[:3])) == 3
    assert keys[2] == keys[3]


def test_a_text_alone_in_its_shard_is_one_document(tmp_path, readings, monkeypatch):
    """Only a text that is alone in its source is cut into pieces."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{name}\n" * 20_000)
    corpus = open_corpus(f"{tmp_path}/*.txt")
    assert len(corpus.shards) == 2
    assert corpus.summary.documents == 2
    assert [d.name for p in corpus.pieces(1, (0, 1)) for d in p.documents()] == ["a.txt", "b.txt"]


def test_documents_of_several_shards_are_cut_as_those_of_one(
    make_config, tmp_path, readings, monkeypatch
):
    """Few large documents: the split needs pieces of them, and equal pieces get one name."""
    for name in ("a", "b"):
        lines = [f"{name} {i}\n" if i % 3 else f"both {i}\n" for i in range(3000)]
        (tmp_path / f"{name}.txt").write_text("".join(lines))
    source = f"{tmp_path}/?.txt"
    load_data(make_config(source=source, cache_dir=str(tmp_path / "x")))
    monkeypatch.setattr(sources, "SHARD_BYTES", 10**9)
    load_data(make_config(source=source, cache_dir=str(tmp_path / "y")))
    assert cache_files(tmp_path / "x") == cache_files(tmp_path / "y")


def test_digests_depend_on_how_rows_are_read(corpus, odd, tmp_path, readings):
    corpus.source = odd
    assert opened(corpus, tmp_path, (0, 1), bad_rows="skip").summary.skipped == 12
    with pytest.raises(UserError, match="has null in the field"):
        _ = opened(corpus, tmp_path, (0, 1)).summary


def test_a_summary_that_is_remembered_must_be_that_of_the_digests(
    make_config, corpus, tmp_path, readings, monkeypatch
):
    """The digests were removed, and a file changes after the summary is read."""
    config = make_config()
    load_data(config)
    for path in (tmp_path / "cache").glob("shard-*.npz"):
        path.unlink()
    make = tokens._make_pieces

    def swap(*args):
        (corpus.folder / "33.txt").write_text("another text")
        return make(*args)

    monkeypatch.setattr(tokens, "_make_pieces", swap)
    with pytest.raises(UserError, match="has changed while it was read"):
        load_data(make_config(validation_fraction=0.3))
    assert list((tmp_path / "cache").glob("shard-*.npz")) == []
    assert list((tmp_path / "cache").glob("corpus-*.npz")) == []


def test_a_start_after_a_kill_reads_no_stored_shard(corpus, tmp_path, readings, monkeypatch):
    count = sources.read_file

    def killed(name, *args, **kwargs):
        if name == "30.txt":
            raise KeyboardInterrupt
        return count(name, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(sources, "read_file", killed)
        with pytest.raises(KeyboardInterrupt):
            _ = opened(corpus, tmp_path, (0, 1)).summary
    before = set(readings)
    readings.clear()
    assert opened(corpus, tmp_path, (0, 1)).summary.documents == 60
    assert set(corpus.texts) - before <= set(readings)
    assert len(set(readings) & before) < 5  # of the shard that was not stored


@pytest.mark.parametrize("file", ["20", "59"])  # 59: the last one of the corpus
@pytest.mark.parametrize("change", ["other", "more", "fewer"])
def test_a_shard_that_changes_before_it_is_tokenized(
    make_config, corpus, tmp_path, readings, monkeypatch, change, file
):
    monkeypatch.setattr(sources, "SHARD_BYTES", 1)  # each file is one
    rows = tmp_path / "rows"
    rows.mkdir()
    for number, text in enumerate(corpus.texts.values()):
        lines = "".join(json.dumps({"text": f"{text} {i}"}) + "\n" for i in range(4))
        (rows / f"{number:02}.jsonl").write_text(lines)
    path, make = rows / f"{file}.jsonl", tokens._make_pieces
    text = path.read_text()
    changed = {"other": text.replace(f"<{file}>", "<2!>"), "fewer": text[: text.index("\n") + 1]}
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


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "no zip": lambda path: path.write_bytes(b"PK\x03\x04 damaged"),
    "method of the zip": lambda path: path.write_bytes(
        re.sub(b"(?s)(PK\x01\x02.{6})..", lambda m: m[1] + b"\xff\xff", path.read_bytes())
    ),
    "another file": lambda path: np.savez(path, x=np.zeros(3)),
    "other lengths": lambda path: np.savez(
        path, **dict(np.load(path)) | {"sizes": np.zeros(1, np.int64)}
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_digests_are_made_again(corpus, tmp_path, readings, damage):
    expected = opened(corpus, tmp_path, (0, 1)).summary
    for path in (tmp_path / "cache").glob("*.npz"):
        DAMAGES[damage](path)
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
    empty = shards.digests_of([None], lambda size: None)
    assert empty.keys.shape == (0, 64)
    whole, first = shards.joined([empty, empty])
    assert len(first) == 0
    assert whole.skipped == 2
    assert whole.sizes.dtype == np.int64


def test_a_sample_is_never_empty(corpus, readings, monkeypatch):
    """Few documents, and no hash of a name is small enough."""
    for limit in (200, 10**9):
        monkeypatch.setattr(sources, "SHARD_BYTES", limit)
        found = open_corpus(corpus.source)
        (document,) = found.sample(1e-9, 0.5)
        assert not is_held_out(document.name, 0.5)
