"""From one file to its documents: compression, rows of JSON and parquet, text, and binary files.

Compression, parquet and binary files are recognized by their content. JSON is recognized by the
suffix of the name, in upper or lower case. A suffix of a compression or without letters is left out
before: `x.jsonl.gz`, `x.jsonl.3`. A file without a suffix is also JSON if it begins with `{"`, and
a file with another suffix (`.txt`, `.bak`) if it begins with objects of which one has the text
field.
"""

import bz2
import io
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from yocou_jax.errors import UserError

# A name; and a text, the bytes of a text, or an error that says why a row has no text.
Raw = tuple[str, str | bytes | UserError]

# Of parquet, BATCH_ROWS are decoded together: they may be whole books. With pre_buffer pyarrow
# keeps all bytes of the column that were read so far.
BATCH_ROWS = 256
PARQUET: dict[str, Any] = {
    "page_checksum_verification": True, "pre_buffer": False, "buffer_size": 8 * 1024**2
}  # fmt: skip
BLOCK_BYTES = 64 * 1024  # the beginning of a file, which decides what it is
PIECE_BYTES = 16 * 1024  # size of the pieces of a single text file: a split needs documents
BOM = "\ufeff".encode()
MAX_NOT_TEXT = 1 / 3  # share of the characters; above, a file is binary or in another encoding
CONTROL = bytes(set(range(32)) - set(b"\b\t\n\v\f\r\x1b"))
ROWS = {".json", ".jsonl", ".ndjson", ".jsonlines", ".ldjson"}
# How compressed data begins. zstd may begin with a skippable frame.
COMPRESSED = re.compile(
    rb"(?P<gzip>\x1f\x8b\x08)"
    rb"|(?P<bzip2>BZh[1-9](?:\x31\x41\x59\x26\x53\x59|\x17\x72\x45\x38\x50\x90))"
    rb"|(?P<xz>\xfd7zXZ\x00)"
    rb"|(?P<zstd>\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18)"
)
COMPRESSION_OF = {
    ".gz": "gzip",
    ".gzip": "gzip",
    ".bz2": "bzip2",
    ".xz": "xz",
    ".zst": "zstd",
    ".zstd": "zstd",
}
# Parts of JSON. FIELD: the name of a field, with the brace or comma before it. AFTER_FIELD: what
# follows the value of a field, to the next comma or after the object. BETWEEN_ROWS: between rows.
FIELD = re.compile(r'[{,]\s*("(?:[^"\\]|\\.)*")\s*:\s*')
AFTER_FIELD = re.compile(r"\s*(?:\}[\s,\]\ufeff]*)?")
BETWEEN_ROWS = re.compile(r"[\s\[,\]\ufeff]*")
MAX_COMPRESSIONS = 3  # one inside the other; some files contain themselves
BINARY = {  # the beginning of binary files; an error names what they are
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a rar archive",
    b"\x04\x22\x4d\x18": "lz4 data",
    b"\x1f\x9d": "compressed data (.Z)",
    b"LZIP\x01": "lzip data",
    b"ARROW1": "an Arrow file",
    b"FEA1": "a Feather file",
    b"%PDF-": "a PDF file",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF89a": "a GIF image",
    b"GIF87a": "a GIF image",
    b"\x93NUMPY": "a NumPy array",
    b"SQLite format 3": "an SQLite database",
    b"\x7fELF": "an ELF program",
    b"\xff\xfe": "text in UTF-16 or UTF-32",
    b"\xfe\xff": "text in UTF-16 or UTF-32",
    b"\x00\x00\xfe\xff": "text in UTF-32",
}


