"""Documents: where text comes from, in which order, and which documents are held out.

A source is one of

    python                the standard library of the running Python (no network)
    site_packages         every .py file of the installed packages
    path or glob          files of text, JSON or parquet, also compressed; `**` matches directories
    hf:org/name[/config]  the train split of a Hugging Face data set (needs `datasets`)
    hops(...) needle(...) tasks that a program writes (synthetic.py)
    w*source + w*source   a mixture; w is a share of the training sequences, and the sum is 1

Each text file is a document, and so is each row of JSON or parquet. A single text file is cut at
line ends into pieces of about 16 KiB, because the held-out split needs more than one document.
`split_corpus` says what happens if there are still too few documents.
"""

import contextlib
import glob
import hashlib
import io
import itertools
import json
import os
import re
import sysconfig
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from yocou_jax.data import formats, shards
from yocou_jax.data.formats import PIECE_BYTES, Raw, pieces, read_file, text_of
from yocou_jax.data.shards import (
    DAMAGED,
    Digests,
    Document,
    Shard,
    all_digests,
    found_in,
    hash_document,
    hash_fraction,
    joined,
    key_of,
    store,
    text_bytes,
)
from yocou_jax.data.synthetic import Hops, Needle, parse_task
from yocou_jax.errors import UserError
from yocou_jax.files import expand_path
from yocou_jax.progress import progress, teller, with_progress

# `split_corpus` cuts documents into pieces if a split of whole documents is not good enough.
PIECE_SIZES = (PIECE_BYTES, 4096, 1024, 256, 64, 16)  # bytes; the first one that is good enough
MAX_EXCESS = 1 / 8  # a good split holds out at most this share of the text more than was asked
ENOUGH = 0.9  # a good split gives both sides this share of the bytes that they can get
# Tests of the standard library contain invalid encodings on purpose; lib2to3 has Python 2. Most of
# encodings are generated tables, nearly copies of each other, and pydoc_data is one long text that
# is no code: a held-out table is known from training, and either can be most of a small split.
STDLIB_SKIPPED = {
    *("test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages"),
    *("encodings", "pydoc_data"),
}

YOUNG = 2.0  # seconds
SHARD_BYTES = 64 * 1024**2  # of files as they are stored, perhaps compressed
SHARD_ROWS = 100_000  # of a Hugging Face data set

WEIGHT = r"[-+]?(?:\d[\d.,_]*|\.\d[\d.]*|inf|infinity|nan)(?:e[-+]?\d+)?%?"
WEIGHTED = re.compile(rf"{WEIGHT}\s*\*", re.IGNORECASE)
SEPARATOR = re.compile(rf"\s+\+\s+|\s*\+\s*(?={WEIGHT}\s*\*)", re.IGNORECASE)
QUOTED = re.compile(r"""(^|\*\s*)((["']).*?\3)(?=\s*(?:\+|$))""", re.DOTALL)


class Piece(NamedTuple):
    """Some documents of a corpus. digest: a hash of them. mine: whether this process shall use it.
    documents: reads them; call it at most once, and in the order of the pieces."""

    digest: str
    mine: bool
    documents: Callable[[], list[Document]]


class CorpusSummary(NamedTuple):
    """What a pass over a corpus has read. `fingerprint` changes with any name or character."""

    fingerprint: str  # sha256, 64 hexadecimal digits
    documents: int
    bytes: int  # UTF-8, after the repair of invalid bytes
    invalid: int  # documents with invalid UTF-8; U+FFFD replaces the bad bytes
    duplicates: int  # documents left out because an earlier one has the same text
    skipped: int  # rows without text left out (data.bad_rows='skip')


