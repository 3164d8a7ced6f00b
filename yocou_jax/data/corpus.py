"""Documents: the text of a source, in which order, and which documents are held out.

`sources.open_corpus` makes a corpus of the name of a source. `split_corpus` divides it, and says
what happens if there are too few documents.
"""

import contextlib
import hashlib
import io
import itertools
import json
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np

from yocou_jax.data.formats import PIECE_BYTES, pieces
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
from yocou_jax.errors import UserError
from yocou_jax.progress import progress, teller, with_progress

# `split_corpus` cuts documents into pieces if a split of whole documents is not good enough.
PIECE_SIZES = (PIECE_BYTES, 4096, 1024, 256, 64, 16)  # bytes; the first one that is good enough
MAX_EXCESS = 1 / 8  # a good split holds out at most this share of the text more than was asked
SAMPLED = 32  # shards that a sample is from: to open one may take time
ENOUGH = 0.9  # a good split gives both sides this share of the bytes that they can get


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

    known: a folder that stores the summary, and the digests of each shard, of files or of one
    commit of a Hugging Face data set. The next time, if all files have the same paths, sizes and
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
        whole, first = self._same_digests()
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

    def sample(self, size: float, threshold: float) -> Iterator[Document]:
        """About `size` bytes of the documents whose names have a hash of `threshold` or more (those
        that `split_corpus` does not hold out); at least one of them, if there is any.

        They are the beginnings of SAMPLED shards, evenly spaced, or of more if these have less; one
        document too many at most. Without shards all is read, and another hash of the name chooses
        about this share of the text, and of it only what is not held out."""
        ends = self.shard_ends
        if ends is None:
            yield from self._sample_of_all(size / self.summary.bytes, threshold)
            return
        whole, first = self._same_digests()
        wanted = (whole.hashes >= threshold)[first]
        sums = np.append(0, np.cumsum(np.where(wanted, whole.sizes[first], 0)))
        spans = [(i, j) for i, j in itertools.pairwise([0, *ends]) if sums[i] < sums[j]]
        count = min(SAMPLED, len(spans))
        while True:
            chosen = [spans[number * len(spans) // count] for number in range(count)]
            total = sum(sums[end] - sums[begin] for begin, end in chosen)
            if total >= size or count == len(spans):
                break
            count = min(math.ceil(1.25 * count), len(spans))
        left = 0.0  # what a shard gives too much, the next ones give less
        for begin, end in chosen:
            left += size * (sums[end] - sums[begin]) / total
            # In this order: the end of `wanted` ends it before the next shard is opened.
            documents = zip(wanted[begin:end], self._documents_from(begin), strict=False)
            while left > 0 and (found := next(documents, None)) is not None:
                is_wanted, document = found
                if is_wanted:
                    yield document
                    left -= text_bytes(document)

    @property
    def sample_key(self) -> str:
        """What a sample depends on besides the documents and the arguments: the shards."""
        ends = self.shard_ends
        return "" if ends is None else f" {SAMPLED} of {ends}"

    def _sample_of_all(self, share: float, threshold: float) -> Iterator[Document]:
        spare, chosen = None, False
        for document in self.documents():
            if is_held_out(document.name, threshold):
                continue
            spare = spare or document
            if hash_fraction(document.name, "bpe") < share:
                chosen = True
                yield document
        if spare and not chosen:
            yield spare

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

    def _same_digests(self) -> tuple[Digests, np.ndarray]:
        """Digests of all documents, and which of them are no copies. Raises UserError if they are
        not those of the summary, which may have been remembered."""
        if self._fingerprint != self.summary.fingerprint:
            raise self._changed()
        return self._digests[:2]

    @property
    def shard_ends(self) -> list[int] | None:
        """How many documents there are up to the end of each shard. None: no shard can be read
        alone."""
        return self._pass[3].tolist() if self._in_shards else None

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
        shard_ends = self.shard_ends

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
    def _pass(self) -> tuple[CorpusSummary, np.ndarray, np.ndarray, np.ndarray]:
        """The summary; for each document, sorted by hash: the hash of its name; its bytes; and how
        many documents there are up to the end of each shard (none if it cannot be read alone)."""
        path = self._memory
        if path is None:
            return self._read_all()
        if not self.verify:
            with contextlib.suppress(OSError, *DAMAGED), np.load(path) as found:
                summary = CorpusSummary(**json.loads(str(found["summary"])))
                hashes, sizes, ends = found["hashes"], found["sizes"], found["ends"]
                shards = len(self.shards) if self._in_shards else 0
                if hashes.shape == sizes.shape == (summary.documents,) and len(ends) == shards:
                    return summary, hashes, sizes, ends
        summary, hashes, sizes, ends = self._read_all()
        text = json.dumps(summary._asdict())
        store(path, summary=text, hashes=hashes, sizes=sizes, ends=ends)
        return summary, hashes, sizes, ends

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

    def _read_all(self) -> tuple[CorpusSummary, np.ndarray, np.ndarray, np.ndarray]:
        ends = np.zeros(0, np.int64)
        if self._in_shards:
            whole, first, numbers = self._digests
            ends = np.append(0, np.cumsum(first))[np.cumsum(numbers)]
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
        return summary, hashes[order], sizes[order], ends

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
        return self._pass[1:3]


@cache
def _code() -> str:
    """A hash of the code that reads files. What it remembers is not for another version of it."""
    digest = sha256()
    for module in ("corpus", "formats", "hub", "shards", "sources"):
        digest.update(Path(__file__).with_name(f"{module}.py").read_bytes())
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
