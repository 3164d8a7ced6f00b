"""The token cache: a directory for each corpus and tokenizer, which is complete or absent.

A large corpus takes hours to tokenize, so the work is stored in pieces. A start after a kill goes
on after the last piece, and processes that share the folder of the cache make different pieces. The
name of a piece has the hash of its documents, so it is used only for these.
"""

import itertools
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from yocou_jax.data.corpus import Document, Split, chunks, is_held_out
from yocou_jax.data.shards import DAMAGED
from yocou_jax.data.tokenizer import Tokenizer, cache_error
from yocou_jax.errors import UserError
from yocou_jax.files import write_npz

FORMAT = 3  # part of the cache key; raise it if the files of the cache change their meaning
SPLITS = ("train", "held_out")
PIECE_BYTES = 64 * 1024**2  # text of a piece: what a kill can lose
ENCODE_BYTES = 4 * 1024**2  # text encoded at once: limits memory, and keeps every core busy
STALE_SECONDS = 7 * 24 * 3600  # what is older and not complete is from a killed process
VISIBLE_SECONDS = 60  # in which a shared file system shows a directory to all hosts


def tokenized(
    split: Split, tokenizer: Tokenizer, cache_dir: Path, allow_lossy: bool
) -> tuple[Path, dict[str, Any]]:
    """The cache directory of a corpus, and its meta.json. Makes the cache if it is absent. In a run
    of several processes, all of them must call this.

    Raises UserError if the cache cannot be written, or if the tokenizer changes a text. If one
    process raises it, all do.
    """
    fingerprint = split.corpus.summary.fingerprint
    key = f"{FORMAT} {fingerprint} {tokenizer.fingerprint} {split.threshold!r} {allow_lossy}"
    directory = cache_dir / f"tokens-{sha256(key.encode()).hexdigest()[:16]}"
    missing = not directory.is_dir()
    if any(_of_all_processes(missing)):
        pieces, paths = directory.with_name(f"{directory.name}.pieces"), []
        with _all_or_none(), _unless_made(directory):
            if missing:
                _prepare(pieces)
        index, count = _share(pieces)
        with _all_or_none(), _unless_made(directory):
            if missing:
                paths = _make_pieces(split, tokenizer, allow_lossy, pieces, index, count)
        with _all_or_none(), _unless_made(directory):
            if index == 0 and not directory.is_dir():
                # Of a process that had the cache already, or that cannot see this folder. Or they
                # are gone, because another run has just made the directory of them.
                if not all(path.exists() for path in paths) and not directory.is_dir():
                    paths = _make_pieces(split, tokenizer, allow_lossy, pieces, 0, 1)
                with _complete_or_absent(directory) as scratch:
                    _join_pieces(paths, split, tokenizer, scratch)
                shutil.rmtree(pieces, ignore_errors=True)
        with _all_or_none():
            _wait_for(directory)
    return directory, json.loads((directory / "meta.json").read_text(encoding="utf-8"))


# --- Several processes ----------------------------------------------------------------------------


def _of_all_processes(value: bool) -> list[bool]:
    if jax.process_count() == 1:
        return [value]
    return np.atleast_1d(multihost_utils.process_allgather(np.array(value))).tolist()


@contextmanager
def _all_or_none() -> Iterator[None]:
    """At the end, processes wait for each other. If one has failed, all raise UserError."""
    error = None
    try:
        yield
    except UserError as found:
        error = found
    failed = _of_all_processes(error is not None)
    if error is not None:
        raise error
    if any(failed):
        raise UserError(
            f"Process {failed.index(True)} could not tokenize its part of the data; it says why."
        )


def _prepare(pieces: Path) -> None:
    """Makes the folder. A file in it shows the other processes that this one sees it."""
    pieces.mkdir(parents=True, exist_ok=True)
    os.utime(pieces)  # in use: it is not stale, although all pieces may exist
    if jax.process_count() > 1:
        (pieces / f"process-{jax.process_index()}-of-{jax.process_count()}").touch()


def _share(pieces: Path) -> tuple[int, int]:
    """(index, count): this process makes its share of the pieces. If the processes do not share the
    folder, each makes all of them. All have called `_prepare`."""
    count, seen = jax.process_count(), 0
    with suppress(OSError):
        seen = len(list(pieces.glob(f"process-*-of-{count}")))
    shared = all(_of_all_processes(seen == count))
    return (jax.process_index(), count) if shared and count > 1 else (0, 1)


def _wait_for(directory: Path) -> None:
    """On a network file system, it may take some time until a host sees what another has made."""
    end = time.monotonic() + VISIBLE_SECONDS
    while not directory.is_dir():
        if time.monotonic() > end:
            raise UserError(f"Another process has made {directory}, but it cannot be seen here.")
        time.sleep(0.1)


@contextmanager
def _unless_made(directory: Path) -> Iterator[None]:
    """Errors of the disk do not matter if another run has made the directory meanwhile."""
    try:
        yield
    except OSError as error:
        if not directory.is_dir():
            raise cache_error(directory.parent, error) from error


