"""Documents: where text comes from, in which order, and which of it is held out.

A source is one of

    python                the running interpreter's standard library, read in place, no network
    site_packages         every .py file of the installed packages
    path or glob          text(.gz), .jsonl(.gz) or .parquet files; `**` crosses directories
    hf:org/name[/config]  the train split of a Hugging Face data set (needs `datasets`)
    w*source + w*source   a mixture; w is the share of training sequences and the shares sum to 1

Several text files are one document each. A single text file is cut at line ends into pieces of
about 16 KiB, because the held-out split needs more than one document.
"""

import glob
import gzip
import hashlib
import json
import os
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from yocou_jax.errors import UserError

PIECE_BYTES = 16 * 1024
# Tests of the standard library hold invalid encodings on purpose; lib2to3 reads Python 2.
STDLIB_SKIPPED = {"test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages"}


class Document(NamedTuple):
    """One text with a name that does not depend on the machine: the split hashes the name."""

    name: str
    text: str


class CorpusSummary(NamedTuple):
    """What one pass over a corpus read. `fingerprint` changes with any name or byte."""

    fingerprint: str  # sha256, 64 hexadecimal digits
    documents: int
    bytes: int  # UTF-8, after the repair of invalid bytes
    invalid: int  # documents with invalid UTF-8; the bad bytes became U+FFFD
    duplicates: int  # documents left out because an earlier one has the same text


@dataclass(frozen=True)
class Corpus:
    """The documents of one source, in an order that is the same on every machine.

    Empty documents and exact copies of earlier ones are left out, so that no held-out text is
    seen in training under another name.
    """

    source: str
    read: Callable[[], Iterator[tuple[str, bytes | str]]]

    def _unique(self, counts: dict[str, int]) -> Iterator[tuple[Document, bytes]]:
        seen: set[bytes] = set()
        for name, raw in self.read():
            # JSON can spell lone surrogates, which UTF-8 cannot: both kinds go one way.
            raw = raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else raw
            digest = hashlib.sha256(raw).digest()
            if not raw or digest in seen:
                counts["duplicates"] += bool(raw)
                continue
            seen.add(digest)
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError:
                text = raw.decode("utf-8", "replace")
                counts["invalid"] += 1
            yield Document(name, text), digest

    def documents(self) -> Iterator[Document]:
        """Every document once, in order; reads the source again on each call."""
        return (document for document, _ in self._unique({"duplicates": 0, "invalid": 0}))

    @cached_property
    def summary(self) -> CorpusSummary:
        """One full pass over the source. Raises UserError when there is no text in it."""
        counts, documents, size, total = {"duplicates": 0, "invalid": 0}, 0, 0, hashlib.sha256()
        for document, digest in self._unique(counts):
            total.update(hashlib.sha256(document.name.encode("utf-8", "replace")).digest() + digest)
            documents += 1
            size += len(document.text.encode())
        if not documents:
            raise UserError(f"The data source {self.source!r} contains no text.")
        return CorpusSummary(total.hexdigest(), documents, size, **counts)


def hash_fraction(name: str, salt: str = "") -> float:
    """A number in [0, 1) that depends on the name alone."""
    digest = hashlib.sha256(f"{salt}{name}".encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def is_held_out(name: str, validation_fraction: float) -> bool:
    """True for about `validation_fraction` of the names, on every machine the same ones."""
    return hash_fraction(name) < validation_fraction


def parse_source(source: str) -> list[tuple[float, str]]:
    """Split a source string into (share of training sequences, source without weights).

    >>> parse_source("0.7*python + 0.3*books/*.txt")
    [(0.7, 'python'), (0.3, 'books/*.txt')]

    Raises UserError when a term has no weight, a weight is not a positive number, or the weights
    do not sum to 1.
    """
    terms = re.split(r"\s+\+\s+", source.strip())
    if len(terms) == 1:
        return [(1.0, terms[0])]
    mixture = []
    for term in terms:
        match = re.fullmatch(r"([-+.\deE]+)\s*\*\s*(.+)", term)
        try:
            weight = float(match[1]) if match else 0.0
        except ValueError:
            weight = 0.0
        if weight <= 0:
            raise UserError(
                f"The term {term!r} of the data mixture {source!r} needs a positive weight in "
                "front, as in '0.7*python + 0.3*books/*.txt'."
            )
        mixture.append((weight, match[2].strip()))
    total = sum(weight for weight, _ in mixture)
    if abs(total - 1) > 1e-3:
        raise UserError(
            f"The weights of the data mixture {source!r} are shares of the training sequences and "
            f"must sum to 1; they sum to {total:g}."
        )
    return [(weight / total, name) for weight, name in mixture]


def open_corpus(source: str, text_field: str = "text") -> Corpus:
    """The corpus of one source without weights. Raises UserError when the source is unknown."""
    if source == "python":
        root = Path(sysconfig.get_paths()["stdlib"])
        return _files_corpus(source, _python_files(root, STDLIB_SKIPPED), root, text_field)
    if source == "site_packages":
        root = Path(sysconfig.get_paths()["purelib"])
        return _files_corpus(source, _python_files(root, set()), root, text_field)
    if source.startswith("hf:"):
        return Corpus(source, lambda: _read_hugging_face(source, text_field))
    pattern = os.path.expanduser(source)
    if os.path.isdir(pattern):
        raise UserError(
            f"The data source {source!r} is a directory; name its files with a glob such as "
            f"'{source.rstrip('/')}/**/*.txt'."
        )
    if os.path.isfile(pattern):  # before the glob: a file name may hold [ or *
        return _files_corpus(source, [Path(pattern)], Path(pattern).parent, text_field)
    paths = [Path(p) for p in glob.glob(pattern, recursive=True) if os.path.isfile(p)]
    if paths:
        root = Path(os.path.commonpath([p.parent for p in paths]))
        return _files_corpus(source, paths, root, text_field)
    if glob.has_magic(source):
        raise UserError(f"No file matches the data source {source!r}.")
    raise UserError(
        f"The data source {source!r} is not a file that exists, nor one of 'python', "
        "'site_packages', 'hf:org/name', a glob, or a mixture such as '0.7*python + 0.3*a.txt'."
    )


def _python_files(root: Path, skipped: set[str]) -> list[Path]:
    return [p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts[:-1])]


