"""From text to token ids and back: bytes, a byte-level BPE, or any tokenizer.json.

A tokenizer should give back every text exactly. If it does not (for example it writes lower case),
it is an error that says what changes, unless data.allow_lossy_tokenizer is set. Then bytes are
counted in the text that the tokenizer gives back.
"""

import hashlib
import json
import logging
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from yocou_jax.errors import UserError
from yocou_jax.files import expand_path
from yocou_jax.progress import progress

END_OF_TEXT, PADDING = "<|endoftext|>", "<|pad|>"
SPECIAL_TOKENS = (END_OF_TEXT, PADDING)
# Without data.end_of_text, the first of these that exists; of GPT-2, Llama, DeepSeek and others.
KNOWN_END_OF_TEXT = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eot_id|>",
    "<|im_end|>",
    "<｜end▁of▁sentence｜>",
    "<|end▁of▁sentence|>",
    "<|eos|>",
    "<|EOS|>",
    "<EOS>",
    "[EOS]",
)
LARGEST_VOCABULARY = 2**24  # tables of this size still fit into any memory

log = logging.getLogger(__name__)

# The units of a text; no token spans two of them. An identifier includes one symbol or space before
# it (".append", "(self", " for"). A newline includes the indentation after it, and punctuation
# before it ("):\n        "). On the standard library with 4k tokens, held-out text has 3.72 bytes
# per token, and 3.59 with the pattern of GPT-2.
# No unit is longer than about 64 characters: the cost of training grows with the square of the
# longest unit, and without a limit a text of one word (base64, DNA, minified code) is one unit. On
# the standard library, the limit changes bytes per token by 0.01%.
PATTERN = (
    r"[^\r\n\p{L}\p{N}_]?[\p{L}_][\p{L}\p{N}_]{0,63}"
    r"|\p{N}{1,3}"
    r"|[ ]?[^\s\p{L}\p{N}_]{1,64}(?:\n[ \t]{0,64})?"
    r"|\s{0,64}\n[ \t]{0,64}"
    r"|[^\S\n]{1,64}"
)

# Texts that show what a tokenizer changes. The key names the change; the simplest comes first.
PROBES = {
    "plain letters": ["abc"],
    "single spaces": ["a b c"],
    "double spaces": ["a  b   c"],
    "spaces at the start": [" a", "  a"],
    "spaces at the end": ["a ", "a  "],
    "tabs": ["a\tb\t\tc", "\ta", "a\t"],
    "line ends": ["a\nb\n\n\nc\n", "\n", "a\r\nb\rc\r\n"],
    "indentation": ["a:\n    b:\n        c"],
    "capital letters": ["A Bc DEF"],
    "accents": ["naïve àéîöñ", "ÀÉÖ"],
    "accents that are characters of their own": ["e\u0301", "a\u0307\u0323", "\u0438\u0306"],
    "characters that Unicode writes in two ways": ["\u212b\u2126", "\u1112\u1161\u11ab", "\u0958"],
    "ligatures and other compatibility characters": ["ﬁ", "½²①", "Ａ１", "ｶﾞ", "…", "™", "ſ"],
    "numbers": ["1234567890 1,234.50 007"],
    "spaces around punctuation": ["a , b . c ! d ? do n't it 's ( e )", "a,b.c!d?", "[ f ] { g }"],
    "quotation marks and dashes": ["``a'' “b” ‘c’ «d»", "a - b – c — d"],
    "symbols": ["".join(map(chr, range(32, 127)))],
    "unusual spaces": ["a\u00a0b", "a\u3000b\u2009c", "a\u2028b\u2029c\u0085d\x0be\x0cf"],
    "invisible characters": ["a\u200bb", "a\u200cb\u200dc", "a\u00adb\u2060c", "\ufeffa\u202ab"],
    "control characters": ["a\x00b", "a\x01b\x07c\x1bd\x7fe\x80f"],
    "emoji": ["🙂", "👩\u200d👩\u200d👧 🏳\ufe0f\u200d🌈 👍🏽 🇩🇪 ❤\ufe0f"],
    "other scripts": ["αβγ абв", "日本語", "한국어", "नमस्ते", "ไทย", "שָׁלוֹם", "مرحبا", "𝒜𐍈"],
    "the sign for invalid bytes": ["a\ufffdb", "\ufffd"],
    "the character U+2581": ["a\u2581b", "\u2581"],
    "long words": ["x" * 300],
}


