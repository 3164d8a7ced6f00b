"""From a data configuration to global batches: tokenize once, then read sequences in any order.

    text                     documents: (name, text), see sources.py
    the hash of the name     puts each document into the training split or the held-out split
    tokens, one file         <eot> doc <eot> doc ... of a split, uint16 or uint32 [tokens]
    sequence i               the N + 1 tokens i*N .. i*N + N of this file
    Batch, int32 [B, N]      B sequences: the inputs are all tokens but the last one of each
                             sequence, the targets are all but the first one

<eot> is the end-of-text token, and N is data.sequence_length. Row r of the training stream depends
only on the corpus, the seed and r. So the state of the iterator is one integer, and the global
batches do not depend on the number of processes. docs/using.md has the way from there to the loss.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils

from yocou_jax.data.corpus import Corpus, Split, split_corpus
from yocou_jax.data.sources import open_corpus, parse_source
from yocou_jax.data.tokenizer import Tokenizer, cached_bpe, load_tokenizer
from yocou_jax.data.tokens import SPLITS, tokenized
from yocou_jax.errors import UserError
from yocou_jax.files import expand_path
from yocou_jax.typing import Array, Float, Int

BPE_SAMPLE_BYTES = 32 * 1024**2  # enough text for tens of thousands of merges, about 15 s
GOLDEN_RATIO = (5**0.5 - 1) / 2
MOST_BYTES_PER_TOKEN = 8  # assumed of every tokenizer, on average, to say how large a split must be


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """One global batch, or one row of it without the axis B.

    tokens are the inputs, and targets are the tokens that come next. With packing, segment_ids
    number the documents of a row from 1, and positions start again at 0 in each document. Without
    packing both are None. loss_weights=None means that every target counts. With packing every
    target counts too: the target of the last token of a document is the <eot> of the next document,
    and so a model learns to end a text.
    """

    tokens: Int[Array, "B N"]
    targets: Int[Array, "B N"]
    loss_weights: Float[Array, "B N"] | None
    segment_ids: Int[Array, "B N"] | None
    positions: Int[Array, "B N"] | None


@dataclass(frozen=True)
class Sequences:
    """Sequences of N + 1 tokens of one memory map. Consecutive sequences share one token.

    tokens: uint16 or uint32 [tokens]. starts: int64 [documents], the index of the <eot> before each
    document. The last tokens are left out, because they do not fill a sequence.
    """

    tokens: np.ndarray
    starts: np.ndarray
    sequence_length: int
    packing: bool

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.sequence_length)

    def __getitem__(self, i: int) -> Batch:
        n = self.sequence_length
        begin = int(i) * n
        tokens = self.tokens[begin : begin + n + 1].astype(np.int32)
        if not self.packing:
            return Batch(tokens[:-1], tokens[1:], None, None, None)
        # The document of the first token of the sequence is segment 1.
        first, last = np.searchsorted(self.starts, [begin + 1, begin + n])
        begins = np.zeros(n, np.int32)  # 1 where a document begins after the first token
        begins[self.starts[first:last] - begin] = 1
        segments = 1 + np.cumsum(begins, dtype=np.int32)
        index = np.arange(n, dtype=np.int32)
        positions = index - np.maximum.accumulate(index * begins)
        return Batch(tokens[:-1], tokens[1:], None, segments, positions)


@dataclass(frozen=True)
class Batches:
    """Global batches with a sharding, in any order. Batch k has the rows k*B .. k*B + B - 1.

    A process reads only the rows of its own devices. Raises UserError if the mesh does not divide
    [B, N].
    """

    row: Callable[[int], Batch]
    batch_size: int
    sequence_length: int
    sharding: jax.sharding.Sharding

    def __post_init__(self):
        try:
            self.sharding.shard_shape(self.shape)
        except ValueError as error:
            raise UserError(
                f"A batch of data.batch_size={self.batch_size} sequences of data.sequence_length="
                f"{self.sequence_length} tokens does not divide evenly over {self.sharding}."
            ) from error

    @property
    def shape(self) -> tuple[int, int]:
        return self.batch_size, self.sequence_length

    @cached_property
    def local_rows(self) -> list[int]:
        """The rows of a batch, from 0 .. B - 1, that this process must read."""
        spans = self.sharding.addressable_devices_indices_map(self.shape).values()
        return sorted({r for rows, _ in spans for r in range(*rows.indices(self.batch_size))})

    def __len__(self) -> int:
        return sys.maxsize // self.batch_size

    def host_batch(self, k: int) -> Batch:
        """The local rows of batch k as numpy arrays [len(local_rows), N]."""
        rows = [self.row(int(k) * self.batch_size + r) for r in self.local_rows]
        return jax.tree.map(lambda *arrays: np.stack(arrays), *rows)

    def __getitem__(self, k: int) -> Batch:
        def place(local: np.ndarray) -> jax.Array:
            def shard(index: tuple[slice, slice]) -> np.ndarray:
                rows = range(*index[0].indices(self.batch_size))
                return local[np.searchsorted(self.local_rows, rows), index[1]]

            return jax.make_array_from_callback(self.shape, self.sharding, shard, local.dtype)

        return jax.tree.map(place, self.host_batch(k))


class TrainIterator:
    """An endless iterator of global batches. A background thread reads batches in advance.

    The state is `step`, the number of batches that it has returned. Close it, or use it in `with`,
    to stop the thread.
    """

    def __init__(self, batches: Batches, start_step: int = 0):
        self.step = start_step
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        self._iterator = iter(grain.MapDataset.source(batches).to_iter_dataset(options))
        grain.experimental.set_next_index(self._iterator, start_step)
        self._iterator.start_prefetch()

    def __iter__(self) -> "TrainIterator":
        return self

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self.step += 1
        return batch

    def close(self) -> None:
        self._iterator.close()

    def __enter__(self) -> "TrainIterator":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def spread(sequences: Sequences, count: int) -> np.ndarray:
    """The numbers of `count` sequences, or of all, ascending: one of each document, then a second
    one of each, and so on, at places that are spread over the document. A sequence belongs to the
    document of its first token.

    So a sample has about as much of every document. The first sequences would be those of a few
    documents, and of the whole split, one long document may be more than half.
    """
    numbers = np.arange(len(sequences))
    begins = numbers * sequences.sequence_length
    document = np.searchsorted(sequences.starts, begins, side="right")
    first = np.searchsorted(document, document)  # the first sequence of the same document

    def scattered(n: np.ndarray) -> np.ndarray:  # neighbors are far apart, evenly
        return n * GOLDEN_RATIO % 1

    by_place = np.lexsort((scattered(numbers - first), document))
    turn = np.empty_like(numbers)
    turn[by_place] = numbers - first
    return np.sort(np.lexsort((scattered(document), turn))[:count])


@dataclass(frozen=True)
class Validation:
    """Sequences of the held-out split, about as many of each document: the same in every call.

    num_tokens is the number of targets, and num_bytes is the number of their UTF-8 bytes, so
    bits per byte = (mean nats per token) * num_tokens / (ln 2 * num_bytes).
    """

    rows: tuple[tuple[Sequences, int], ...]  # (sequences, index), one per sequence
    batch_size: int
    num_tokens: int
    num_bytes: int

    @classmethod
    def of(
        cls,
        parts: Iterable[tuple[float, Sequences]],
        count: int,
        batch_size: int,
        tokenizer: Tokenizer,
    ) -> "Validation":
        """About `count` sequences. Each part of a mixture has `weight` of them (`spread`), or fewer
        if it is too small."""
        rows = []
        for weight, sequences in parts:
            chosen = spread(sequences, max(1, round(weight * count)))
            rows += [(sequences, int(i)) for i in chosen]
        num_tokens = num_bytes = 0
        for sequences, i in rows:
            targets = sequences[i].targets
            num_tokens += len(targets)
            num_bytes += tokenizer.num_bytes(targets)
        return cls(tuple(rows), batch_size, num_tokens, num_bytes)

    @property
    def num_sequences(self) -> int:
        return len(self.rows)

    def _row(self, i: int) -> Batch:
        sequences, index = self.rows[min(i, len(self.rows) - 1)]
        row = sequences[index]
        # Rows that fill the last batch do not count.
        weights = np.full(len(row.tokens), i < len(self.rows), np.float32)
        return Batch(row.tokens, row.targets, weights, row.segment_ids, row.positions)

    def batches(
        self, sharding: jax.sharding.Sharding, batch_size: int | None = None
    ) -> Iterator[Batch]:
        """Every sequence once, in batches [batch_size, N], by default of the training size.
        loss_weights are always set, and their sum is num_tokens."""
        size, length = batch_size or self.batch_size, self.rows[0][0].sequence_length
        batches = Batches(self._row, size, length, sharding)
        return (batches[k] for k in range(-(-len(self.rows) // size)))


@dataclass(frozen=True)
class DataBundle:
    """All that a run needs to know about its data. Numbers are those of the training split."""

    tokenizer: Tokenizer
    stream: grain.MapDataset  # row r of the training stream
    validation: Validation
    batch_size: int
    sequence_length: int
    fingerprint: str  # sha256 of the documents, the weights and the tokenizer
    num_documents: int
    num_tokens: int
    num_bytes: int
    num_sequences: int
    num_invalid: int  # documents of both splits with invalid UTF-8
    num_duplicates: int
    num_skipped: int  # rows without text (data.bad_rows='skip')

    @property
    def bytes_per_token(self) -> float:
        return self.num_bytes / self.num_tokens

    def abstract_batch(self, sharding: jax.sharding.Sharding) -> Batch:
        """Shapes [B, N] and types of a training batch, to compile the step."""
        shape = (self.batch_size, self.sequence_length)
        return jax.tree.map(
            lambda row: jax.ShapeDtypeStruct(shape, row.dtype, sharding=sharding), self.stream[0]
        )

    def train(self, sharding: jax.sharding.Sharding, start_step: int = 0) -> TrainIterator:
        """An iterator over batches [B, N] that begins with batch number `start_step`."""
        row = self.stream.__getitem__
        batches = Batches(row, self.batch_size, self.sequence_length, sharding)
        return TrainIterator(batches, start_step)


def load_data(config: Any) -> DataBundle:
    """Reads the data and tokenizes it, once per corpus and tokenizer, into config.cache_dir.

    `config` has the fields of DataConfig. Every process of a run calls this, and all must see the
    same documents. Raises UserError for input that cannot be used.
    """
    parts = _parts(config)
    cache_dir = expand_path(config.cache_dir)
    content = " + ".join(f"{weight!r}*{s.corpus.summary.fingerprint}" for weight, s in parts)
    if config.tokenizer == "bpe":
        # Without the weights: another mixture of the same sources keeps its tokens.
        splits = [split for _, split in parts]
        texts = [f"{s.corpus.summary.fingerprint} {s.threshold!r}" for s in splits]
        key = " + ".join(texts) + f" {BPE_SAMPLE_BYTES}"
        key += "".join(s.corpus.sample_key for s in splits)
        trained = cached_bpe(_bpe_sample(splits), config.vocab_size, cache_dir, key)
        tokenizer = Tokenizer.from_json(trained.to_json(), "bpe", config.end_of_text)
    else:
        tokenizer = load_tokenizer(
            config.tokenizer, config.end_of_text, config.allow_lossy_tokenizer
        )
    fingerprint = sha256(f"{content} {tokenizer.fingerprint}".encode()).hexdigest()
    _require_same_everywhere(fingerprint)

    train, held_out, counts = [], [], {"documents": 0, "tokens": 0, "bytes": 0}
    for weight, split in parts:
        directory, meta = tokenized(split, tokenizer, cache_dir, config.allow_lossy_tokenizer)
        _require_sequences(split.corpus, meta, config.sequence_length)
        train.append((weight, _open_sequences(directory, meta, "train", config)))
        held_out.append((weight, _open_sequences(directory, meta, "held_out", config)))
        counts = {name: counts[name] + meta["train"][name] for name in counts}
    num_sequences = sum(len(sequences) for _, sequences in train)
    if num_sequences < config.batch_size:
        raise UserError(
            f"The data source {config.source!r} has {num_sequences} training sequences of "
            f"data.sequence_length={config.sequence_length}, fewer than "
            f"data.batch_size={config.batch_size}; use a smaller batch, a shorter sequence, or "
            "more text."
        )
    summaries = [split.corpus.summary for _, split in parts]
    return DataBundle(
        tokenizer=tokenizer,
        stream=_training_stream(train, config.seed),
        validation=Validation.of(
            held_out, config.validation_sequences, config.batch_size, tokenizer
        ),
        batch_size=config.batch_size,
        sequence_length=config.sequence_length,
        fingerprint=fingerprint,
        num_documents=counts["documents"],
        num_tokens=counts["tokens"],
        num_bytes=counts["bytes"],
        num_sequences=num_sequences,
        num_invalid=sum(summary.invalid for summary in summaries),
        num_duplicates=sum(summary.duplicates for summary in summaries),
        num_skipped=sum(summary.skipped for summary in summaries),
    )


def _parts(config: Any) -> list[tuple[float, Split]]:
    """Weight and split of each part of a mixture. A split needs a held-out sequence and a batch."""
    parts = []
    known = expand_path(config.cache_dir)
    for weight, name in parse_source(config.source):
        memory = known, config.verify, (jax.process_index(), jax.process_count())
        corpus = open_corpus(name, config.text_field, config.bad_rows, *memory)
        rows, length = max(1, round(weight * config.batch_size)), config.sequence_length
        needs = [MOST_BYTES_PER_TOKEN * (count * length + 1) for count in (1, rows)]
        parts.append((weight, split_corpus(corpus, config.validation_fraction, *needs)))
    return parts


def _require_sequences(corpus: Corpus, meta: dict[str, Any], sequence_length: int) -> None:
    for split in SPLITS:
        if meta[split]["tokens"] > sequence_length:
            continue
        shorter = min(meta[split]["tokens"] for split in SPLITS) // 2
        raise UserError(
            f"The {split.replace('_', '-')} split of the data source {corpus.source!r} has "
            f"{meta[split]['documents']} documents and {meta[split]['tokens']} tokens, fewer than "
            f"the {sequence_length + 1} tokens that one sequence needs "
            f"(data.sequence_length={sequence_length}); use more text"
            f"{f' or a data.sequence_length of at most {shorter}' if shorter else ''}."
        )


def _training_stream(train: list[tuple[float, Sequences]], seed: int) -> grain.MapDataset:
    """Each part of a mixture reads all its sequences once per epoch, in a new order."""
    parts = [
        grain.MapDataset.source(sequences).seed(seed + i).shuffle().repeat()
        for i, (_, sequences) in enumerate(train)
    ]
    return grain.MapDataset.mix(parts, [w for w, _ in train]) if len(parts) > 1 else parts[0]


def _bpe_sample(splits: list[Split]) -> Iterator[str]:
    """The documents that train a BPE: about BPE_SAMPLE_BYTES in all, as many of each source, or all
    that it has."""
    for corpus, threshold in splits:
        for document in corpus.sample(BPE_SAMPLE_BYTES / len(splits), threshold):
            yield document.text


def _require_same_everywhere(fingerprint: str) -> None:
    """Raises UserError if processes read different data, as two versions of Python would."""
    if jax.process_count() == 1:
        return
    mine = np.frombuffer(bytes.fromhex(fingerprint), np.uint8)
    everyone = multihost_utils.process_allgather(mine)
    others = [rank for rank, theirs in enumerate(everyone) if (theirs != mine).any()]
    if others:
        raise UserError(
            f"Process {jax.process_index()} reads other data or another tokenizer than the "
            f"processes {others}; a source such as 'python' needs the same Python everywhere."
        )


def _open_sequences(directory: Path, meta: dict[str, Any], split: str, config: Any) -> Sequences:
    path, dtype, count = directory / f"{split}.bin", np.dtype(meta["dtype"]), meta[split]["tokens"]
    if not path.is_file() or path.stat().st_size != count * dtype.itemsize:
        raise UserError(f"The data cache '{directory}' is damaged; delete it and run again.")
    # mmap cannot map an empty file.
    tokens = np.memmap(path, dtype, "r") if count else np.zeros(0, dtype)
    starts = np.load(directory / f"{split}.starts.npy")
    return Sequences(tokens, starts, config.sequence_length, config.packing)
