"""Data sets of the Hugging Face Hub, which are read as a stream: hf:org/name[/config], its train
split. It needs the package `datasets`.

Nothing is downloaded before it is read, and no row is stored: the tokens are. Each file of the data
set is a shard, so that processes read different ones, and a start after a kill reads no file whose
digests are stored (shards.py). A text is read from the hub twice: for the digests and for the
tokens. Of parquet only the column with the text is read.

A start asks the hub for the newest commit of the data set and its files, and stores the answer with
the digests. From then on that commit is read, and starts that have its tokens need neither the
network nor `datasets`. With `data.verify` the hub is asked again.
"""

import contextlib
import json
import logging
import re
from collections.abc import Iterator
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from yocou_jax.data.formats import Raw, parquet_rows, text_of
from yocou_jax.data.shards import DAMAGED, Shard, store
from yocou_jax.errors import UserError

log = logging.getLogger(__name__)
PINNED = re.compile(r"hf://datasets/[^@]+@([0-9a-f]{40})/")  # a file of one commit
BLOCK_BYTES = 8 * 1024**2  # of one request


class Answer(NamedTuple):
    """What the hub has said of a data set. commit: None if it has none, as a local folder. files:
    how many there are. parquet: their addresses if all are parquet, or else []."""

    commit: str | None
    files: int
    parquet: list[str]


class DataSet:
    """A data set as a stream. commit: the one to read; None: the newest."""

    def __init__(self, source: str, commit: str | None = None):
        parts = source.removeprefix("hf:").split("/", 2)
        self.name, self.config = "/".join(parts[:2]), parts[2] if len(parts) == 3 else None
        self.commit = commit
        if not all(parts):
            raise UserError(
                f"The data source {source!r} names no data set: write 'hf:org/name' or "
                "'hf:org/name/config'."
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
        return datasets.load_dataset_builder(self.name, self.config, revision=self.commit)

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
            is_parquet = self._builder.name == "parquet"
        commit = commits.pop() if len(commits) == 1 else None
        return Answer(commit, len(files), files) if is_parquet else Answer(commit, count, [])

    def read(self, number: int, answer: Answer, text_field: str) -> Iterator[Raw]:
        """The rows of a file. Their names do not depend on the other files."""
        what = f"read (file {number + 1} of {answer.files})"
        help = (
            "If the network has failed, start again: files that were read before are not read "
            "again. --config.data.verify=True asks for the newest files."
        )
        with contextlib.ExitStack() as stack:
            with self._errors(what, help):
                records = self._records(number, answer, text_field, stack)
            row = 0
            while True:
                with self._errors(what, help):
                    record = next(records, None)
                if record is None:
                    return
                row += 1
                where = f"Row {row} of file {number + 1} of the data set {self.name!r}"
                yield f"{self.name}:{number + 1}:{row}", text_of(record, text_field, where)

    def _records(
        self, number: int, answer: Answer, text_field: str, stack: contextlib.ExitStack
    ) -> Iterator[Any]:
        if answer.parquet:
            # Not through `datasets`: it reads all columns, and after an error its threads keep the
            # process from ending (5.2.0).
            return parquet_rows(stack.enter_context(_parquet(answer.parquet[number])), text_field)
        if answer.files == 1:
            return iter(self._rows)
        return iter(self._rows.shard(num_shards=answer.files, index=number))

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
        pq.ParquetFile(file, buffer_size=BLOCK_BYTES) as rows,
    ):
        yield rows


def shards(source: str, text_field: str, known: Path | None, verify: bool) -> tuple[Shard, ...]:
    """The files of a data set. known: a folder that stores what the hub has said, and verify asks
    it again. Raises UserError if it gives no answer."""
    path = known and known / f"hub-{sha256(source.encode()).hexdigest()[:16]}.npz"
    answer = None if path is None or verify else _stored(path)
    if answer is None:
        answer = DataSet(source).ask()
        if path is not None and answer.commit is not None:
            store(path, answer=json.dumps(answer._asdict()))
    else:
        log.info("%s: commit %s (data.verify asks for a newer one).", source, answer.commit)
    # Opened again, so that the first start reads as later ones do.
    data = DataSet(source, answer.commit)
    found = []
    for number in range(answer.files):
        facts = f"{source} {answer.commit} {answer.files} {text_field} {number}"
        stamp = sha256(facts.encode()).hexdigest() if answer.commit else None
        found.append(Shard(partial(data.read, number, answer, text_field), stamp))
    return tuple(found)


def _stored(path: Path) -> Answer | None:
    with contextlib.suppress(OSError, *DAMAGED), np.load(path) as found:
        return Answer(**json.loads(str(found["answer"])))
    return None
