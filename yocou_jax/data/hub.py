"""Data sets of the Hugging Face Hub, which are read as a stream: hf:org/name[/config], its train
split. It needs the package `datasets`.

Nothing is downloaded before it is read, and no row is stored: the tokens are. Each file of the data
set is a shard, so that processes read different ones, and a start after a kill reads no file whose
digests are stored (shards.py). A text is read from the hub twice, for the digests and for the
tokens; and once more by each process if a tokenizer is trained on it.

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

from yocou_jax.data.formats import Raw, text_of
from yocou_jax.data.shards import DAMAGED, Shard, store
from yocou_jax.errors import UserError

log = logging.getLogger(__name__)
PINNED = re.compile(r"hf://datasets/[^@]+@([0-9a-f]{40})/")  # a file of one commit


class Answer(NamedTuple):
    """What the hub has said of a data set. commit: None if the set has none, as a local folder."""

    commit: str | None
    files: int


class DataSet:
    """A data set as a stream. commit: the one to read; None: the newest."""

    def __init__(self, source: str, commit: str | None = None):
        parts = source.removeprefix("hf:").split("/", 2)
        self.name, self.config = "/".join(parts[:2]), parts[2] if len(parts) == 3 else None
        self.commit = commit

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
            files = self._rows.num_shards
            names = getattr(self._builder.config, "data_files", None) or {}
            found = [PINNED.match(str(name)) for name in names.get("train", ())]
            commits = {match and match[1] for match in found}
        return Answer(commits.pop() if len(commits) == 1 else None, files)

    def read(self, number: int, files: int, text_field: str) -> Iterator[Raw]:
        """The rows of a file. Names do not depend on the other files."""
        again = "Start again: files that were read before are not read again."
        with self._errors(f"read (file {number + 1} of {files})", again):
            rows = self._rows.shard(num_shards=files, index=number) if files > 1 else self._rows
            records = enumerate(rows, 1)
        while True:
            with self._errors(f"read (file {number + 1} of {files})", again):
                row, record = next(records, (0, None))
            if record is None:
                return
            name = f"{self.name}:{number + 1}:{row}"
            where = f"Row {row} of file {number + 1} of the data set {self.name!r}"
            yield name, text_of(record, text_field, where)

    @contextlib.contextmanager
    def _errors(self, what: str, help: str) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # the errors of the hub have no common base class
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise UserError(
                f"The Hugging Face data set {self.name!r} (config {self.config!r}, split 'train') "
                f"could not be {what}: {reason}. {help}"
            ) from error


def shards(source: str, text_field: str, known: Path | None, verify: bool) -> tuple[Shard, ...]:
    """The files of a data set. known: a folder that stores what the hub has said, and verify asks
    it again. Raises UserError if it gives no answer."""
    path = known and known / f"hub-{sha256(source.encode()).hexdigest()[:16]}.npz"
    answer = None if path is None or verify else _stored(path)
    data = DataSet(source, answer and answer.commit)
    if answer is None:
        answer = data.ask()
        if path is not None and answer.commit is not None:
            store(path, answer=json.dumps(answer._asdict()))
    else:
        log.info("%s: commit %s (data.verify asks for a newer one).", source, answer.commit)
    found = []
    for number in range(answer.files):
        facts = f"{source} {answer} {text_field} {number}"
        stamp = sha256(facts.encode()).hexdigest() if answer.commit else None
        found.append(Shard(partial(data.read, number, answer.files, text_field), stamp))
    return tuple(found)


def _stored(path: Path) -> Answer | None:
    with contextlib.suppress(OSError, *DAMAGED), np.load(path) as found:
        return Answer(**json.loads(str(found["answer"])))
    return None