def read_file(name: str, path: Path, text_field: str, alone: bool) -> Iterator[Raw]:
    """The documents of one file: its rows, or all of its text.

    A text that is `alone` in its source is read in pieces of about PIECE_BYTES. Raises UserError
    for a file that is binary, damaged, or not what its name says.
    """
    try:
        with _open_inflated(path) as file:
            head = file.peek(BLOCK_BYTES)[:BLOCK_BYTES]
            rows = _rows(name, path, file, head, text_field)
            if rows is not None:
                yield from rows
            elif alone:
                for number, piece in enumerate(pieces(file, PIECE_BYTES)):
                    yield f"{name}#{number}", piece
            else:
                yield name, file.read()
    except (OSError, EOFError) as error:
        raise UserError(f"The data file '{path}' could not be read: {_reason(error)}.") from error


def _reason(error: BaseException) -> str:
    """The message of an error of another library, as the end of a sentence."""
    return " ".join(str(getattr(error, "strerror", None) or error).split()).rstrip(".")


def _rows(
    name: str, path: Path, file: io.BufferedReader, head: bytes, text_field: str
) -> Iterator[Raw] | None:
    """The rows of a file. For text returns None, and `file` is after the byte-order mark."""
    suffix = _suffix(path)
    if suffix == ".parquet" or head.startswith(b"PAR1"):
        if isinstance(file.raw, _Inflated):
            raise OSError("parquet cannot be compressed as a whole; decompress it")
        return _parquet_texts(name, path, text_field)
    _refuse_binary(head, path)
    if file.peek(len(BOM)).startswith(BOM):
        file.read(len(BOM))
    if suffix in ROWS or _looks_like_rows(suffix, head, text_field):
        return _json_texts(name, path, file, text_field)
    return None


