"""The content of a file decides whether it is rows, text, compressed or binary (never text)."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import sqlite3
import sys
import tarfile
import zipfile

import numpy as np
import pytest

from yocou_jax.data.formats import PIECE_BYTES, pieces
from yocou_jax.data.sources import open_corpus
from yocou_jax.errors import UserError

TEXTS = ["first\n", 'naïve 日本\n{"text": 1}', "third 🙂"]
LINES = "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(TEXTS)).encode()
ARRAY = json.dumps([{"text": t} for t in TEXTS], indent=1).encode()
BOM = b"\xef\xbb\xbf"
COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def texts(path, *arguments):
    return [document.text for document in open_corpus(str(path), *arguments).documents()]


def write(path, content):
    path.write_bytes(content)
    return path


def sentence(path, *arguments):
    with pytest.raises(UserError) as error:
        open_corpus(str(path), *arguments).summary  # noqa: B018
    assert str(error.value).endswith(".")
    return str(error.value)


# --- Rows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize(
    "name",
    [
        "x.jsonl",
        "x.JSONL",
        "x.ndjson",
        "x.json",
        "x.txt",
        "c4-train.00000-of-01024.json",
        "x.jsonl.0001",
        "x.jsonl-0001",
        "x.jsonl.bak",
        "x.json.tmp",
        "x.log",
        "part-00000",
    ],
)
def test_one_object_per_line(tmp_path, name, compression):
    name += compression.upper() if name.isupper() else compression
    assert texts(write(tmp_path / name, COMPRESS[compression](LINES))) == TEXTS


@pytest.mark.parametrize("name", ["x.json", "x.JSON", "x.jsonl", "data", "x.json.gz", "x.txt"])
@pytest.mark.parametrize(
    "content",
    [
        ARRAY,
        json.dumps([{"text": t} for t in TEXTS]).encode(),
        BOM + b" \n" + ARRAY,
        b"\n".join(json.dumps({"text": t}, indent=2).encode() for t in TEXTS),
        b"".join(json.dumps({"text": t}).encode() for t in TEXTS),
        LINES.replace(b"\n", b"\r"),
        LINES.replace(b"\n", b"\r\n\r\n"),
    ],
    ids=["indented", "one line", "BOM", "objects", "joined", "CR", "CRLF"],
)
def test_an_array_or_values_one_after_the_other(tmp_path, name, content):
    content = gzip.compress(content) if name.endswith(".gz") else content
    assert texts(write(tmp_path / name, content)) == TEXTS


def test_an_object_per_file(tmp_path):
    for i, text in enumerate(TEXTS):
        write(tmp_path / f"{i}.json", json.dumps({"text": text}, indent=4).encode())
    assert texts(tmp_path / "*.json") == TEXTS


@pytest.mark.parametrize(
    "rows",
    [
        [{"text": "long " * 50_000}, {"text": "short"}],
        [{"id": 1, "nested": {"a": [{"b": 2}]}, "text": "long " * 50_000}],
        [{"id": 1}, {"text": "a"}],
        [{}, None, {"text": "a"}],
    ],
    ids=["longer than what is looked at", "after others", "not in the first", "nothing first"],
)
def test_rows_under_another_name(tmp_path, rows):
    wanted = [row["text"] for row in rows if row and "text" in row]
    for content in ("\n".join(map(json.dumps, rows)), json.dumps(rows)):
        path = write(tmp_path / "x.bak", content.encode())
        corpus = open_corpus(str(path), bad_rows="skip")
        assert [text for _, text in corpus.documents()] == wanted


def test_invalid_bytes_in_rows_are_repaired(tmp_path):
    path = write(tmp_path / "x.jsonl", b'{"text": "a\xffb"}\n{"text": "c"}\n')
    corpus = open_corpus(str(path))
    assert [text for _, text in corpus.documents()] == ["a\ufffdb", "c"]
    assert corpus.summary.invalid == 1


def test_text_that_only_begins_like_json_stays_text(tmp_path):
    notebook = json.dumps({"cells": [{"text": ["a"]}], "metadata": {}}, indent=1).encode()
    for name, content in {
        "a.txt": b'{"a": 1}\n',
        "b.py": b'{"a": "text"}["a"]\n',
        "c.ipynb": notebook,
        "d.md": b'{"text" is how it begins\n',
        "e.txt": b'"text": {"a": 1}\n',
        "f.txt": b'{"a": 1} "text": "a"\n',
        "g.txt": json.dumps({"a": {"text": "b"}}).encode(),
    }.items():
        assert texts(write(tmp_path / name, content)) == [content.decode()]


BAD_VALUES = {
    "null": ("null", "has null in the field 'text'"),
    "5": ("5", "has a number in the field 'text'"),
    "1e3": ("1e3", "has a number in the field 'text'"),
    "true": ("true", "has a boolean in the field 'text'"),
    "list": ('["a"]', "has a list in the field 'text'"),
    "struct": ('{"text": "a"}', "has an object in the field 'text'"),
}


@pytest.mark.parametrize(("value", "found"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_a_row_without_text_says_what_is_there_and_where(tmp_path, value, found):
    rows = ['{"text": "a"}', f'{{"text": {value}}}', '{"body": "b"}', '"c"', '{"text": "d"}']
    lines = write(tmp_path / "x.jsonl", "\n".join(rows).encode())
    array = write(tmp_path / "x.json", f"[{','.join(rows)}]".encode())
    for path, row in ((lines, "Line 2"), (array, "Row 2")):
        said = sentence(path)
        assert said.startswith(f"{row} of the data file '{path}' {found} (data.text_field)")
        assert "data.bad_rows='skip'" in said
        corpus = open_corpus(str(path), "text", "skip")
        assert [d.text for d in corpus.documents()] == ["a", "d"]
        assert corpus.summary.skipped == 3
    write(lines, "\n".join(rows[2:]).encode())
    assert "Line 1 of the" in sentence(lines)
    assert "has no field 'text' (data.text_field); its fields are 'body'." in sentence(lines)
    write(lines, rows[3].encode())
    assert "is a string, not an object" in sentence(lines)
    write(lines, "\n".join(rows[1:4]).encode())
    assert "contains no text; 3 rows had none and were left out." in sentence(lines, "text", "skip")


def test_a_line_that_is_not_json_is_refused_with_each_policy(tmp_path):
    for content in (LINES + b'{"text": ', LINES + b'{"text\xff: "a"}', LINES + b"[" * 10**5):
        path = write(tmp_path / "x.jsonl", content)
        assert "Line 4 of the data file" in sentence(path, "text", "skip")
        assert "is not valid JSON" in sentence(path, "text", "skip")
    for content in (ARRAY[:-1], ARRAY + b"x", b'{"text": "a"},\n{"text": "b"}', b"[" * 10**5):
        assert "is not valid JSON" in sentence(write(tmp_path / "x.json", content))


def test_parquet_columns_of_text(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    plain = pa.array(TEXTS)
    for column in (plain, plain.cast(pa.large_string()), plain.dictionary_encode()):
        pq.write_table(pa.table({"id": [1, 2, 3], "text": column}), tmp_path / "x.parquet")
        for name in ("x.parquet", "X.PARQUET", "shard", "x.txt"):  # PAR1 in the file decides
            assert texts((tmp_path / "x.parquet").rename(tmp_path / name)) == TEXTS
            (tmp_path / name).rename(tmp_path / "x.parquet")
    invalid = pa.array([b"a\xff", b"b"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": invalid}), tmp_path / "x.parquet")
    assert [text[0] for text in texts(tmp_path / "x.parquet")] == ["a", "b"]
    assert open_corpus(f"{tmp_path}/x.parquet").summary.invalid == 1
    packed = write(tmp_path / "y.parquet.gz", gzip.compress((tmp_path / "x.parquet").read_bytes()))
    assert "parquet cannot be compressed as a whole; decompress it." in sentence(packed)
    cut = write(tmp_path / "z.parquet", (tmp_path / "x.parquet").read_bytes()[:-9])
    assert "is not valid parquet" in sentence(cut)


def test_parquet_rows_without_text(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    columns = {
        "null": ["a", None],
        "a number": [1, 2],
        "bytes": [b"a", b"b"],
        "a list": [["a"], ["b"]],
        "an object": [{"text": "a"}, {"text": "b"}],
    }
    for found, values in columns.items():
        pq.write_table(pa.table({"text": values}), tmp_path / "x.parquet")
        said = sentence(tmp_path / "x.parquet")
        row = 2 if found == "null" else 1
        assert f"Row {row} of the data file '{tmp_path}/x.parquet' has {found} in the" in said
    pq.write_table(pa.table({"text": ["a", None, "c"]}), tmp_path / "x.parquet")
    corpus = open_corpus(f"{tmp_path}/x.parquet", "text", "skip")
    assert [d.text for d in corpus.documents()] == ["a", "c"]
    assert corpus.summary.skipped == 1
    assert "3 rows had none" in sentence(tmp_path / "x.parquet", "body", "skip")


# --- Compression -------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz"])
def test_compressed_text_is_recognized_by_its_content(tmp_path, compression):
    compress = COMPRESS[compression]
    for name in (f"x.txt{compression}", f"x.txt{compression.upper()}", "x.txt", "x", "x.py"):
        assert texts(write(tmp_path / name, compress(b"some text"))) == ["some text"]
    joined = write(tmp_path / "x", compress(b"some") + compress(b"") + compress(b" text"))
    assert texts(joined) == ["some text"]
    assert texts(write(tmp_path / "x", compress(gzip.compress(b"twice")))) == ["twice"]
    large = "".join(f"line {i}\n" for i in range(50_000))
    assert "".join(texts(write(tmp_path / "x", compress(large.encode())))) == large
    other = next(suffix for suffix in (".gz", ".bz2") if suffix != compression)
    assert texts(write(tmp_path / f"x.txt{other}", compress(b"some text"))) == ["some text"]


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz"])
def test_damaged_compressed_data_is_refused(tmp_path, compression):
    whole = COMPRESS[compression](LINES * 50)
    assert texts(write(tmp_path / "x.jsonl", whole)) == TEXTS
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0x55
    for content in (whole[:-1], whole[: len(whole) // 2], bytes(flipped), whole + b"rest"):
        said = sentence(write(tmp_path / "x.jsonl", content))
        assert "could not be read: its " in said
    said = sentence(write(tmp_path / f"x.jsonl{compression}", LINES))
    assert "data that its name promises" in said


@pytest.mark.parametrize("name", ["x.jsonl.zst", "x.jsonl", "x.ZSTD", "x"])
def test_zstd(tmp_path, name):
    zstandard = pytest.importorskip("zstandard")
    content = LINES if "json" in name else b"a text"
    compressed = zstandard.ZstdCompressor().compress(content)
    skipped = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
    for data in (compressed, skipped + compressed, compressed + skipped):
        assert texts(write(tmp_path / name, data)) == (TEXTS if "json" in name else ["a text"])
    streamed = zstandard.ZstdCompressor().stream_writer(io.BytesIO(), closefd=False)
    streamed.write(content * 1000)
    assert "could not be read: its zstd data" in sentence(write(tmp_path / name, compressed[:-1]))


def test_zstd_without_a_package_for_it(tmp_path, monkeypatch):
    for module in ("zstandard", "compression", "compression.zstd"):
        monkeypatch.setitem(sys.modules, module, None)
    path = write(tmp_path / "x.jsonl.zst", b"\x28\xb5\x2f\xfd and more")
    assert "run 'pip install zstandard'" in sentence(path)


# --- Text and binary ---------------------------------------------------------------------------


def binaries():
    array, database, archive, packed = (
        io.BytesIO(),
        sqlite3.connect(":memory:"),
        *(io.BytesIO() for _ in range(2)),
    )
    np.save(array, np.full(40, 0x61626364))
    database.execute("create table t (a text)")
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.txt", "text")
    with tarfile.open(fileobj=packed, mode="w:gz") as file:
        file.addfile(tarfile.TarInfo("a.txt"))
    rng = np.random.default_rng(0)
    return {
        "a zip archive": archive.getvalue(),
        "a tar archive": packed.getvalue(),
        "a NumPy array": array.getvalue(),
        "an SQLite database": database.serialize(),
        "a PDF file": b"%PDF-1.4\n1 0 obj\n",
        "a PNG image": b"\x89PNG\r\n\x1a\nrest",
        "a JPEG image": b"\xff\xd8\xff\xe0rest",
        "an ELF program": b"\x7fELF rest",
        "an Arrow file": b"ARROW1 rest",
        "binary": pickle.dumps({"text": "a" * 100}),
        "binary (": (60).to_bytes(8, "little") + b'{"a": {"dtype": "F32"}}' + b"text" * 20,
        "text in UTF-16": "some text".encode("utf-16"),
        "binary (it": "some text".encode("utf-16-le"),
        "text in UTF-32": b"\x00\x00\xfe\xff" + "some text".encode("utf-32-be"),
        "binary or in another": "русский текст".encode("koi8-r"),
        "binary or": rng.integers(1, 256, 500, np.uint8).tobytes(),
    }


@pytest.mark.parametrize("name", ["x.txt", "x", "x.jsonl", "x.json", "x.py"])
def test_binary_is_never_text(tmp_path, name):
    for what, content in binaries().items():
        for data in (content, bz2.compress(content)):
            said = sentence(write(tmp_path / name, data))
            assert f"'{tmp_path}/{name}' is {what}" in said, said
            assert "leave it out of data.source." in said


def test_text_with_some_invalid_bytes_is_read(tmp_path):
    french = "garçon à la crème\n".encode("latin-1")
    for content in (french, b"b\xffd", b"\x1b[1mbold\x1b[0m\f\x08"):
        (text,) = texts(write(tmp_path / "x.txt", content))
        assert text == content.decode("utf-8", "replace")


def test_a_byte_order_mark_is_not_text(tmp_path):
    assert texts(write(tmp_path / "x.txt", BOM + b"text")) == ["text"]
    assert texts(write(tmp_path / "x.txt", gzip.compress(BOM + b"text"))) == ["text"]
    write(tmp_path / "y.txt", BOM + b"more")
    assert texts(tmp_path / "*.txt") == ["text", "more"]
    for name in ("x.jsonl", "x.json"):
        assert texts(write(tmp_path / name, BOM + LINES)) == TEXTS
        assert texts(write(tmp_path / name, BOM + LINES + BOM + b'{"text": "d"}')) == [*TEXTS, "d"]
    assert "contains no text" in sentence(write(tmp_path / "z", BOM))


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r", "", "é", "日", "🙂"], ids=ascii)
@pytest.mark.parametrize("size", [16, 100, PIECE_BYTES])
def test_pieces_end_at_line_ends_or_between_characters(size, line_end):
    for offset in range(5):
        text = "x" * offset + "".join(f"line {i}{line_end}" for i in range(3 * size // 4))
        parts = list(pieces(io.BytesIO(text.encode()), size))
        assert "".join(piece.decode() for piece in parts) == text
        assert len(parts) > 1
        assert all(size - 3 <= len(piece) <= 2 * size + 1 for piece in parts[:-1])
        if line_end in ("\n", "\r\n", "\r"):
            assert all(piece.decode().endswith(line_end) for piece in parts)
            assert all(len(piece) < size + 20 for piece in parts[:-1])
            assert not any(piece.startswith(b"\n") for piece in parts)


@pytest.mark.parametrize("before", [13, 14, 15, 29, 30, 31, 32, 33])
def test_a_pair_of_cr_and_lf_stays_together(before):
    text = b"x" * before + b"\r\n" + b"y" * 40
    parts = list(pieces(io.BytesIO(text), 16))
    assert b"".join(parts) == text
    assert not any(part.startswith(b"\n") for part in parts)


def test_invalid_bytes_are_cut_into_pieces():
    text = b"\x80" * 1000
    assert b"".join(pieces(io.BytesIO(text), 16)) == text