@dataclass(frozen=True)
class Tokenizer:
    """Encodes UTF-8 text. `backend` None means one token per byte.

    Text never becomes a special token (the literal "<|endoftext|>" becomes ordinary tokens), and
    `decode` leaves special tokens out. `eot_id` comes before every document.
    """

    backend: tokenizers.Tokenizer | None = field(repr=False)  # its repr is the whole vocabulary
    vocab_size: int
    eot_id: int
    pad_id: int
    text: str = field(default="bytes", repr=False)  # the tokenizer.json, or this word
    loss: str = ""  # what it changes in texts; "": nothing
    additive: bool = True  # whether the bytes of a text are the sum of token_bytes of its tokens

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, int64 [tokens], without special tokens."""
        if self.backend is None:
            return [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in texts]
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int64) for encoding in encodings]

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def decode(self, ids: Iterable[int | np.integer]) -> str:
        """The text of ids. U+FFFD replaces bytes that are not valid UTF-8 (half a character)."""
        ids = [int(i) for i in ids]
        if self.backend is None:
            return bytes(i for i in ids if i < 256).decode("utf-8", "replace")
        return self.backend.decode(ids, skip_special_tokens=True)

    def num_bytes(self, ids: Sequence[int] | np.ndarray) -> int:
        """Number of UTF-8 bytes of the text of the ids [tokens]. For a tokenizer that changes
        texts, of the text that it gives back, document by document."""
        ids = np.asarray(ids, np.int64)
        if self.additive:
            return int(self.token_bytes[ids].sum())
        documents = np.split(ids, np.flatnonzero(ids == self.eot_id))
        return sum(len(self.decode(document).encode()) for document in documents)

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """Number of UTF-8 bytes of each id, int64 [vocab_size]; 0 for special tokens."""
        if self.backend is None:
            return np.array([1] * 256 + [0] * len(SPECIAL_TOKENS))
        sizes = np.zeros(self.vocab_size, np.int64)
        byte_level = "ByteLevel" in json.dumps(json.loads(self.backend.to_str())["decoder"])
        for token, i in self.backend.get_vocab().items():
            if byte_level:  # each character of the alphabet is one byte
                sizes[i] = len(token)
            else:  # SentencePiece: <0x0A> is a byte, U+2581 is a space
                is_byte = re.fullmatch("<0x[0-9A-F]{2}>", token)
                sizes[i] = 1 if is_byte else len(token.replace("▁", " ").encode())
        for i, added in self.backend.get_added_tokens_decoder().items():
            sizes[i] = 0 if added.special else len(added.content.encode())
        return sizes

    @property
    def end_of_text(self) -> str:
        """The name of the token `eot_id`, a value for data.end_of_text."""
        return next(name for name, i in _special_tokens(self.backend).items() if i == self.eot_id)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of all that decides the ids: the text of the file, and the token that ends a
        document."""
        return hashlib.sha256(f"{self.eot_id} {self.text}".encode()).hexdigest()

    def to_json(self) -> str:
        """The text to store with a checkpoint. `Tokenizer.from_json` reads it."""
        return self.text

    @staticmethod
    def from_json(
        text: str, name: str = "given", end_of_text: str = "", allow_lossy: bool = False
    ) -> "Tokenizer":
        """A tokenizer of the text of a tokenizer.json, or of the word "bytes".

        Args:
          name: used in messages.
          end_of_text: name of the token that ends a document; "": the first of KNOWN_END_OF_TEXT.
          allow_lossy: allows a tokenizer that changes texts.

        Raises:
          UserError: not a tokenizer, no such end-of-text token, or it changes texts.
        """
        if text.strip() == "bytes":
            eot_id = _end_of_text_id(None, name, end_of_text)
            return Tokenizer(None, 256 + len(SPECIAL_TOKENS), eot_id, 257)
        with _rust_errors(f"The tokenizer {name!r} is not a tokenizer.json"):
            _check_merges(json.loads(text))
            backend = tokenizers.Tokenizer.from_str(text)
            backend.no_padding()
            backend.no_truncation()
            backend.encode_special_tokens = True
            if isinstance(backend.model, models.BPE):
                backend.model.dropout = None  # the same text must always have the same tokens
        eot_id = _end_of_text_id(backend, name, end_of_text)
        backend.add_special_tokens([backend.id_to_token(eot_id)])  # it may be an ordinary token
        pad_id = backend.token_to_id(PADDING)
        vocab_size = max(backend.get_vocab().values()) + 1  # ids may have gaps
        if vocab_size > LARGEST_VOCABULARY:
            raise UserError(
                f"The tokenizer {name!r} has the id {vocab_size - 1:,}; ids must be below "
                f"{LARGEST_VOCABULARY:,}."
            )
        pad_id = eot_id if pad_id is None else pad_id
        found = Tokenizer(backend, vocab_size, eot_id, pad_id, text)
        with _rust_errors(f"The tokenizer {name!r} cannot encode text"):
            found = _judged(found)
        if found.loss and not allow_lossy:
            raise UserError(
                f"The tokenizer {name!r} does not give back the exact text: {found.loss}. Bits per "
                "byte would count other bytes than the text has. Use another tokenizer, or set "
                "data.allow_lossy_tokenizer=True: then they count the bytes that it gives back."
            )
        return found