def _suffix(path: Path) -> str:
    """In lower case, the last suffix that has letters and does not name a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and (suffixes[-1] in COMPRESSION_OF or not re.search("[a-z]", suffixes[-1])):
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _looks_like_rows(suffix: str, head: bytes, text_field: str) -> bool:
    """Whether a file with another name contains JSON: it begins with objects. If it has a suffix,
    one of them must also have the text field."""
    text = head.removeprefix(BOM).decode("utf-8", "replace")
    decoder, at = json.JSONDecoder(), BETWEEN_ROWS.match(text).end()
    try:
        while at < len(text):
            if key := FIELD.match(text, at):
                if suffix == "" or json.loads(key[1]) == text_field:
                    return True
                _, at = decoder.raw_decode(text, key.end())
                at = AFTER_FIELD.match(text, at).end()
            else:  # an object without fields, null, or not JSON
                _, at = decoder.raw_decode(text, at)
                at = BETWEEN_ROWS.match(text, at).end()
    except (ValueError, RecursionError):  # not JSON, or `head` ends inside a value
        pass
    return False


def _refuse_binary(head: bytes, path: Path) -> None:
    what = next((what for magic, what in BINARY.items() if head.startswith(magic)), None)
    if what is None and head[257:262] == b"ustar":
        what = "a tar archive"
    if what is None and b"\0" in head:
        what = "binary (it contains NUL bytes)"
    if what is None and _share_not_text(head) > MAX_NOT_TEXT:
        what = "binary or in another encoding than UTF-8"
    if what:
        raise UserError(
            f"The data file '{path}' is {what}, not UTF-8 text: convert it, or leave it out of "
            "data.source."
        )


def _share_not_text(head: bytes) -> float:
    """The share of characters that are invalid UTF-8 or in CONTROL."""
    text = head.decode("utf-8", "replace")
    invalid = text.count("\ufffd") - head.count("\ufffd".encode())
    control = len(head) - len(head.translate(None, CONTROL))
    return (invalid + control) / max(1, len(text))


# --- Compression -------------------------------------------------------------------------------


class _Inflated(io.RawIOBase):
    """Makes a file of an iterator of bytes. Every read is full, except the last one."""

    def __init__(self, chunks: Iterator[bytes]):
        self.chunks, self.rest = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = 0
        while size < len(buffer):
            self.rest = self.rest or memoryview(next(filter(None, self.chunks), b""))
            if not self.rest:
                break
            part = self.rest[: len(buffer) - size]
            buffer[size : size + len(part)] = part
            self.rest = self.rest[len(part) :]
            size += len(part)
        return size


@contextmanager
def _open_inflated(path: Path) -> Iterator[io.BufferedReader]:
    """The content of a file, which is decompressed as often as it was compressed."""
    with open(path, "rb", buffering=BLOCK_BYTES) as file:
        content = file
        for _ in range(MAX_COMPRESSIONS):
            found = COMPRESSED.match(content.peek(16))
            if not found:
                break
            chunks = _inflate(content, found.lastgroup, path)
            content = io.BufferedReader(_Inflated(chunks), BLOCK_BYTES)
        named = COMPRESSION_OF.get(path.suffix.lower())
        if named and content is file and file.peek(1):
            raise OSError(f"it is not the {named} data that its name promises")
        yield content


def _inflate(file: io.BufferedIOBase, kind: str, path: Path) -> Iterator[bytes]:
    """The content of every member of a compressed file. Zeros may be between the members."""
    new_decoder = _decoder(kind, path)
    decoder = new_decoder()
    while data := file.read(BLOCK_BYTES):
        while data:
            if decoder.eof:
                data = data.lstrip(b"\0")
                decoder = new_decoder() if data else decoder
                continue
            try:
                yield decoder.decompress(data)
            except Exception as error:  # each library has its own errors
                raise OSError(f"its {kind} data is damaged ({_reason(error)})") from error
            data = decoder.unused_data if decoder.eof else b""
    if not decoder.eof:
        raise EOFError(f"its {kind} data ends too early")


def _decoder(kind: str, path: Path) -> Callable[[], Any]:
    if kind == "zstd":
        return _zstd_decoder(path)
    return {
        "gzip": lambda: zlib.decompressobj(wbits=31),  # 31: a gzip header and checksum
        "bzip2": bz2.BZ2Decompressor,
        "xz": lzma.LZMADecompressor,
    }[kind]


def _zstd_decoder(path: Path) -> Callable[[], Any]:
    try:
        from compression.zstd import ZstdDecompressor  # Python 3.14
    except ImportError:
        try:
            import zstandard
        except ImportError as error:
            raise UserError(
                f"Reading the data file '{path}' needs zstandard: run 'pip install zstandard'."
            ) from error
        return lambda: zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
    return ZstdDecompressor


# --- Text --------------------------------------------------------------------------------------


def pieces(file: io.BufferedIOBase, size: int) -> Iterator[bytes]:
    """Pieces that end at the first line end after `size` bytes.

    If there is none before 2 * size, a piece ends there, between two characters.
    """
    rest = b""
    while rest := rest + file.read(2 * size + 1 - len(rest)):
        end = _piece_end(rest, size)
        yield rest[:end]
        rest = rest[end:]


def _piece_end(text: bytes, size: int) -> int:
    # A \r before a \n is not a line end, so the \r must have a byte after it.
    for line_end, stop in ((b"\n", 2 * size + 1), (b"\r", 2 * size)):
        at = text.find(line_end, size, stop)
        if at >= 0:
            return at + 1
    if len(text) <= 2 * size:
        return len(text)
    at = 2 * size
    while at > 2 * size - 3 and text[at] & 0xC0 == 0x80:  # not the first byte of a character
        at -= 1
    return at


# --- Rows --------------------------------------------------------------------------------------


def text_of(record: Any, text_field: str, where: str) -> str | bytes | UserError:
    """The text of a row, or an error that says what the row has instead."""
    if not isinstance(record, dict):
        found = f"is {_kind(record)}, not an object with the field {text_field!r} (data.text_field)"
    elif text_field not in record:
        names = [repr(str(name)) for name in itertools.islice(record, 20)]
        found = (
            f"has no field {text_field!r} (data.text_field); its fields are "
            f"{', '.join(names) or 'none'}{' ...' if len(record) > 20 else ''}"
        )
    elif isinstance(record[text_field], str):
        return record[text_field]
    else:
        found = f"has {_kind(record[text_field])} in the field {text_field!r} (data.text_field)"
    return UserError(f"{where} {found}. Use data.bad_rows='skip' to leave out rows without text.")


def _kind(value: Any) -> str:
    kinds = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        bytes: "bytes",
        list: "a list",
        dict: "an object",
    }
    return kinds.get(type(value), f"a value of the type {type(value).__name__}")


def _json_texts(name: str, path: Path, file: io.BufferedReader, text_field: str) -> Iterator[Raw]:
    for number, word, record in _json_rows(file, path):
        where = f"{word} {number} of the data file '{path}'"
        yield f"{name}:{number}", text_of(record, text_field, where)


def _json_rows(file: io.BufferedReader, path: Path) -> Iterator[tuple[int, str, Any]]:
    """(number, "Line" or "Row", row) for each row of a JSON file.

    If the first line that is not blank is a complete value and not a list, each line is a row.
    Otherwise the file is read as a whole, as a series of values. Each value is a row, and each
    element of a list is a row.
    """
    first = True
    for number, line in enumerate(file, 1):
        line = line.removeprefix(BOM)  # someone has joined files with byte-order marks
        if not line.strip():
            continue
        try:
            record = json.loads(_decoded(line))
        except (ValueError, RecursionError) as error:
            if not first:
                raise UserError(
                    f"Line {number} of the data file '{path}' is not valid JSON: {_reason(error)}."
                ) from error
            record = []
        if first and isinstance(record, list):
            for count, value in enumerate(_json_values(line + file.read(), path), 1):
                yield count, "Row", value
            return
        first = False
        yield number, "Line", record


def _json_values(content: bytes, path: Path) -> Iterator[Any]:
    space = re.compile("[\\s\ufeff]*")
    try:
        text = _decoded(content)
        at = space.match(text).end()
        while at < len(text):
            value, at = json.JSONDecoder().raw_decode(text, at)
            yield from value if isinstance(value, list) else [value]
            at = space.match(text, at).end()
    except (ValueError, RecursionError) as error:
        raise UserError(f"The data file '{path}' is not valid JSON: {_reason(error)}.") from error


def _decoded(content: bytes) -> str:
    # Invalid UTF-8 becomes lone surrogates, which Corpus repairs and counts.
    return content.decode("utf-8", "surrogateescape")


def _parquet_texts(name: str, path: Path, text_field: str) -> Iterator[Raw]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(
            f"Reading the data file '{path}' needs pyarrow: run 'pip install pyarrow'."
        ) from error
    try:
        with pq.ParquetFile(path, **PARQUET) as file:
            for number, record in enumerate(parquet_rows(file, text_field), 1):
                where = f"Row {number} of the data file '{path}'"
                yield f"{name}:{number}", text_of(record, text_field, where)
    except pa.ArrowException as error:
        reason = _reason(error)
        raise UserError(f"The data file '{path}' is not valid parquet: {reason}.") from error


def parquet_rows(file: Any, text_field: str) -> Iterator[dict[str, Any]]:
    """The rows of a pyarrow.parquet.ParquetFile, with this field only. If it has no such field: its
    rows with all fields and no values."""
    fields = file.schema_arrow.names
    if text_field not in fields:
        yield from itertools.repeat(dict.fromkeys(fields), file.metadata.num_rows)
        return
    for batch in file.iter_batches(BATCH_ROWS, columns=[text_field]):
        # A field `text` of a struct `meta` is the column "meta.text" too, so there may be two.
        (index, *_) = batch.schema.get_all_field_indices(text_field)
        for value in _column_values(batch.column(index)):
            yield {text_field: value}


def _column_values(column: Any) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:  # another program has written invalid UTF-8
        texts = column.cast("large_string").cast("large_binary").to_pylist()
        return [text and text.decode("utf-8", "surrogateescape") for text in texts]