# --- Pieces ---------------------------------------------------------------------------------------


def _make_pieces(
    split: Split, tokenizer: Tokenizer, allow_lossy: bool, folder: Path, index: int, count: int
) -> list[Path]:
    """Makes those pieces of process `index` of `count` that do not exist. Returns the paths of
    all."""
    paths = []
    for number, piece in enumerate(split.corpus.pieces(PIECE_BYTES, (index, count))):
        path = folder / f"{number:06}-{piece.digest[:16]}.npz"
        paths.append(path)
        if piece.mine and not path.exists():
            _write_piece(path, piece.documents(), split, tokenizer, allow_lossy)
    return paths


def _write_piece(
    path: Path, documents: list[Document], split: Split, tokenizer: Tokenizer, allow_lossy: bool
) -> None:
    """The tokens of each split, the number of tokens of each of its documents, and their bytes."""
    tokens: dict[str, list[np.ndarray]] = {which: [] for which in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)
    for chunk in chunks(documents, ENCODE_BYTES):
        encoded = tokenizer.encode_batch([document.text for document in chunk])
        for (name, text), ids in zip(chunk, encoded, strict=True):
            size = tokenizer.num_bytes(ids)
            if not allow_lossy and size != len(text.encode()):  # no probe has shown this
                raise UserError(
                    f"The tokenizer does not give back the exact text of the document {name!r} "
                    f"of {split.corpus.source!r}: {len(text.encode())} bytes become {size}. Use "
                    "another tokenizer, or set data.allow_lossy_tokenizer=True."
                )
            which = SPLITS[is_held_out(name, split.threshold)]
            tokens[which].append(np.insert(ids, 0, tokenizer.eot_id).astype(_dtype(tokenizer)))
            sizes[which] += size
    arrays = {}
    for which, parts in tokens.items():
        arrays[which] = np.concatenate(parts) if parts else np.zeros(0, _dtype(tokenizer))
        arrays[f"{which}_tokens"] = np.array([len(ids) for ids in parts], np.int64)
        arrays[f"{which}_bytes"] = np.int64(sizes[which])
    write_npz(path, **arrays)


def _dtype(tokenizer: Tokenizer) -> type:
    return np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32


def _join_pieces(paths: list[Path], split: Split, tokenizer: Tokenizer, out: Path) -> None:
    """Writes the files of the cache."""
    corpus = split.corpus
    meta: dict[str, Any] = {
        "source": corpus.source,
        **corpus.summary._asdict(),
        "tokenizer": tokenizer.fingerprint,
        "dtype": np.dtype(_dtype(tokenizer)).name,
    }
    starts: dict[str, list[np.ndarray]] = {which: [] for which in SPLITS}
    counts = {which: {"documents": 0, "tokens": 0, "bytes": 0} for which in SPLITS}
    with open(out / "train.bin", "wb") as train, open(out / "held_out.bin", "wb") as held_out:
        files = dict(zip(SPLITS, (train, held_out), strict=True))
        for path in paths:
            for which, (tokens, lengths, size) in _read_piece(path).items():
                found = counts[which]
                starts[which].append(found["tokens"] + np.cumsum(lengths) - lengths)
                files[which].write(tokens.tobytes())
                found["documents"] += len(lengths)
                found["tokens"] += len(tokens)
                found["bytes"] += int(size)
    for which in SPLITS:
        np.save(out / f"{which}.starts.npy", np.concatenate(starts[which]).astype(np.int64))
    (out / "meta.json").write_text(json.dumps(meta | counts, indent=2) + "\n", encoding="utf-8")


def _read_piece(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    try:
        with np.load(path) as found:
            return {w: (found[w], found[f"{w}_tokens"], found[f"{w}_bytes"]) for w in SPLITS}
    except DAMAGED as error:
        with suppress(OSError):
            path.unlink()
        raise UserError(
            f"The file '{path}' of the data cache was damaged and is deleted; run again."
        ) from error


# --- The directory --------------------------------------------------------------------------------


@contextmanager
def _complete_or_absent(directory: Path) -> Iterator[Path]:
    """A scratch directory. At the end of the block, one rename makes it `directory`.

    If another process was faster, its result stays. Both have the same bytes.
    """
    scratch = directory.parent / f".tmp-{uuid.uuid4().hex}"
    try:
        scratch.mkdir(parents=True)
        _remove_stale(directory.parent)
        yield scratch
        try:
            os.rename(scratch, directory)
        except OSError:
            if not directory.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _remove_stale(cache_dir: Path) -> None:
    # Digests of shards serve later starts with another tokenizer. Those of a week without use go.
    for old in itertools.chain.from_iterable(
        cache_dir.glob(name) for name in (".tmp-*", "tokens-*.pieces", "shard-*.npz")
    ):
        with suppress(OSError):  # its owner may rename or remove it now
            if time.time() - old.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(old) if old.is_dir() else old.unlink()