def _special_tokens(backend: tokenizers.Tokenizer | None) -> dict[str, int]:
    """{name: id} of the tokens that may end a document: the added tokens of a tokenizer.json."""
    if backend is None:
        return {END_OF_TEXT: 256, PADDING: 257}
    return {token.content: i for i, token in backend.get_added_tokens_decoder().items()}


def _end_of_text_id(backend: tokenizers.Tokenizer | None, name: str, end_of_text: str) -> int:
    special = _special_tokens(backend)
    wanted = (end_of_text,) if end_of_text else KNOWN_END_OF_TEXT
    found = next((special[token] for token in wanted if token in special), None)
    if found is not None:
        return found
    names = ", ".join(list(special)[:20]) + (", ..." if len(special) > 20 else "")
    theirs = f"its special tokens are {names}" if special else "it has no special tokens"
    if end_of_text:
        raise UserError(
            f"data.end_of_text={end_of_text!r} is not a special token of the tokenizer {name!r}: "
            f"{theirs}."
        )
    raise UserError(
        f"The tokenizer {name!r} has none of the end-of-text tokens {', '.join(wanted)}; name the "
        f"one it has with data.end_of_text ({theirs})."
    )


def _check_merges(stored: Any) -> None:
    """Raises ValueError if a merge lacks the prefix that the model names. The library would remove
    as many bytes as the prefix has, and would end the process if this cuts a character."""
    model = stored.get("model") if isinstance(stored, dict) else None
    prefix = model.get("continuing_subword_prefix") if isinstance(model, dict) else None
    for merge in model.get("merges", []) if prefix else []:
        second = (merge.split(" ") if isinstance(merge, str) else merge)[-1]
        if not second.startswith(prefix):
            raise ValueError(f"the merge {merge!a} lacks the continuing_subword_prefix {prefix!a}")


