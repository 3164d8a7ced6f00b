"""Every kind of source gives its documents, and every bad source one sentence."""

import gzip
import json
import sys
from types import SimpleNamespace

import pytest

from yocou_jax.data.corpus import (
    PIECE_BYTES,
    hash_fraction,
    is_held_out,
    open_corpus,
    parse_source,
)
from yocou_jax.errors import UserError

TEXTS = ["first\n", "naïve 日本\n", "third"]


def texts(corpus):
    return [document.text for document in corpus.documents()]


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return str(path)


def test_python_is_the_standard_library_without_tests():
    corpus = open_corpus("python")
    names = [document.name for document in corpus.documents()]
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not [n for n in names if n.startswith(("test/", "site-packages/")) or "/tests/" in n]
    assert names == sorted(names)
    assert corpus.summary.documents == len(names)
    assert corpus.summary.bytes > 5e6
    assert corpus.summary.invalid == 0


def test_site_packages_holds_the_installed_packages():
    names = (name for name, _ in open_corpus("site_packages").documents())
    assert any(name.startswith("numpy/") for name in names)


def test_glob_crosses_directories_in_sorted_order_and_reads_gz(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_bytes(TEXTS[0].encode())
    (tmp_path / "b" / "c.txt.gz").write_bytes(gzip.compress(TEXTS[1].encode()))
    (tmp_path / "d.txt").write_bytes(b"with\r\nCRLF")
    corpus = open_corpus(f"{tmp_path}/**/*.txt*")
    assert [d.name for d in corpus.documents()] == ["a.txt", "b/c.txt.gz", "d.txt"]
    assert texts(corpus) == [TEXTS[0], TEXTS[1], "with\r\nCRLF"]


def test_names_and_fingerprint_do_not_depend_on_the_folder(tmp_path):
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        for name in "ab":
            (tmp_path / folder / f"{name}.txt").write_text(name)
    here, there = (open_corpus(f"{tmp_path}/{f}/*.txt").summary for f in ("here", "there"))
    assert here == there
    (tmp_path / "there" / "b.txt").write_text("c")
    assert open_corpus(f"{tmp_path}/there/*.txt").summary.fingerprint != here.fingerprint
    (tmp_path / "here" / "b.txt").rename(tmp_path / "here" / "c.txt")
    assert open_corpus(f"{tmp_path}/here/*.txt").summary.fingerprint != here.fingerprint


def test_one_text_file_becomes_pieces_of_whole_lines(tmp_path):
    text = "".join(f"line {i} é\n" for i in range(5000))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    documents = list(open_corpus(f"{tmp_path}/book.txt").documents())
    assert "".join(d.text for d in documents) == text
    assert len({d.name for d in documents}) == len(documents) > 3
    assert all(d.text.endswith("\n") for d in documents)
    assert all(0 <= len(d.text.encode()) - PIECE_BYTES < 100 for d in documents[:-1])


@pytest.mark.parametrize("compressed", [False, True])
def test_jsonl(tmp_path, compressed):
    path = tmp_path / "x.jsonl"
    write_jsonl(path, [{"body": t, "id": i} for i, t in enumerate(TEXTS)])
    if compressed:
        path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(path.read_bytes() + b"\n"))
        path = path.with_suffix(".jsonl.gz")
    assert texts(open_corpus(str(path), "body")) == TEXTS


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": TEXTS, "id": [1, 2, 3]}), tmp_path / "x.parquet")
    assert texts(open_corpus(f"{tmp_path}/x.parquet")) == TEXTS
    with pytest.raises(UserError, match=r"'body'.*its fields are 'text', 'id'\."):
        texts(open_corpus(f"{tmp_path}/x.parquet", "body"))
    (tmp_path / "bad.parquet").write_text("not parquet")
    with pytest.raises(UserError, match="is not valid parquet"):
        texts(open_corpus(f"{tmp_path}/bad.parquet"))


def test_hugging_face_name_and_config(monkeypatch):
    calls = []

    def load_dataset(name, config, split):
        calls.append((name, config, split))
        return [{"text": t} for t in TEXTS]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert texts(open_corpus("hf:org/name")) == TEXTS
    assert texts(open_corpus("hf:org/name/some-config")) == TEXTS
    assert calls == [("org/name", None, "train"), ("org/name", "some-config", "train")]
    with pytest.raises(UserError, match=r"Row 1 of the data set 'org/name'.*fields are 'text'"):
        texts(open_corpus("hf:org/name", "body"))


