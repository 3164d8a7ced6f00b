"""Data sets of the Hugging Face Hub, which are read as a stream: hf:org/name[/config][@commit], the
train split. It needs the package `datasets`.

Nothing is downloaded before it is read, and no row is stored: the tokens are. Each file of the data
set is a shard, so that processes read different ones, and a start after a kill reads no file whose
digests are stored (shards.py). A text is read from the hub twice: for the digests and for the
tokens. Of parquet only the column with the text is read.

A start asks the hub for the newest commit of the data set and its files, and stores the answer with
the digests. In a run of several processes, the first one does. From then on that commit is read,
and starts that have its tokens need neither the network nor `datasets`. With `data.verify` the hub
is asked again. "@" and a commit (or a branch or tag) in the source asks for that one.
"""

import contextlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from yocou_jax.data.formats import PARQUET, Raw, parquet_rows, text_of
from yocou_jax.data.shards import DAMAGED, Shard, store
from yocou_jax.errors import UserError

log = logging.getLogger(__name__)
PINNED = re.compile(r"hf://datasets/[^@]+@([0-9a-f]{40})/")  # a file of one commit


class Answer(NamedTuple):
    """What the hub has said of a data set. commit: None if it has none, as a local folder. files:
    their addresses, or "" for each if they are not known."""

    commit: str | None
    files: list[str]
    parquet: bool


class DataSet:
    """A data set as a stream. revision: what to read of it; None: the newest commit."""

    def __init__(self, source: str, revision: str | None):
        parts = _without_revision(source).removeprefix("hf:").split("/", 2)
        self.name, self.config = "/".join(parts[:2]), parts[2] if len(parts) == 3 else None
        self.revision = revision
        if not all(parts):
            raise UserError(
                f"The data source {source!r} names no data set: write 'hf:org/name', "
                "'hf:org/name/config', or either with '@commit' at its end."
            )

    @cached_property
    def _builder(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise UserError(
                f"The data source 'hf:{self.name}' needs the package datasets: run 'pip install "
                "datasets'."
            ) from error
        return datasets.load_dataset_builder(self.name, self.config, revision=self.revision)

    @cached_property
    def _rows(self) -> Any:
        return self._builder.as_streaming_dataset(split="train")

    def ask(self) -> Answer:
        """Raises UserError if the hub gives no answer."""
        with self._errors("loaded", "Check the name and the network."):
            count = self._rows.num_shards
            names = getattr(self._builder.config, "data_files", None) or {}
            files = [str(name) for name in names.get("train", ())]
            commits = {match and match[1] for match in map(PINNED.match, files)}
            parquet = self._builder.name == "parquet"
        commit = commits.pop() if len(commits) == 1 else None
        return Answer(commit, files if parquet or count == len(files) else [""] * count, parquet)

    def read(self, number: int, answer: Answer, text_field: str) -> Iterator[Raw]:
        """The rows of a file."""
        address, count = answer.files[number], len(answer.files)
        # The path in the data set, so that the names of rows do not depend on the other files.
        path = PINNED.sub("", address) if PINNED.match(address) else str(number + 1)
        what = f"read (file {path}, {number + 1} of {count})"
        help = (
            "If the network has failed, start again: files that were read before are not read "
            "again. data.verify=True asks for the newest files."
        )
        with contextlib.ExitStack() as stack:
            with self._errors(what, help):
                if answer.parquet:
                    # Not through `datasets`: it reads all columns, and after an error its threads
                    # keep the process from ending (5.2.0).
                    records = parquet_rows(stack.enter_context(_parquet(address)), text_field)
                else:
                    rows = self._rows
                    rows = rows.shard(num_shards=count, index=number) if count > 1 else rows
                    records = iter(rows)
            row = 0
            while True:
                with self._errors(what, help):
                    record = next(records, None)
                if record is None:
                    return
                row += 1
                where = f"Row {row} of the file {path} of the data set {self.name!r}"
                yield f"{self.name}/{path}:{row}", text_of(record, text_field, where)

    @contextlib.contextmanager
    def _errors(self, what: str, help: str) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # the errors of the hub have no common base class
            reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
            raise UserError(
                f"The Hugging Face data set {self.name!r} (config {self.config!r}, split 'train') "
                f"could not be {what}: {reason}. {help}"
            ) from error


@contextlib.contextmanager
def _parquet(address: str) -> Iterator[Any]:
    """A parquet file, of which only what is asked for is requested."""
    import pyarrow.parquet as pq
    from fsspec.core import url_to_fs

    files, path = url_to_fs(address)
    with (
        files.open(path, "rb", cache_type="none") as file,
        pq.ParquetFile(file, **PARQUET) as rows,
    ):
        yield rows


def pinned(
    source: str, text_field: str, known: Path | None, verify: bool, processes: int
) -> tuple[str, tuple[Shard, ...]]:
    """The source with its commit, and its files. known: a folder that stores what the hub has said,
    and verify asks it again. processes: of a run, which all call this. Raises UserError if the hub
    gives no answer."""
    path = known and known / f"hub-{sha256(source.encode()).hexdigest()[:16]}.npz"

    def find() -> Answer:
        stored = None if path is None or verify else _stored(path)
        return stored or DataSet(source, _revision(source)).ask()

    answer = _that_of_the_first(find) if processes > 1 and jax.process_count() > 1 else find()
    if answer.commit is None:
        exact = source
        if path is not None:  # it may have the commit of another day
            with contextlib.suppress(OSError):
                path.unlink()
    else:
        exact = f"{_without_revision(source)}@{answer.commit}"
        if exact != source:
            log.info("%s is read as %s.", source, exact)
        if path is not None:
            store(path, answer=json.dumps(answer._asdict()))
    # Opened again, so that the first start reads as later ones do.
    data = DataSet(source, answer.commit or _revision(source))
    found = []
    for number, file in enumerate(answer.files):
        facts = f"{exact} {number} of {len(answer.files)} {file} {text_field}"
        stamp = sha256(facts.encode()).hexdigest() if answer.commit else None
        found.append(Shard(partial(data.read, number, answer, text_field), stamp))
    return exact, tuple(found)


def _without_revision(source: str) -> str:
    return source.partition("@")[0]


def _revision(source: str) -> str | None:
    return source.partition("@")[2] or None


def _stored(path: Path) -> Answer | None:
    with contextlib.suppress(OSError, *DAMAGED), np.load(path) as found:
        return _read_answer(str(found["answer"]))
    return None


def _read_answer(text: str) -> Answer:
    """Raises ValueError, KeyError or TypeError if it is none."""
    answer = Answer(**json.loads(text))
    if not (isinstance(answer.commit, str | None) and isinstance(answer.files, list)):
        raise TypeError(text)
    if not (answer.files and all(isinstance(file, str) for file in answer.files)):
        raise TypeError(text)
    return answer


def _that_of_the_first(find: Callable[[], Answer]) -> Answer:
    """What process 0 finds. If each asked, a new commit could come between them."""
    said = b""
    if jax.process_index() == 0:
        try:
            said = json.dumps(find()._asdict()).encode()
        except UserError as error:
            said = json.dumps({"error": str(error)}).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(said))))
    mine = np.frombuffer(said.ljust(size, b"\0"), np.uint8)
    text = multihost_utils.broadcast_one_to_all(mine).tobytes().decode()
    if "error" in (answer := json.loads(text)):
        raise UserError(answer["error"])
    return _read_answer(text)
