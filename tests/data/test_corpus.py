"""Every kind of source gives its documents. Every bad source gives one sentence."""

import gzip
import json
import sys

import pytest

from yocou_jax.data.corpus import (
    hash_fraction,
    is_held_out,
    split_corpus,
)
from yocou_jax.data.formats import PIECE_BYTES
from yocou_jax.data.sources import open_corpus, parse_source
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


def test_parquet_with_a_struct_that_has_a_field_of_the_same_path(tmp_path):
    """pyarrow gives two columns for "meta.text"."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    table = pa.table({"meta": [{"text": "no"}] * 3, "meta.text": TEXTS})
    pq.write_table(table, tmp_path / "x.parquet")
    assert texts(open_corpus(f"{tmp_path}/x.parquet", "meta.text")) == TEXTS


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


def test_the_held_out_share_is_as_asked_and_grows_monotonically():
    names = [f"file{i}.py" for i in range(4000)]
    held_out = {name for name in names if is_held_out(name, 0.1)}
    assert 0.08 < len(held_out) / len(names) < 0.12
    assert held_out <= {name for name in names if is_held_out(name, 0.2)}
    # The hash is part of the file format: another value would move documents between the splits.
    assert round(hash_fraction("argparse.py"), 6) == 0.786127


def test_copies_after_the_repair_are_left_out(tmp_path):
    for name, raw in {"a": b"xyz\xff", "b": b"xyz\xfe", "c": "xyz\ufffd".encode()}.items():
        (tmp_path / f"{name}.txt").write_bytes(raw)
    corpus = open_corpus(f"{tmp_path}/*.txt")
    assert texts(corpus) == ["xyz\ufffd"]
    assert corpus.summary.duplicates == 2


# --- Which documents are held out --------------------------------------------------------------


def split_of(corpus, fraction, held_out_bytes, train_bytes):
    """The bytes of both splits, and the names that are held out."""
    corpus, threshold = split_corpus(corpus, fraction, held_out_bytes, train_bytes)
    sizes, names = [0, 0], set()
    for name, text in corpus.documents():
        held_out = is_held_out(name, threshold)
        sizes[held_out] += len(text.encode())
        names |= {name} if held_out else set()
    return sizes, names


def test_a_large_corpus_is_split_only_by_name(tmp_path):
    records = [{"text": f"{i} {'x' * (i % 50)}"} for i in range(4000)]
    names = []
    for count in (2000, 4000):
        corpus = open_corpus(write_jsonl(tmp_path / "x.jsonl", records[:count]))
        assert split_corpus(corpus, 0.02, 500, 500) == (corpus, 0.02)
        names.append(split_of(corpus, 0.02, 500, 500)[1])
    assert len(names[0]) > 20
    assert names[0] == {n for n in names[1] if int(n.split(":")[1]) <= 2000}


@pytest.mark.parametrize("fraction", [1e-9, 0.02, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3, 20, 300])
def test_both_splits_get_what_they_need_for_many_names(tmp_path, count, fraction):
    for seed in range(8):
        rows = [
            {"text": "".join(f"{i} words {j}\n" for j in range(6000 // count))}
            for i in range(count)
        ]
        corpus = open_corpus(write_jsonl(tmp_path / f"{seed}.jsonl", rows))
        (train, held_out), _ = split_of(corpus, fraction, 2000, 20_000)
        assert train >= 20_000
        assert held_out >= 2000
        assert held_out <= corpus.summary.bytes * (fraction + 1 / 8) + 2000


@pytest.mark.parametrize("separator", ["\n", "\r", "\r\n", " ", ""], ids=ascii)
@pytest.mark.parametrize("size", [300, 5000, 200_000])
def test_one_document_is_cut_into_pieces_that_are_small_enough(tmp_path, size, separator):
    text = separator.join(f"{i}é" for i in range(size // 4))
    size = len(text.encode())
    (tmp_path / "x.txt").write_bytes(text.encode())
    write_jsonl(tmp_path / "x.jsonl", [{"text": text}])
    for name in ("x.txt", "x.jsonl"):
        corpus = open_corpus(f"{tmp_path}/{name}")
        (train, held_out), _ = split_of(corpus, 0.02, size // 10, size // 2)
        assert held_out >= size // 10
        assert train >= size // 2
        pieces = split_corpus(corpus, 0.02, size // 10, size // 2).corpus
        assert "".join(texts(pieces)) == text


def test_equal_pieces_are_in_the_same_split(tmp_path):
    for name in "ab":
        log = "".join(f"log {name} {i % 50}\n" for i in range(100))
        (tmp_path / f"{name}.txt").write_text(log + "0123456789abcdef\n" * 3000)
    corpus = open_corpus(f"{tmp_path}/*.txt")
    corpus, threshold = split_corpus(corpus, 0.02, 100, 200)
    assert corpus.piece_bytes is not None
    assert len("".join(texts(corpus))) == sum(p.stat().st_size for p in tmp_path.iterdir())
    sides = {}
    for name, text in corpus.documents():
        sides.setdefault(text, set()).add(is_held_out(name, threshold))
    assert all(len(side) == 1 for side in sides.values())


def test_the_threshold_is_between_two_names(tmp_path):
    log = "".join(f"log {i}\n" for i in range(60))
    for seed in range(20):
        row = {"text": log + "0123456789abcdef\n" * 300}
        corpus = open_corpus(write_jsonl(tmp_path / f"{seed}.jsonl", [row]))
        (train, held_out), _ = split_of(corpus, 0.02, 50, 200)
        assert held_out >= 50
        assert train >= 200


def test_one_huge_document_among_tiny_ones(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"tiny {i}")
    (tmp_path / "huge.txt").write_text("\n".join(map(str, range(100_000))))
    (train, held_out), _ = split_of(open_corpus(f"{tmp_path}/*.txt"), 0.02, 4000, 64_000)
    assert held_out >= 4000
    assert train > 400_000


def test_too_little_text_is_shared_by_need(tmp_path):
    corpus = open_corpus(
        write_jsonl(tmp_path / "x.jsonl", [{"text": f"row {i:04}"} for i in range(200)])
    )
    (train, held_out), _ = split_of(corpus, 0.02, 10**5, 3 * 10**5)
    assert abs(held_out / (train + held_out) - 1 / 4) < 0.03


# --- Mixtures ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("python", [(1.0, "python")]),
        ("a*b+c.txt", [(1.0, "a*b+c.txt")]),
        ("0.7*python + 0.3*p/*.txt", [(0.7, "python"), (0.3, "p/*.txt")]),
        ("0.25 * a + 7.5e-1*hf:x/y", [(0.25, "a"), (0.75, "hf:x/y")]),
        ("0.7*a+0.3*b", [(0.7, "a"), (0.3, "b")]),
        ("0.7*a +.3*b*.txt", [(0.7, "a"), (0.3, "b*.txt")]),
        ("5e-1*c++/*.txt+.5 * a+b", [(0.5, "c++/*.txt"), (0.5, "a+b")]),
        ("1.0*a", [(1.0, "a")]),
        ("1 * 2*.txt", [(1.0, "2*.txt")]),
        ("'a + b.txt'", [(1.0, "a + b.txt")]),
        ("0.5*\"a + b.txt\" + 0.5*'0.2*c+0.8*d'", [(0.5, "a + b.txt"), (0.5, "0.2*c+0.8*d")]),
        ("0.5*  'a + b'+0.5*python", [(0.5, "a + b"), (0.5, "python")]),
        ("0.5*bob's.txt + 0.5*al's.txt", [(0.5, "bob's.txt"), (0.5, "al's.txt")]),
        ("hf:org/name", [(1.0, "hf:org/name")]),
        (
            "0.5*needle(kind=text,haystack=a/*.txt)+0.5*hops(p=2, letters=4)",
            [(0.5, "needle(kind=text,haystack=a/*.txt)"), (0.5, "hops(p=2, letters=4)")],
        ),
    ],
)
def test_parse_source(source, expected):
    assert parse_source(source) == expected


@pytest.mark.parametrize(
    "name", ["a + b.txt", "0.5*a + 0.5*b", "1.0*a", "2*.txt", "'q'", "x[1].txt", " x"]
)
def test_the_name_of_an_existing_file_is_not_parsed(tmp_path, monkeypatch, name):
    (tmp_path / name).write_text("its text")
    monkeypatch.chdir(tmp_path)
    for source in (name, str(tmp_path / name)):
        assert parse_source(source) == [(1.0, source)]
        assert texts(open_corpus(source)) == ["its text"]


def test_a_glob_that_matches_is_not_a_mixture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("2b.txt", "1ax.txt", "c+3zx.txt"):
        (tmp_path / name).write_text(name)
    for source, name in {
        "2*.txt": "2b.txt",
        "1*x.txt": "1ax.txt",
        "c+3*x.txt": "c+3zx.txt",
    }.items():
        assert parse_source(source) == [(1.0, source)]
        assert texts(open_corpus(source)) == [name]
    assert parse_source("0.5*2*.txt + 0.5*'c+3*x.txt'") == [(0.5, "2*.txt"), (0.5, "c+3*x.txt")]


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("0.7*python + a.txt", "'a.txt'.*needs a positive weight"),
        ("a + b", "'a'.*needs a positive weight"),
        ("-0.5*a + 1.5*b", "'-0.5.a'.*needs a positive weight"),
        ("1.5*a+-0.5*b", "'-0.5.b'.*needs a positive weight"),
        ("0*a + 1*b", "needs a positive weight"),
        ("1.2.3*a + 1*b", "needs a positive weight"),
        ("0,7*a + 0,3*b", "needs a positive weight"),
        ("inf*a + 1*b", "'inf.a'.*needs a positive weight"),
        ("nan*a + 1*b", "'nan.a'.*needs a positive weight"),
        ("nan*a+nan*b", "'nan.a'.*needs a positive weight"),
        ("1e400*a", "'1e400.a'.*needs a positive weight"),
        ("0.7*a + 0.7*b", "must sum to 1; they sum to 1.4"),
        ("0.7*a+0.7*b", "must sum to 1; they sum to 1.4"),
        ("2*nothing.txt", "they sum to 2. As one path or glob it matches no file"),
    ],
)
def test_bad_weights(source, sentence):
    with pytest.raises(UserError, match=sentence):
        parse_source(source)


def test_paths_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("at home")
    for source in ("~/a.txt", "~/*.txt"):
        assert texts(open_corpus(source)) == ["at home"]
    assert parse_source("0.5*~/a.txt+0.5*python") == [(0.5, "~/a.txt"), (0.5, "python")]


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("", "'' is not a file that exists"),
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


def test_a_broken_link_is_not_left_out_silently(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(UserError, match=r"b.txt' is a link to a file that does not exist"):
        open_corpus(f"{tmp_path}/*.txt")