@contextmanager
def _rust_errors(sentence: str) -> Iterator[None]:
    """Raises UserError for errors of the Rust library: Exception, or BaseException for a panic."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        reason = " ".join(str(error).split()).rstrip(".")[:300]
        raise UserError(f"{sentence}: {reason}.") from error


def _judged(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer, with the `loss` and `additive` that the probes show."""
    start, letter, _ = tokenizer.decode(tokenizer.encode("a")).rpartition("a")
    if start and letter:
        what = "a space" if start == " " else ascii(start)
        loss = f"it puts {what} in front of a text (add_prefix_space, or a similar step)"
        return replace(tokenizer, loss=loss, additive=False)
    stored = json.loads(tokenizer.text)
    steps = [stored.get(step) for step in ("normalizer", "pre_tokenizer", "decoder")]
    probes = PROBES | {
        "texts that look like special tokens": [
            text for name in _special_tokens(tokenizer.backend) for text in (name, f"a {name} b")
        ],
        "texts that its own rules name": [f"a{pattern}b" for pattern in _patterns(steps)],
    }
    changes, additive = [], True
    for kind, texts in probes.items():
        encoded = tokenizer.encode_batch(texts)
        back = [tokenizer.decode(ids) for ids in encoded]
        sizes = [tokenizer.token_bytes[ids].sum() for ids in encoded]
        additive &= sizes == [len(text.encode()) for text in texts]
        if back != texts:
            text, other = next(pair for pair in zip(texts, back, strict=True) if len(set(pair)) > 1)
            changes.append(f"{kind} ({_short(text)} becomes {_short(other)})")
    more = f" and {len(changes) - 2} more" if len(changes) > 2 else ""
    loss = f"it changes {', '.join(changes[:2])}{more}" if changes else ""
    return replace(tokenizer, loss=loss, additive=additive and not loss)


def _patterns(value: Any) -> Iterator[str]:
    """The literal texts in the rules of a tokenizer.json."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from [inner] if key == "String" and isinstance(inner, str) else _patterns(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _patterns(inner)


def _short(text: str) -> str:
    """A text in ASCII, as Python writes it, because some characters look the same."""
    shown = ascii(text)
    return shown if len(shown) <= 60 else f"{shown[:50]}...{shown[0]} of {len(text)} characters"


def load_tokenizer(name: str, end_of_text: str = "", allow_lossy: bool = False) -> Tokenizer:
    """The tokenizer "bytes", or that of a tokenizer.json. Arguments as in `Tokenizer.from_json`.

    Raises UserError if it cannot be read or used.
    """
    if name == "bytes":
        return Tokenizer.from_json("bytes", name, end_of_text)
    try:
        if os.path.exists(expand_path(name)) and not os.path.isfile(expand_path(name)):
            raise ValueError("it is not a file")
        text = expand_path(name).read_bytes().decode("utf-8-sig")  # without a byte-order mark
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"The tokenizer {name!r} is neither 'bytes', 'bpe' nor a readable tokenizer.json: "
            f"{reason}."
        ) from error
    return Tokenizer.from_json(text, name, end_of_text, allow_lossy)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with at most `vocab_size` tokens. It gives back every text exactly.

    The same texts in the same order give the same tokenizer. Raises UserError if vocab_size is too
    small for the 256 bytes and the special tokens.
    """
    if vocab_size < 256 + len(SPECIAL_TOKENS):
        raise UserError(
            f"data.vocab_size={vocab_size} is too small: the 256 bytes and the special tokens "
            f"{', '.join(SPECIAL_TOKENS)} need at least {256 + len(SPECIAL_TOKENS)}."
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with progress(f"Training a tokenizer with up to {vocab_size:,} entries"):
        backend.train_from_iterator(texts, trainer)
    return Tokenizer.from_json(backend.to_str(), "bpe")


def cached_bpe(texts: Iterable[str], vocab_size: int, cache_dir: Path, key: str) -> Tokenizer:
    """`train_bpe`, stored in a file bpe-*.json of cache_dir. `key` identifies the texts."""
    digest = hashlib.sha256(f"{key} {vocab_size} {PATTERN}".encode()).hexdigest()[:16]
    path = cache_dir / f"bpe-{digest}.json"
    with suppress(UserError):  # a file that a power failure has emptied is made again
        if path.is_file():
            return load_tokenizer(str(path))
    tokenizer = train_bpe(texts, vocab_size)
    scratch = cache_dir / f".tmp-{uuid.uuid4().hex}"  # another process may write the same file
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        scratch.write_text(tokenizer.to_json(), encoding="utf-8")
        os.replace(scratch, path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise cache_error(cache_dir, error) from error
    return tokenizer


def cache_error(cache_dir: Path, error: OSError) -> UserError:
    return UserError(
        f"The data cache could not be written to '{cache_dir}': {error.strerror or error}. Free "
        "some space or set data.cache_dir to another directory."
    )