def _files_corpus(source: str, paths: list[Path], root: Path, text_field: str) -> Corpus:
    names = sorted((path.relative_to(root).as_posix(), path) for path in paths)

    def read() -> Iterator[tuple[str, bytes | str]]:
        for name, path in names:
            try:
                if name.endswith(".parquet"):
                    yield from _read_parquet(name, path, text_field)
                elif name.endswith((".jsonl", ".jsonl.gz")):
                    yield from _read_jsonl(name, path, text_field)
                elif len(names) == 1:
                    yield from _read_pieces(name, path)
                else:
                    with _open(path) as file:
                        yield name, file.read()
            except (OSError, EOFError, zlib.error) as error:  # the last two: a damaged .gz
                raise UserError(f"The data file '{path}' could not be read: {error}.") from error

    return Corpus(source, read)


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


def _read_pieces(name: str, path: Path) -> Iterator[tuple[str, bytes]]:
    """Pieces of whole lines, at least PIECE_BYTES long but for the last."""
    with _open(path) as file:
        for number, lines in enumerate(iter(lambda: file.readlines(PIECE_BYTES), [])):
            yield f"{name}#{number}", b"".join(lines)


def _text(value: Any, text_field: str, fields: Iterable[str], where: str) -> str:
    if not isinstance(value, str):
        raise UserError(
            f"{where} has no text in the field {text_field!r} (data.text_field); its fields are "
            f"{', '.join(map(repr, fields)) or 'none'}."
        )
    return value


def _read_jsonl(name: str, path: Path, text_field: str) -> Iterator[tuple[str, str]]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"Line {number} of the data file '{path}'"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{where} is not valid JSON: {error}.") from error
            record = record if isinstance(record, dict) else {}
            yield f"{name}:{number}", _text(record.get(text_field), text_field, record, where)


def _read_parquet(name: str, path: Path, text_field: str) -> Iterator[tuple[str, str]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(
            f"Reading the data file '{path}' needs pyarrow: run 'pip install pyarrow'."
        ) from error
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            fields = file.schema_arrow.names
            if text_field not in fields:
                _text(None, text_field, fields, f"The data file '{path}'")
            for batch in file.iter_batches(columns=[text_field]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    where = f"Row {number} of the data file '{path}'"
                    yield f"{name}:{number}", _text(value, text_field, fields, where)
    except pa.ArrowInvalid as error:
        raise UserError(f"The data file '{path}' is not valid parquet: {error}.") from error


def _read_hugging_face(source: str, text_field: str) -> Iterator[tuple[str, str]]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"The data source {source!r} needs the package datasets: run 'pip install datasets'."
        ) from error
    parts = source.removeprefix("hf:").split("/", 2)
    name, config = "/".join(parts[:2]), parts[2] if len(parts) == 3 else None
    try:
        rows = datasets.load_dataset(name, config, split="train")
    except Exception as error:  # the hub's errors share no base class
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"The Hugging Face data set {name!r} (config {config!r}, split 'train') could not be "
            f"loaded: {reason}. Check the name and the network."
        ) from error
    for number, record in enumerate(rows):
        where = f"Row {number + 1} of the data set {name!r}"
        yield f"{name}:{number + 1}", _text(record.get(text_field), text_field, record, where)
