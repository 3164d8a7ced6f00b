"""Shards of a corpus: files that are read together, while other processes read other shards.

A start must know the name, the hash and the size of each document, before it can decide which are
copies and which are held out. It stores these digests of a shard in a folder. Every process begins
with its share of the shards, and reads none that somebody has stored already. So processes that use
one folder share the work, and send no messages. If one of them dies, or cannot see the folder, that
costs time and nothing else. A start after a kill reads no shard whose digests are stored.
"""

import contextlib
import hashlib
import itertools
import os
import re
import zipfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from yocou_jax.data.formats import Raw
from yocou_jax.errors import UserError
from yocou_jax.files import write_npz

SPELLED_SURROGATE = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # the others represent bytes
# What numpy raises for files that are damaged, besides OSError.
DAMAGED = EOFError, ValueError, KeyError, TypeError, RuntimeError, zipfile.BadZipFile


class Document(NamedTuple):
    """One text and its name. The split hashes the name, so it must not depend on the machine."""

    name: str
    text: str


def text_bytes(document: Document) -> int:
    """Number of UTF-8 bytes of the text."""
    return len(document.text.encode())


def key_of(document: Document) -> bytes:
    """sha256 of the name and of the text, 64 bytes."""
    return _sha256(document.name) + _sha256(document.text)


def hash_document(total: Any, document: Document) -> None:
    """Adds a document to a hash of several."""
    total.update(key_of(document))


def hash_fraction(name: str, salt: str = "") -> float:
    """A number in [0, 1) that depends only on the name and the salt."""
    return int.from_bytes(_sha256(f"{salt}{name}")[:6], "big") / 2**48


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()


class Shard(NamedTuple):
    """read: gives the rows or files of the shard. stamp: decides which they are, if it is known."""

    read: Callable[[], Iterator[Raw]]
    stamp: str | None


class Found(NamedTuple):
    """A document in valid UTF-8. repaired: whether it was invalid; U+FFFD replaces bad bytes."""

    document: Document
    repaired: bool


def found_in(raws: Iterable[Raw], bad_rows: str) -> Iterator[Found | None]:
    """The documents that are not empty. None for a row without text, which `bad_rows`="refuse"
    raises as UserError."""
    for name, raw in raws:
        if isinstance(raw, UserError):
            if bad_rows == "refuse":
                raise raw
            yield None
            continue
        if isinstance(raw, str):  # a row: a lone surrogate is an escape or an invalid byte
            text = SPELLED_SURROGATE.sub("\ufffd", raw)
            text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
            was_invalid = text != raw
        else:
            text = raw.decode("utf-8", "replace")
            was_invalid = text.encode() != raw
        if text:
            yield Found(Document(name, text), was_invalid)


class Digests(NamedTuple):
    """What a start keeps of documents.

    keys: `key_of` each document, uint8 [documents, 64]. hashes: `hash_fraction` of the names,
    float64 [documents]. sizes: of the UTF-8 texts in bytes, int64 [documents]. invalid: whether
    bytes were repaired, bool [documents]. skipped: the rows without text, int64 [].
    """

    keys: np.ndarray
    hashes: np.ndarray
    sizes: np.ndarray
    invalid: np.ndarray
    skipped: np.ndarray

    @property
    def texts(self) -> np.ndarray:
        """One value for each text; equal texts have equal values."""
        return np.ascontiguousarray(self.keys[:, 32:]).view("V32")[:, 0]


def digests_of(documents: Iterable[Found | None], add: Callable[[int], None]) -> Digests:
    """add: is told the bytes of each document."""
    keys, hashes, sizes, invalid = bytearray(), array("d"), array("q"), array("b")
    skipped = 0
    for found in documents:
        if found is None:
            skipped += 1
            continue
        keys += key_of(found.document)
        hashes.append(hash_fraction(found.document.name))
        sizes.append(text_bytes(found.document))
        invalid.append(found.repaired)
        add(sizes[-1])
    return Digests(
        np.frombuffer(keys, np.uint8).reshape(-1, 64),
        np.array(hashes, np.float64),
        np.array(sizes, np.int64),
        np.array(invalid, bool),
        np.array(skipped, np.int64),
    )


def joined(parts: Sequence[Digests]) -> tuple[Digests, np.ndarray]:
    """The digests of all shards; and which documents are no copies of earlier ones [documents]."""
    *arrays, skipped = zip(*parts, strict=True)
    whole = Digests(*(np.concatenate(x) for x in arrays), np.array(sum(skipped)))
    first = np.zeros(len(whole.sizes), bool)
    first[np.unique(whole.texts, return_index=True)[1]] = True
    return whole, first


def in_turn(count: int, index: int, processes: int) -> list[int]:
    """The shards in the order in which a process wants them: its own, and then those of each other
    process in reverse order: it begins with the first one, so the two meet."""
    bounds = [count * p // processes for p in range(processes + 1)]
    shares = [range(*pair) for pair in itertools.pairwise(bounds)]
    others = [shares[(index + hop) % processes] for hop in range(1, processes)]
    return [*shares[index], *(shard for share in others for shard in reversed(share))]


def all_digests(
    shards: Sequence[Shard],
    bad_rows: str,
    path_of: Callable[[Shard], Path | None],
    share: tuple[int, int],
    trust: bool,
    add: Callable[[int], None],
) -> list[Digests]:
    """The digests of every shard, in their order.

    path_of: the file that stores those of a shard (None: it has none). share: (index, count) of the
    processes that read. trust: whether stored files are taken. add: is told the bytes of documents,
    of those in stored files too.

    Raises UserError for a file that cannot be read, or for a row without text with
    `bad_rows`="refuse".
    """
    found: dict[int, Digests] = {}
    for number in in_turn(len(shards), *share):
        path = path_of(shards[number])
        known = _load(path) if trust and path is not None else None
        if known is None:
            documents = found_in(shards[number].read(), bad_rows)
            known = digests_of(documents, add)
            if path is not None:
                store(path, **known._asdict())
        else:
            add(int(known.sizes.sum()))
        found[number] = known
    return [found[number] for number in range(len(shards))]


def _load(path: Path) -> Digests | None:
    with contextlib.suppress(OSError, *DAMAGED), np.load(path) as found:
        known = Digests(**{name: found[name] for name in Digests._fields})
        count = len(known.sizes)
        shapes = [(count, 64), (count,), (count,), (count,), ()]
        if [x.shape for x in known] == shapes:
            os.utime(path)  # in use: see `_remove_stale`
            return known
    return None


def store(path: Path, **arrays: Any) -> None:
    """`write_npz` in a folder that may not exist yet. Does nothing if the disk cannot take it: what
    it has can be read again."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_npz(path, **arrays)
