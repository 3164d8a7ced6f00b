"""Tokenizers give back every text exactly and know how many bytes each token stands for."""

import dataclasses
import json

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from yocou_jax.data.tokenizer import Tokenizer, cached_bpe, load_tokenizer, train_bpe
from yocou_jax.errors import UserError

CODE = 'class A:\n    def f(self, x_1):\n        return self.g("a b", x_1) + 1234567\n\n' * 20
AWKWARD = [
    "",
    " ",
    "\n\n  \n\tx\r\n\r y  \n",
    "naïve 日本 🙂 e\u0301 \u00a0 \u2028 नमस्ते",
    "a<|endoftext|>b<|pad|>",
    "\x00\x01\ufeff tail ",
    "    four\n        eight  # comment   \n",
    CODE,
]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([CODE, "naïve text, twice. " * 10], 400)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request):
    return load_tokenizer("bytes") if request.param == "bytes" else request.getfixturevalue("bpe")


@pytest.mark.parametrize("text", AWKWARD)
def test_round_trip_and_token_bytes(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert not {tokenizer.eot_id, tokenizer.pad_id} & set(ids)
    assert max(ids, default=0) < tokenizer.vocab_size


def test_special_tokens_decode_to_nothing(tokenizer):
    ids = [tokenizer.eot_id, *tokenizer.encode("a b"), tokenizer.eot_id, tokenizer.pad_id]
    assert tokenizer.decode(np.array(ids)) == "a b"
    assert tokenizer.token_bytes[[tokenizer.eot_id, tokenizer.pad_id]].tolist() == [0, 0]


def test_encode_batch_is_encode_of_each(tokenizer):
    for text, ids in zip(AWKWARD, tokenizer.encode_batch(AWKWARD), strict=True):
        assert ids.tolist() == tokenizer.encode(text)


def test_bpe_is_deterministic_compresses_and_keeps_indentation_in_one_token(bpe):
    again = train_bpe([CODE, "naïve text, twice. " * 10], 400)
    assert again.fingerprint == bpe.fingerprint
    assert len(bpe.encode(CODE)) < len(CODE) / 3
    assert bpe.vocab_size <= 400
    tokens = [bpe.decode([i]) for i in range(bpe.vocab_size)]
    assert "):\n        " in tokens
    # A unit of the pattern is the widest a token can be: no token runs over two words.
    assert not [t for t in tokens if " " in t.strip()]


def test_json_round_trip(tokenizer):
    copy = Tokenizer.from_json(tokenizer.to_json())
    assert copy.fingerprint == tokenizer.fingerprint
    assert copy.encode(CODE) == tokenizer.encode(CODE)


def test_fingerprints_differ(bpe):
    other = train_bpe([CODE], 300)
    assert len({load_tokenizer("bytes").fingerprint, bpe.fingerprint, other.fingerprint}) == 3


def test_cached_bpe_trains_once_and_again_for_other_text(tmp_path):
    first = cached_bpe([CODE], 300, tmp_path / "new", "key")
    assert cached_bpe(iter(()), 300, tmp_path / "new", "key").fingerprint == first.fingerprint
    assert cached_bpe([CODE], 280, tmp_path / "new", "key").fingerprint != first.fingerprint
    assert cached_bpe(["other"], 300, tmp_path / "new", "key 2").fingerprint != first.fingerprint
    assert len(list((tmp_path / "new").iterdir())) == 3


def test_tokenizer_json_of_a_byte_fallback_kind(tmp_path):
    """The SentencePiece style of Gemma: U+2581 for a space, <0x..> for bytes, another eot."""
    vocab = {"<eos>": 0, "<unk>": 1} | {f"<0x{i:02X}>": 2 + i for i in range(256)} | {"▁": 258}
    backend = Backend(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<eos>", "<unk>"])
    backend.save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(str(tmp_path / "t.json"))
    assert (tokenizer.eot_id, tokenizer.pad_id, tokenizer.vocab_size) == (0, 0, 259)
    for text in AWKWARD:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_vocabulary_smaller_than_the_special_tokens():
    with pytest.raises(UserError, match=r"data.vocab_size=257 is too small.*at least 258"):
        train_bpe([CODE], 257)
    assert train_bpe([CODE], 258).vocab_size == 258


def test_bad_tokenizer_files(tmp_path, bpe):
    with pytest.raises(UserError, match=r"neither 'bytes', 'bpe' nor a readable tokenizer.json"):
        load_tokenizer(str(tmp_path / "missing.json"))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not a tokenizer\.json"):
        load_tokenizer(str(tmp_path / "bad.json"))
    no_eot = json.loads(bpe.to_json())
    no_eot["added_tokens"] = []
    no_eot["model"]["vocab"] = {
        t.replace("<|endoftext|>", "other"): i for t, i in no_eot["model"]["vocab"].items()
    }
    (tmp_path / "no_eot.json").write_text(json.dumps(no_eot))
    with pytest.raises(UserError, match="has none of the end-of-text tokens"):
        load_tokenizer(str(tmp_path / "no_eot.json"))
    lossy = Backend.from_str(bpe.to_json())
    lossy.normalizer = normalizers.Lowercase()
    lossy.pre_tokenizer = pre_tokenizers.Whitespace()
    lossy.save(str(tmp_path / "lossy.json"))
    with pytest.raises(UserError, match="does not give back the exact text"):
        load_tokenizer(str(tmp_path / "lossy.json"))


def test_tokenizer_is_frozen(bpe):
    with pytest.raises(dataclasses.FrozenInstanceError):
        bpe.eot_id = 5
