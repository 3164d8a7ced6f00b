"""Where text comes from. A source is one of

    python                the standard library of the running Python (no network)
    site_packages         every .py file of the installed packages
    path or glob          files of text, JSON or parquet, also compressed; `**` matches directories
    hf:org/name           the train split of a Hugging Face data set (hub.py)
    hops(...) needle(...) tasks that a program writes (synthetic.py)
    w*source + w*source   a mixture; w is a share of the training sequences, and the sum is 1

Each text file is a document, and so is each row of JSON or parquet. A single text file is cut at
line ends into pieces of about 16 KiB, because the held-out split needs more than one document.
"""

import contextlib
import glob
import os
import re
import sysconfig
import time
from collections.abc import Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from yocou_jax.data import hub
from yocou_jax.data.corpus import Corpus
from yocou_jax.data.formats import Raw, read_file
from yocou_jax.data.shards import Shard
from yocou_jax.data.synthetic import Hops, Needle, parse_task
from yocou_jax.errors import UserError
from yocou_jax.files import expand_path

# Tests of the standard library contain invalid encodings on purpose; lib2to3 has Python 2. Most of
# encodings are generated tables, nearly copies of each other, and pydoc_data is one long text that
# is no code: a held-out table is known from training, and either can be most of a small split.
STDLIB_SKIPPED = {
    *("test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages"),
    *("encodings", "pydoc_data"),
}

YOUNG = 2.0  # seconds
SHARD_BYTES = 64 * 1024**2  # of files as they are stored, perhaps compressed

WEIGHT = r"[-+]?(?:\d[\d.,_]*|\.\d[\d.]*|inf|infinity|nan)(?:e[-+]?\d+)?%?"
WEIGHTED = re.compile(rf"{WEIGHT}\s*\*", re.IGNORECASE)
SEPARATOR = re.compile(rf"\s+\+\s+|\s*\+\s*(?={WEIGHT}\s*\*)", re.IGNORECASE)
QUOTED = re.compile(r"""(^|\*\s*)((["']).*?\3)(?=\s*(?:\+|$))""", re.DOTALL)


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
        exact, shards = hub.pinned(source, text_field, known, verify, share[1])
        return Corpus(exact, shards, bad_rows, **memory)
    if task := parse_task(source):
        text = open_corpus(task.source, **memory) if task.source else None
        return Corpus(source, (Shard(partial(_read_task, task, text), None),), bad_rows)
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


def _read_task(task: Hops | Needle, text: Corpus | None) -> Iterator[Raw]:
    yield from task.read(document.text for document in (text.documents() if text else ()))
