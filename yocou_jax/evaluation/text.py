"""The text that a model is measured on: the held-out split of its run, or any other one."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from yocou_jax import manifest
from yocou_jax.config import Config
from yocou_jax.data.pipeline import Sequences, Validation, load_data
from yocou_jax.data.shards import Document
from yocou_jax.data.sources import open_corpus, parse_source
from yocou_jax.data.tokenizer import Tokenizer
from yocou_jax.errors import UserError
from yocou_jax.evaluation.options import Options
from yocou_jax.files import expand_path
from yocou_jax.pretrained import Pretrained

# An exported folder does not say what its model was trained on. These are the defaults for it.
LENGTH, SEQUENCES = 512, 64

Tokens = tuple[np.ndarray, np.ndarray]  # tokens and starts, as in `Sequences`


class Text(NamedTuple):
    """The sequences to read, all of one length. source: where they come from, in words."""

    source: str
    packing: bool
    length: int
    sequences: Validation

    def facts(self) -> dict:
        """What a report says about the text. bytes: those of the text of the targets."""
        return {
            "source": self.source,
            "packing": self.packing,
            "length": self.length,
            "sequences": self.sequences.num_sequences,
            "tokens": self.sequences.num_tokens,
            "bytes": self.sequences.num_bytes,
        }


def open_text(loaded: Pretrained, options: Options) -> Text:
    """The text of a task: `options.source`, or the held-out split of the run, which has the same
    documents as in training.

    Its sequences are as long as in training, or as the longest of `options.lengths`. Documents are
    packed if they were in training.

    Raises UserError if the text cannot be read, has changed since training, or does not fill one
    sequence.
    """
    folder, tokenizer = options.folder, loaded.tokenizer
    run, source = _run_of(folder), options.source
    data = None if run is None else run[0].data
    length = max(options.lengths or (data.sequence_length if data else LENGTH,))
    count = options.samples or (data.validation_sequences if data else SEQUENCES)
    packing = data.packing if data else False
    if source is not None:
        fields = (data.text_field, data.bad_rows, expand_path(data.cache_dir)) if data else ()
        parts = []
        for weight, name in parse_source(source):
            documents = open_corpus(name, *fields).documents()
            needed = max(1, round(weight * count)) * length + 1
            parts.append((weight, _first_tokens(documents, tokenizer, needed)))
    elif run is not None:
        source, parts = f"the held-out split of {data.source}", _held_out(folder, *run)
    else:
        raise UserError(
            f"{folder} is an exported folder, which has no text: give --source=, such as a path, a "
            "glob or python."
        )
    parts = [
        (weight, Sequences(tokens, starts, length, packing)) for weight, (tokens, starts) in parts
    ]
    for _, sequences in parts:
        if not len(sequences):
            raise UserError(
                f"The text ({source}) has {len(sequences.tokens):,} tokens, but a sequence of "
                f"{length:,} tokens needs {length + 1:,}. Give more text or smaller --lengths."
            )
    return Text(source, packing, length, Validation.of(parts, count, count, tokenizer))


def _run_of(folder: Path) -> tuple[Config, str | None] | None:
    """Config of the run in a workdir, and the fingerprint of its data. None: no workdir."""
    if not (folder / manifest.FILE).exists():
        return None
    found = manifest.read(folder)
    if found is None:
        raise UserError(f"{folder / manifest.FILE} is not complete.")
    return Config.from_dict(found["config"]), found["corpus"]


def _held_out(folder: Path, config: Config, fingerprint: str | None) -> list[tuple[float, Tokens]]:
    """Weight and held-out tokens of each part of the training text. The split is that of the
    training length, because it may depend on it (see `split_corpus`)."""
    # With the tokenizer of the run, no BPE is trained again. Without `verify`, which the run may
    # have had, the hub is not asked for a newer commit.
    changed = {"tokenizer": str(folder / "tokenizer.json"), "verify": False}
    data = load_data(dataclasses.replace(config.data, **changed))
    if fingerprint not in (None, data.fingerprint):
        raise UserError(
            f"The training text {config.data.source!r} has changed since the run in {folder} was "
            f"started (fingerprint {fingerprint} -> {data.fingerprint}), so its held-out split is "
            "not the same. Bring the old text (or Python) back, or name a text with --source."
        )
    weights = [weight for weight, _ in parse_source(config.data.source)]
    sequences = {id(s): s for s, _ in data.validation.rows}.values()
    return [(w, (s.tokens, s.starts)) for w, s in zip(weights, sequences, strict=True)]


def _first_tokens(documents: Iterable[Document], tokenizer: Tokenizer, needed: int) -> Tokens:
    """The first documents, until they have as many tokens as `needed`, or all."""
    tokens, starts = [], []
    for document in documents:
        starts.append(len(tokens))
        tokens += [tokenizer.eot_id, *tokenizer.encode(document.text)]
        if len(tokens) >= needed:
            break
    return np.array(tokens), np.array(starts)