def test_hugging_face_offline_and_not_installed(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route to the hub\nmore lines")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(UserError, match=r"'org/name'.*no route to the hub\. Check"):
        texts(open_corpus("hf:org/name"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        texts(open_corpus("hf:org/name"))


def test_parquet_without_pyarrow(monkeypatch, tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        texts(open_corpus(f"{tmp_path}/x.parquet"))


def test_invalid_utf8_is_replaced_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good")
    (tmp_path / "b.txt").write_bytes(b"b\xffd")
    corpus = open_corpus(f"{tmp_path}/*.txt")
    assert texts(corpus) == ["good", "b\ufffdd"]
    assert corpus.summary.invalid == 1
    assert corpus.summary.bytes == len("goodb\ufffdd".encode())
    write_jsonl(tmp_path / "x.jsonl", [{"text": "lone \ud800"}])  # legal JSON, not UTF-8
    lone = open_corpus(f"{tmp_path}/x.jsonl")
    assert lone.summary.invalid == 1
    assert all(text.encode() for text in texts(lone))


def test_copies_and_empty_documents_are_left_out(tmp_path):
    for name, text in {"a": "same", "b": "", "c": "same", "d": "other"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    corpus = open_corpus(f"{tmp_path}/*.txt")
    assert [d.name for d in corpus.documents()] == ["a.txt", "d.txt"]
    assert corpus.summary.duplicates == 1


def test_held_out_share_is_the_asked_one_and_grows_monotonically():
    names = [f"file{i}.py" for i in range(4000)]
    held_out = {name for name in names if is_held_out(name, 0.1)}
    assert 0.08 < len(held_out) / len(names) < 0.12
    assert held_out <= {name for name in names if is_held_out(name, 0.2)}
    # Part of the file format: another value would move documents between the splits.
    assert round(hash_fraction("argparse.py"), 6) == 0.786127


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("python", [(1.0, "python")]),
        ("a*b+c.txt", [(1.0, "a*b+c.txt")]),
        ("0.7*python + 0.3*p/*.txt", [(0.7, "python"), (0.3, "p/*.txt")]),
        ("0.25 * a + 7.5e-1*hf:x/y", [(0.25, "a"), (0.75, "hf:x/y")]),
    ],
)
def test_parse_source(source, expected):
    assert parse_source(source) == expected


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("0.7*python + a.txt", "'a.txt'.*needs a positive weight"),
        ("-0.5*a + 1.5*b", "'-0.5.a'.*needs a positive weight"),
        ("0*a + 1*b", "needs a positive weight"),
        ("1.2.3*a + 1*b", "needs a positive weight"),
        ("0.7*a + 0.7*b", "must sum to 1; they sum to 1.4"),
    ],
)
def test_bad_weights(source, sentence):
    with pytest.raises(UserError, match=sentence):
        parse_source(source)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("pyhton", "'pyhton' is not a file that exists, nor one of 'python'"),
        ("{tmp}/missing.txt", "missing.txt' is not a file that exists"),
        ("{tmp}/*.nothing", "No file matches"),
        ("{tmp}", "is a directory; name its files with a glob"),
        ("{tmp}/empty.txt", "contains no text"),
        ("{tmp}/damaged.txt.gz", "could not be read"),
        ("{tmp}/cut.txt.gz", "could not be read"),
        ("{tmp}/field.jsonl", r"Line 2 .*field 'text'.*its fields are 'body', 'id'\."),
        ("{tmp}/number.jsonl", r"Line 1 .*has a number in the field 'text'"),
        ("{tmp}/list.jsonl", "Row 1 .*is a string, not an object with the field 'text'"),
        ("{tmp}/broken.jsonl", "Line 2 .*is not valid JSON"),
    ],
)
def test_bad_sources(tmp_path, source, sentence):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "damaged.txt.gz").write_bytes(b"not gzip")
    whole = gzip.compress(b"some text that is long enough")
    (tmp_path / "cut.txt.gz").write_bytes(whole[: len(whole) // 2])
    write_jsonl(tmp_path / "field.jsonl", [{"text": "a"}, {"body": "b", "id": 1}])
    write_jsonl(tmp_path / "number.jsonl", [{"text": 5}])
    write_jsonl(tmp_path / "list.jsonl", [["text"]])
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(UserError, match=sentence):
        open_corpus(source.format(tmp=tmp_path)).summary  # noqa: B018