@dataclass(frozen=True)
class Corpus:
    """The documents of one source, in an order that is the same on every machine.

    Empty documents and exact copies of earlier documents are left out, so that training sees no
    held-out text under another name.

    shards: the source in parts (shards.py). share: (index, count) of the processes of a run, which
    begin with different shards.

    known: a folder that stores the summary, and the digests of each shard, of files or of a Hugging
    Face data set with a fingerprint. The next time, if all files have the same paths, sizes and
    times, they are not read to know the summary. With verify they are, by every process, and what
    was stored is replaced.
    """

    source: str
    shards: tuple[Shard, ...]
    bad_rows: str = "refuse"  # or "skip"
    piece_bytes: int | None = None  # size of the pieces of a document; None: documents stay whole
    known: Path | None = None
    verify: bool = False
    share: tuple[int, int] = (0, 1)

    def documents(self) -> Iterator[Document]:
        """Every document once, in order. Each call reads the source again.

        Raises UserError at the end if these are other documents than `summary` has read.
        """
        total = hashlib.sha256()
        for document in self._documents(Counter()):
            hash_document(total, document)
            yield document
        if "_pass" in vars(self) and total.hexdigest() != self.summary.fingerprint:
            raise self._changed()

    def _changed(self) -> UserError:
        # What is remembered may be wrong, and the next start must not trust it.
        sizes = {None, self.piece_bytes, *PIECE_SIZES}
        memories = [replace(self, piece_bytes=size)._memory for size in sizes]
        for path in filter(None, (*memories, *map(self._digest_file, self.shards))):
            with contextlib.suppress(OSError):
                path.unlink()
        return UserError(
            f"The data source {self.source!r} has changed while it was read; start again when it "
            "is complete."
        )

    def _documents(self, counts: Counter[str]) -> Iterator[Document]:
        whole = self._unique(counts)
        return whole if self.piece_bytes is None else _in_pieces(whole, self.piece_bytes)

    def _unique(self, counts: Counter[str]) -> Iterator[Document]:
        seen: set[bytes] = set()
        raws = itertools.chain.from_iterable(shard.read() for shard in self.shards)
        for found in found_in(raws, self.bad_rows):
            if found is None:
                counts["skipped"] += 1
                continue
            # A hash of the repaired text: two documents may differ only in their invalid bytes.
            digest = hashlib.sha256(found.document.text.encode()).digest()
            if digest in seen:
                counts["duplicates"] += 1
                continue
            seen.add(digest)
            counts["invalid"] += found.repaired
            yield found.document

    def pieces(self, limit: int, share: tuple[int, int]) -> Iterator[Piece]:
        """All documents, in pieces of about `limit` bytes. share: (index, count) of the processes
        that make something of them. If the source has several shards and documents are whole, a
        shard is read only when the documents of a piece in it are asked for.

        Raises UserError if documents are not those that `summary` has read.
        """
        what, (index, count) = f"Tokenizing {self.source}", share
        if not self._in_shards:
            documents = with_progress(self.documents(), what, text_bytes, self.summary.bytes)
            for number, piece in enumerate(chunks(documents, limit)):
                digest = hashlib.sha256()
                for document in piece:
                    hash_document(digest, document)
                yield Piece(digest.hexdigest(), number % count == index, lambda piece=piece: piece)
            return
        whole, first, _ = self._digests
        if self._fingerprint != self.summary.fingerprint:  # the summary was remembered
            raise self._changed()
        places = np.flatnonzero(first)  # among the documents with copies
        ends = np.cumsum(whole.sizes[places])
        begins = [0]
        while begins[-1] < len(ends):
            done = ends[begins[-1] - 1] if begins[-1] else 0
            begins.append(min(len(ends), int(np.searchsorted(ends, done + limit)) + 1))
        spans = list(itertools.pairwise(begins))
        mine = range(*(len(spans) * (index + i) // count for i in (0, 1)))
        sizes = [int(whole.sizes[places[begin:end]].sum()) for begin, end in spans]
        add, read = teller(what, sum(sizes[number] for number in mine)), self._reader()
        for number, (begin, end) in enumerate(spans):
            digest = hashlib.sha256(whole.keys[places[begin:end]].tobytes()).hexdigest()
            yield Piece(digest, number in mine, partial(read, begin, end))
            if number in mine:
                add(sizes[number])

    @property
    def _in_shards(self) -> bool:
        """Whether shards can be read alone. Pieces of documents need all documents before them."""
        return len(self.shards) > 1 and self.piece_bytes is None

    @cached_property
    def _digests(self) -> tuple[Digests, np.ndarray, list[int]]:
        """Digests of all documents; which of them are no copies; the documents of each shard."""
        parts = all_digests(
            self.shards,
            self.bad_rows,
            path_of=self._digest_file,
            share=self.share,
            trust=not self.verify,
            add=teller(f"Reading {self.source}"),
        )
        with progress(f"Comparing the documents of {self.source}"):
            return *joined(parts), [len(part.sizes) for part in parts]

    @cached_property
    def _fingerprint(self) -> str:
        """That of the documents of `_digests`."""
        whole, first, _ = self._digests
        return hashlib.sha256(whole.keys[first].tobytes()).hexdigest()

    def _documents_from(self, start: int) -> Iterator[Document]:
        """The documents from number `start` on. Earlier shards are not read."""
        whole, first, counts = self._digests
        end = 0  # of the shards so far, in documents with copies
        number = 0  # of the next document that is no copy
        for shard, count in zip(self.shards, counts, strict=True):
            begin, end = end, end + count
            kept = int(first[begin:end].sum())
            if number + kept <= start:
                number += kept
                continue
            at = begin
            for found in filter(None, found_in(shard.read(), self.bad_rows)):
                if at == end or key_of(found.document) != whole.keys[at].tobytes():
                    raise self._changed()
                if first[at]:
                    if number >= start:
                        yield found.document
                    number += 1
                at += 1
            if at != end:
                raise self._changed()

    def _reader(self) -> Callable[[int, int], list[Document]]:
        """A function that reads the documents begin .. end - 1. `begin` must not be less than the
        `end` before."""
        _, first, counts = self._digests
        shard_ends = np.append(0, np.cumsum(first))[np.cumsum(counts)]  # without copies

        def shard_of(number: int) -> int:
            return int(np.searchsorted(shard_ends, number, side="right"))

        stream, at = self._documents_from(0), 0

        def read(begin: int, end: int) -> list[Document]:
            nonlocal stream, at
            if shard_of(begin) > shard_of(at):
                stream, at = self._documents_from(begin), begin
            found = list(itertools.islice(stream, begin - at, end - at))
            at = end
            if end == shard_ends[-1]:  # nothing may follow
                found += stream
            return found

        return read

    @cached_property
    def _pass(self) -> tuple[CorpusSummary, np.ndarray, np.ndarray]:
        """The summary; and for each document, sorted by hash: the hash of its name; its bytes."""
        path = self._memory
        if path is None:
            return self._read_all()
        if not self.verify:
            with contextlib.suppress(OSError, *DAMAGED), np.load(path) as found:
                summary = CorpusSummary(**json.loads(str(found["summary"])))
                hashes, sizes = found["hashes"], found["sizes"]
                if hashes.shape == sizes.shape == (summary.documents,):
                    return summary, hashes, sizes
        summary, hashes, sizes = self._read_all()
        store(path, summary=json.dumps(summary._asdict()), hashes=hashes, sizes=sizes)
        return summary, hashes, sizes

    @property
    def _memory(self) -> Path | None:
        """The file that remembers what was read."""
        stamps = [shard.stamp for shard in self.shards]
        if None in stamps or self.known is None:
            return None
        key = sha256(f"{stamps} {self.bad_rows} {self.piece_bytes} {_code()}".encode())
        return self.known / f"corpus-{key.hexdigest()[:16]}.npz"

    def _digest_file(self, shard: Shard) -> Path | None:
        if shard.stamp is None or self.known is None:
            return None
        key = sha256(f"{shard.stamp} {self.bad_rows} {_code()}".encode())
        return self.known / f"shard-{key.hexdigest()[:16]}.npz"

    def _read_all(self) -> tuple[CorpusSummary, np.ndarray, np.ndarray]:
        if self._in_shards:
            whole, first, _ = self._digests
            fingerprint = self._fingerprint
            hashes, sizes = whole.hashes[first], whole.sizes[first]
            counts = {
                "invalid": int(whole.invalid[first].sum()),
                "duplicates": int((~first).sum()),
                "skipped": int(whole.skipped),
            }
        else:
            fingerprint, hashes, sizes, counts = self._read_in_order()
        if not len(hashes):
            left_out = f"; {counts['skipped']} rows had none and were left out"
            raise UserError(
                f"The data source {self.source!r} contains no text"
                f"{left_out if counts['skipped'] else ''}."
            )
        summary = CorpusSummary(fingerprint, len(hashes), int(sizes.sum()), **counts)
        order = np.argsort(hashes, kind="stable")
        return summary, hashes[order], sizes[order]

    def _read_in_order(self) -> tuple[str, np.ndarray, np.ndarray, Counter[str]]:
        counts, total = Counter(duplicates=0, invalid=0, skipped=0), hashlib.sha256()
        hashes, sizes = array("d"), array("q")
        documents = self._documents(counts)
        for document in with_progress(documents, f"Reading {self.source}", text_bytes):
            hash_document(total, document)
            hashes.append(hash_fraction(document.name))
            sizes.append(text_bytes(document))
        return total.hexdigest(), np.array(hashes), np.array(sizes), counts

    @property
    def summary(self) -> CorpusSummary:
        """Read from `known`, or else by one pass over the source. Raises UserError if it contains
        no text."""
        return self._pass[0]

    @property
    def sizes_by_hash(self) -> tuple[np.ndarray, np.ndarray]:
        """Hashes of the names [documents], ascending, and the sizes of these documents in bytes."""
        return self._pass[1:]


@cache
def _code() -> str:
    """A hash of the code that reads files. What it remembers is not for another version of it."""
    digest = sha256()
    for module in (__file__, formats.__file__, shards.__file__):
        digest.update(Path(module).read_bytes())
    return digest.hexdigest()


def chunks(documents: Iterable[Document], limit: int) -> Iterator[list[Document]]:
    """The documents in lists of about `limit` bytes, or a little more."""
    chunk, size = [], 0
    for document in documents:
        chunk.append(document)
        size += text_bytes(document)
        if size >= limit:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _in_pieces(documents: Iterable[Document], size: int) -> Iterator[Document]:
    """The texts in pieces. A piece that is equal to an earlier one gets its name, so that both are
    held out, or none."""
    names: dict[bytes, str] = {}
    for name, text in documents:
        for number, piece in enumerate(pieces(io.BytesIO(text.encode()), size)):
            digest = hashlib.sha256(piece).digest()
            yield Document(names.setdefault(digest, f"{name}#{number}"), piece.decode())


def is_held_out(name: str, validation_fraction: float) -> bool:
    """True for about `validation_fraction` of the names, the same ones on every machine."""
    return hash_fraction(name) < validation_fraction


class Split(NamedTuple):
    """A corpus, perhaps in pieces. If the hash of a name is below `threshold`, the document
    is held out."""

    corpus: Corpus
    threshold: float


def split_corpus(corpus: Corpus, fraction: float, held_out_bytes: int, train_bytes: int) -> Split:
    """Decides which documents are held out: each one with a name that hashes below a threshold.

    The threshold is `fraction`, and then new documents do not change the split of the old ones. If
    one split then has fewer bytes than it needs (held_out_bytes, train_bytes), the threshold moves
    as far as needed. If the documents are too few or too large for this, all of them are cut into
    pieces that are small enough. If there is not enough text at all, both splits get the same share
    of what they need.

    An example with fraction=0.02, held_out_bytes=4,000 and train_bytes=32,000: 1,000 documents of
    1 kB have about 20 kB below 0.02, so the threshold stays. 100 documents have about 2 kB there:
    the threshold moves to the hash after the fourth document. One document of 90 kB is cut into 6
    pieces of about 16 KiB, and those with the smallest hashes are held out, as many as needed.
    """
    needs = held_out_bytes, train_bytes
    tried = []
    for size in (corpus.piece_bytes, *PIECE_SIZES):
        candidate = corpus if size == corpus.piece_bytes else replace(corpus, piece_bytes=size)
        threshold, met, share = _threshold(candidate, fraction, needs)
        tried.append((met, Split(candidate, threshold)))
        possible = min(1.0, candidate.summary.bytes / sum(needs))
        most = fraction + MAX_EXCESS + held_out_bytes * possible / candidate.summary.bytes
        if met >= ENOUGH * possible and share <= most:
            return tried[-1][1]
    return max(tried, key=lambda found: found[0])[1]


def _threshold(
    corpus: Corpus, fraction: float, needs: tuple[int, int]
) -> tuple[float, float, float]:
    """The threshold that meets the needs best. If several do, the one nearest to `fraction`.

    Returns it, the share of the needs that it meets (at most 1), and the share of bytes held out.
    """
    hashes, sizes = corpus.sizes_by_hash
    held_out = np.concatenate([[0], np.cumsum(sizes)])  # bytes of the first k documents
    met = np.minimum(held_out / needs[0], (held_out[-1] - held_out) / needs[1]).clip(max=1)
    met[1:-1][hashes[1:] == hashes[:-1]] = 0  # documents of one name are held out together
    asked = np.searchsorted(hashes, fraction)
    best = np.flatnonzero(met == met.max())
    count = best[np.abs(best - asked).argmin()]
    threshold = fraction if count == asked else np.append(hashes, 1.0)[count]
    return float(threshold), float(met[count]), float(held_out[count] / held_out[-1])


def parse_source(source: str) -> list[tuple[float, str]]:
    """Split a source string into (share of training sequences, source without weights).

    >>> parse_source("0.7*python + 0.3*books/*.txt")
    [(0.7, 'python'), (0.3, 'books/*.txt')]

    A source that is the name of a file, or a glob that matches a file, is not a mixture. Terms are
    separated by ` + `, or by a `+` that a weight and `*` follow (with or without spaces). The
    source of a term may be in quotes. Then everything between them is part of its name:

    >>> parse_source("0.5*'a + b.txt'+0.5*python")
    [(0.5, 'a + b.txt'), (0.5, 'python')]

    Raises UserError if a term has no weight, if a weight is not a positive number, or if the sum of
    the weights is not 1.
    """
    if _existing_files(source):
        return [(1.0, source)]
    source = source.strip()
    # Quoted parts are masked, so that no separator is found inside them.
    masked = QUOTED.sub(lambda found: found[1] + "_" * len(found[2]), source)
    ends = [found.span() for found in SEPARATOR.finditer(masked)]
    begins = [0, *(end for _, end in ends)]
    terms = [source[a:b] for a, b in zip(begins, [*(a for a, _ in ends), None], strict=True)]
    if len(terms) == 1 and not WEIGHTED.match(masked):
        return [(1.0, _unquoted(source))]
    no_glob = "As one path or glob it matches no file."
    mixture = []
    for term in terms:
        match = re.fullmatch(rf"({WEIGHT})\s*\*\s*(.+)", term, re.DOTALL | re.IGNORECASE)
        weight = _number(match[1]) if match else 0.0
        if not 0 < weight < float("inf"):  # NaN fails this test too
            raise UserError(
                f"The term {term!r} of the data mixture {source!r} needs a positive weight in "
                "front, as in '0.7*python + 0.3*books/*.txt'; write a path with ' + ' in it in "
                f"quotes. {no_glob}"
            )
        mixture.append((weight, _unquoted(match[2].strip())))
    total = sum(weight for weight, _ in mixture)
    if not abs(total - 1) <= 1e-3:
        raise UserError(
            f"The weights of the data mixture {source!r} are shares of the training sequences and "
            f"must sum to 1; they sum to {total:g}. {no_glob}"
        )
    return [(weight / total, name) for weight, name in mixture]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _unquoted(source: str) -> str:
    quoted = re.fullmatch(r"""(["'])(.*)\1""", source, re.DOTALL)
    return quoted[2] if quoted else source


def _existing_files(source: str) -> list[Path]:
    """The files that a path or a glob names. A path is tried first: a name may contain [ or *."""
    pattern = str(expand_path(source))
    try:
        names = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
    except RecursionError:  # the pattern has hundreds of folders
        names = []
    for name in names:
        if os.path.islink(name) and not os.path.exists(name):
            raise UserError(f"The data file '{name}' is a link to a file that does not exist.")
    return [Path(name) for name in names if os.path.isfile(name)]


def open_corpus(
    source: str,
    text_field: str = "text",
    bad_rows: str = "refuse",
    known: Path | None = None,
    verify: bool = False,
    share: tuple[int, int] = (0, 1),
) -> Corpus:
    """The corpus of one source without weights. known, verify, share: see `Corpus`. Raises
    UserError if the source is unknown."""
    memory = {"known": known, "verify": verify, "share": share}
    if source.startswith("hf:"):
        shards = tuple(_hugging_face_shards(source, text_field))
        return Corpus(source, shards, bad_rows, **memory)
    if task := parse_task(source):
        return Corpus(source, (Shard(partial(_read_task, task), None),), bad_rows)
    if source == "python":
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = _python_files(root, STDLIB_SKIPPED)
    elif source == "site_packages":
        root = Path(sysconfig.get_paths()["purelib"])
        paths = _python_files(root, set())
    else:
        paths = _existing_files(source)
        if not paths:
            raise _no_files(source)
        root = Path(os.path.commonpath([path.parent for path in paths]))
    files = sorted((File.of(path, root) for path in paths), key=lambda file: file[:2])
    found = []
    for part in _by_size(files):
        read = partial(_read_files, part, text_field, alone=len(files) == 1)
        found.append(Shard(read, _stamp(root, part, text_field) if known else None))
    return Corpus(source, tuple(found), bad_rows, **memory)


class File(NamedTuple):
    """A file of a source. name: its path from the root of the source. stat: None if it cannot be
    asked; who reads it says what is wrong."""

    name: str
    path: Path
    stat: os.stat_result | None

    @classmethod
    def of(cls, path: Path, root: Path) -> "File":
        stat = None
        with contextlib.suppress(OSError):
            stat = path.stat()
        return cls(path.relative_to(root).as_posix(), path, stat)


def _by_size(files: list[File]) -> Iterator[list[File]]:
    """Consecutive files with SHARD_BYTES in all, or a little more."""
    part, size = [], 0
    for file in files:
        part.append(file)
        size += file.stat.st_size if file.stat else 0
        if size >= SHARD_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def _stamp(root: Path, files: list[File], text_field: str) -> str | None:
    """A hash of the paths, sizes and times of files. The time of the last change (ctime) is that of
    the file system, and no program can set it, as it can the time of modification. None if a file
    cannot be asked, or has changed in the last YOUNG seconds: it may change again, and the clock of
    its file system may be too coarse to show it (git does the same)."""
    digest = sha256(f"{root.resolve()} {text_field}".encode("utf-8", "surrogateescape"))
    for name, _, stat in files:
        if stat is None or time.time() - max(stat.st_mtime, stat.st_ctime) < YOUNG:
            return None
        facts = f"{name} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}\n"
        digest.update(facts.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _no_files(source: str) -> UserError:
    if source and os.path.isdir(expand_path(source)):
        return UserError(
            f"The data source {source!r} is a directory; name its files with a glob such as "
            f"'{source.rstrip('/')}/**/*.txt'."
        )
    if glob.has_magic(source):
        return UserError(f"No file matches the data source {source!r}.")
    return UserError(
        f"The data source {source!r} is not a file that exists, nor one of 'python', "
        "'site_packages', 'hf:org/name', 'hops(p=2)', 'needle(kind=single)', a glob, or a mixture "
        "such as '0.7*python + 0.3*a.txt'."
    )


def _python_files(root: Path, skipped: set[str]) -> list[Path]:
    return [p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts[:-1])]


def _read_files(files: list[File], text_field: str, alone: bool) -> Iterator[Raw]:
    for name, path, _ in files:
        yield from read_file(name, path, text_field, alone)


def _read_task(task: Hops | Needle) -> Iterator[Raw]:
    documents = open_corpus(task.source).documents() if task.source else ()
    yield from task.read(document.text for document in documents)


def _hugging_face_shards(source: str, text_field: str) -> Iterator[Shard]:
    """Shards of SHARD_ROWS rows. Their stamps are from the fingerprint that the package gives to
    the data, which depends on its files."""
    name, rows = _hugging_face(source)
    fingerprint = getattr(rows, "_fingerprint", None)
    for start in range(0, max(len(rows), 1), SHARD_ROWS):
        part = range(start, min(start + SHARD_ROWS, len(rows)))
        facts = f"{source} {fingerprint} {text_field} {part}"
        stamp = sha256(facts.encode()).hexdigest() if fingerprint else None
        yield Shard(partial(_read_rows, name, rows, part, text_field), stamp)


def _read_rows(name: str, rows: Any, part: range, text_field: str) -> Iterator[Raw]:
    records = rows if len(part) == len(rows) else rows.select(part)
    for number, record in enumerate(records, part.start + 1):
        where = f"Row {number} of the data set {name!r}"
        yield f"{name}:{number}", text_of(record, text_field, where)


def _hugging_face(source: str) -> tuple[str, Any]:
    """The name of a data set, and its rows."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"The data source {source!r} needs the package datasets: run 'pip install datasets'."
        ) from error
    parts = source.removeprefix("hf:").split("/", 2)
    name, config = "/".join(parts[:2]), parts[2] if len(parts) == 3 else None
    try:
        return name, datasets.load_dataset(name, config, split="train")
    except Exception as error:  # the errors of the hub have no common base class
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"The Hugging Face data set {name!r} (config {config!r}, split 'train') could not be "
            f"loaded: {reason}. Check the name and the network."
        ) from error
