"""Tokenizers decode every text exactly, and know the number of bytes of each token."""

import dataclasses
import json
import logging
import random
import threading
import time

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from tests import tiny
from yocou_jax import progress
from yocou_jax.data import load_data
from yocou_jax.data.tokenizer import (
    KNOWN_END_OF_TEXT,
    Tokenizer,
    cached_bpe,
    load_tokenizer,
    train_bpe,
)
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
    # A token is at most one unit of the pattern, so no token contains two words.
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
    """Like SentencePiece in Gemma: U+2581 for a space, <0x..> for bytes, another end of text."""
    vocab = {"<eos>": 0, "<unk>": 1} | {f"<0x{i:02X}>": 2 + i for i in range(256)} | {"▁": 258}
    backend = Backend(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<eos>", "<unk>"])
    backend.save(str(tmp_path / "t.json"))
    with pytest.raises(
        UserError, match=r"it changes the character U\+2581 \('a.u2581b' becomes 'a b'"
    ):
        load_tokenizer(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(str(tmp_path / "t.json"), allow_lossy=True)
    assert (tokenizer.eot_id, tokenizer.pad_id, tokenizer.vocab_size) == (0, 0, 259)
    for text in AWKWARD:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
        assert tokenizer.num_bytes(ids) == len(text.encode())
    assert tokenizer.num_bytes(tokenizer.encode("\u2581x")) == len(b" x")


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
    (tmp_path / "binary.json").write_bytes(b"\x1f\x8b\xff")
    for path in (tmp_path, tmp_path / "binary.json", "", "a\0b", "~no-such-user/t.json"):
        with pytest.raises(UserError, match=r"neither 'bytes', 'bpe' nor a readable .*\.$"):
            load_tokenizer(str(path))


def test_a_path_with_a_tilde_and_a_byte_order_mark(tmp_path, monkeypatch, bpe):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "t.json").write_bytes(b"\xef\xbb\xbf" + bpe.to_json().encode())
    assert load_tokenizer("~/t.json").fingerprint == bpe.fingerprint


def test_tokenizer_is_frozen(bpe):
    with pytest.raises(dataclasses.FrozenInstanceError):
        bpe.eot_id = 5


def test_the_text_of_the_file_is_kept_and_not_written_again(tmp_path, bpe):
    spaced = json.dumps(json.loads(bpe.to_json()), indent=4)
    (tmp_path / "t.json").write_text(spaced, encoding="utf-8")
    tokenizer = load_tokenizer(str(tmp_path / "t.json"))
    assert tokenizer.to_json() == spaced
    assert tokenizer.encode(CODE) == bpe.encode(CODE)


# --- Texts of one word ----------------------------------------------------------------------------

LETTERS = random.Random(0)
ONE_WORD = {
    "letters": "".join(LETTERS.choices("ACGT", k=100_000)),
    "letters and digits": "".join(LETTERS.choices("ACGT01_", k=100_000)),
    "capitals of four bytes": "".join(LETTERS.choices("𝒜𝒞𝒢𝒯", k=100_000)),
    "symbols": "".join(LETTERS.choices("=-+*", k=100_000)),
    "spaces": " " * 100_000,
    "tabs and spaces": "".join(LETTERS.choices(" \t", k=100_000)),
    "newlines": "\n" * 100_000,
    "an indentation": "\n" + " " * 100_000 + "x",
    "spaces before a newline": " " * 100_000 + "\nx",
    "symbols and an indentation": "):\n" + "".join(LETTERS.choices(" \t", k=100_000)),
    "accents": "a" + "\u0301" * 100_000,
    "no character at all": "\ufffd" * 100_000,
}


@pytest.mark.parametrize("text", ONE_WORD.values(), ids=ONE_WORD)
def test_one_long_word_is_cut_into_units(text):
    tokenizer = train_bpe([text], 300)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    units = tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)
    assert "".join(text[begin:end] for _, (begin, end) in units) == text
    assert max(end - begin for _, (begin, end) in units) <= 1 + 64 + 1 + 64


def test_units_of_ordinary_text_are_not_cut(bpe):
    pieces = bpe.backend.pre_tokenizer.pre_tokenize_str(f"{'x' * 64} {'=' * 60}\n{' ' * 60}y")
    assert [end - begin for _, (begin, end) in pieces] == [64, 1 + 60 + 1 + 60, 1]


def test_slow_training_reports_its_progress(monkeypatch, caplog):
    monkeypatch.setattr(progress, "SECONDS", 0.01)
    caplog.set_level(logging.INFO, logger="yocou_jax")

    def slow():
        """Texts that come only after two lines were logged."""
        yield CODE
        deadline = time.monotonic() + 60
        while len(caplog.records) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    train_bpe(slow(), 400)
    lines = [record.getMessage() for record in caplog.records]
    assert all(line.startswith("Training a tokenizer with up to 400 entries: ") for line in lines)
    assert "progress" not in [thread.name for thread in threading.enumerate()]


# --- Tokenizers that change the text --------------------------------------------------------------


def changed(bpe, **parts) -> str:
    """The JSON of `bpe` with another normalizer, pre_tokenizer, decoder or post_processor."""
    backend = Backend.from_str(bpe.to_json())
    for name, part in parts.items():
        setattr(backend, name, part)
    return backend.to_str()


bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
LOSSES = {
    "lower case": ("normalizer", normalizers.Lowercase(), "capital letters ('A Bc DEF' becomes"),
    "NFC": ("normalizer", normalizers.NFC(), r"('e\u0301' becomes '\xe9')"),
    "NFD": ("normalizer", normalizers.NFD(), "accents ("),
    "NFKC": ("normalizer", normalizers.NFKC(), "accents that are characters of their own"),
    "only ligatures": ("normalizer", normalizers.Replace("ﬁ", "fi"), r"('\ufb01' becomes 'fi')"),
    "no accents": ("normalizer", normalizers.StripAccents(), r"('e\u0301' becomes 'e')"),
    "strip": ("normalizer", normalizers.Strip(), "spaces at the start (' a' becomes 'a')"),
    "strip right": (
        "normalizer",
        normalizers.Strip(left=False),
        "spaces at the end ('a ' becomes 'a')",
    ),
    "double spaces": ("normalizer", normalizers.Replace("  ", " "), "double spaces ("),
    "tabs": ("normalizer", normalizers.Replace("\t", "    "), r"tabs ('a\tb\t\tc' becomes"),
    "line ends": ("normalizer", normalizers.Replace("\r\n", "\n"), "line ends ("),
    "NUL": ("normalizer", normalizers.Replace("\0", ""), "control characters ("),
    "joiners": ("normalizer", normalizers.Replace("\u200d", ""), "invisible characters ("),
    "invalid bytes": ("normalizer", normalizers.Replace("\ufffd", "?"), "sign for invalid bytes ("),
    "U+2581": ("normalizer", normalizers.Replace("\u2581", " "), "the character U+2581 ("),
    "quotes": ("normalizer", normalizers.Replace("``", '"'), "quotation marks and dashes ("),
    "a word of its own": ("normalizer", normalizers.Replace("colour", "color"), "'acolourb'"),
    "sentence's end": ("normalizer", normalizers.Replace("<|endoftext|>", "x"), "special tokens ("),
    "prefix": ("normalizer", normalizers.Prepend("_"), "it puts '_' in front of a text"),
    "add_prefix_space": (
        "pre_tokenizer",
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        "it puts a space in front of a text (add_prefix_space",
    ),
    "spaces": (
        "pre_tokenizer",
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), bytes_only]),
        "single spaces ('a b c' becomes 'abc')",
    ),
    "removed words": (
        "pre_tokenizer",
        pre_tokenizers.Sequence([pre_tokenizers.Split("qz", "removed"), bytes_only]),
        "('aqzb' becomes 'ab')",
    ),
    "a decoder": (
        "decoder",
        decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)]),
        "spaces at the start (",
    ),
}


@pytest.mark.parametrize(("part", "step", "words"), LOSSES.values(), ids=LOSSES)
def test_the_sentence_names_what_a_tokenizer_changes(bpe, part, step, words):
    text = changed(bpe, **{part: step})
    with pytest.raises(UserError) as error:
        Tokenizer.from_json(text, "theirs")
    sentence = str(error.value)
    assert sentence.startswith("The tokenizer 'theirs' does not give back the exact text: it ")
    assert words in sentence
    assert "data.allow_lossy_tokenizer=True" in sentence
    assert "\n" not in sentence
    allowed = Tokenizer.from_json(text, allow_lossy=True)
    assert allowed.loss
    for text in ("A  É e\u0301 ﬁ\t\r\n", " x ", "colour``"):
        ids = allowed.encode(text)
        assert allowed.num_bytes(ids) == len(allowed.decode(ids).encode())


def test_a_tokenizer_that_only_counts_more_bytes_is_allowed(bpe):
    """A prefix is added and removed again: no text is lost, but token 0 has one byte too many."""
    steps = [decoders.ByteLevel(), decoders.Strip("_", 1, 0)]
    text = changed(bpe, normalizer=normalizers.Prepend("_"), decoder=decoders.Sequence(steps))
    tokenizer = Tokenizer.from_json(text)
    assert (tokenizer.loss, tokenizer.additive) == ("", False)
    ids = tokenizer.encode("naïve")
    assert (tokenizer.decode(ids), tokenizer.num_bytes(ids)) == ("naïve", 6)
    two = [tokenizer.eot_id, *ids, tokenizer.eot_id, *ids]
    assert tokenizer.num_bytes(np.array(two)) == 12  # the prefix of the second is removed too


def test_bytes_of_decoded_text_are_counted_per_document(bpe):
    text = changed(bpe, normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.Strip()]))
    tokenizer = Tokenizer.from_json(text, allow_lossy=True)
    one, two = tokenizer.encode(" e\u0301 "), tokenizer.encode("ab  ")
    joined = [tokenizer.eot_id, *one, tokenizer.eot_id, *two, tokenizer.pad_id]
    assert tokenizer.num_bytes(np.array(joined)) == len("éab".encode())
    assert tokenizer.num_bytes(np.array([], np.int64)) == 0


def test_bytes_of_a_lossless_tokenizer_need_no_decoding(tokenizer, monkeypatch):
    assert (tokenizer.loss, tokenizer.additive) == ("", True)
    monkeypatch.setattr(Tokenizer, "decode", None)
    ids = [tokenizer.eot_id, *tokenizer.encode("naïve 🙂"), tokenizer.eot_id]
    assert tokenizer.num_bytes(np.array(ids)) == len("naïve 🙂".encode())


def test_added_tokens_that_occur_in_a_text_are_text(bpe):
    backend = Backend.from_str(bpe.to_json())
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    tokenizer = Tokenizer.from_json(backend.to_str())
    assert tokenizer.encode("a<tool>b") != bpe.encode("a<tool>b")
    assert tokenizer.num_bytes(tokenizer.encode("a<tool>b")) == 8
    backend.add_tokens([AddedToken("<greedy>", normalized=False, lstrip=True)])
    with pytest.raises(UserError, match=r"special tokens .'a <greedy> b' becomes 'a<greedy> b'"):
        Tokenizer.from_json(backend.to_str())


def test_truncation_padding_and_post_processing_of_the_file_are_off(bpe):
    backend = Backend.from_str(bpe.to_json())
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    backend.post_processor = processors.TemplateProcessing(
        "$A <|pad|>", special_tokens=[("<|pad|>", bpe.pad_id)]
    )
    tokenizer = Tokenizer.from_json(backend.to_str())
    assert tokenizer.encode(CODE) == bpe.encode(CODE)
    assert tokenizer.encode("a") == bpe.encode("a")


# --- The token that ends a text -------------------------------------------------------------------


def with_specials(bpe, *names) -> str:
    backend = Backend.from_str(bpe.to_json().replace("<|endoftext|>", "<|other|>"))
    backend.add_special_tokens(list(names))
    return backend.to_str()


@pytest.mark.parametrize("name", KNOWN_END_OF_TEXT)
def test_usual_names_are_found(bpe, name):
    tokenizer = Tokenizer.from_json(with_specials(bpe, "<a>", name, "<b>"))
    assert tokenizer.end_of_text == name
    assert tokenizer.backend.token_to_id(name) == tokenizer.eot_id


@pytest.mark.parametrize("name", ["<｜end▁of▁sentence｜>", "[EOS]", "<|im_end|>"])
def test_names_of_deepseek_and_others_are_known(name):
    assert name in KNOWN_END_OF_TEXT


def test_the_given_name_of_the_end_of_text_is_used(bpe):
    text = with_specials(bpe, "</s>", "<fin>", "<|im_end|>")
    usual, fin, im = (Tokenizer.from_json(text, "t", name) for name in ("", "<fin>", "<|im_end|>"))
    assert [t.end_of_text for t in (usual, fin, im)] == ["</s>", "<fin>", "<|im_end|>"]
    assert len({t.fingerprint for t in (usual, fin, im)}) == 3
    assert len({t.eot_id for t in (usual, fin, im)}) == 3
    assert {t.to_json() for t in (usual, fin, im)} == {text}


def test_a_name_that_does_not_exist(tmp_path, bpe, tokenizer):
    (tmp_path / "t.json").write_text(with_specials(bpe, "<fin>"), encoding="utf-8")
    path = str(tmp_path / "t.json")
    assert load_tokenizer(path, "<fin>").end_of_text == "<fin>"
    theirs = r"its special tokens are <\|other\|>, <\|pad\|>, <fin>"
    with pytest.raises(UserError, match=rf"data\.end_of_text='<end>' is not a .*: {theirs}\.$"):
        load_tokenizer(path, "<end>")
    with pytest.raises(UserError, match=rf"none of the end.*data\.end_of_text \({theirs}\)\.$"):
        load_tokenizer(path)
    for name in ("x", "[EOS]"):  # an ordinary token, and a text that is not a token
        with pytest.raises(UserError, match=r"is not a special token of the tokenizer 't'"):
            Tokenizer.from_json(tokenizer.to_json(), "t", name)
    again = Tokenizer.from_json(tokenizer.to_json(), "t", "<|endoftext|>")
    assert again.fingerprint == tokenizer.fingerprint
    assert tokenizer.end_of_text == "<|endoftext|>"


def test_many_special_tokens_are_not_all_listed(bpe):
    text = with_specials(bpe, *(f"<reserved_{i}>" for i in range(200)))
    with pytest.raises(UserError, match=r"<reserved_17>, \.\.\.\)\.$"):
        Tokenizer.from_json(text)


def test_an_end_of_text_that_was_no_special_token_becomes_one(bpe):
    backend = Backend.from_str(bpe.to_json())
    backend.add_tokens([AddedToken("<fin>", normalized=False)])
    tokenizer = Tokenizer.from_json(backend.to_str(), "t", "<fin>")
    assert tokenizer.eot_id not in tokenizer.encode("a<fin>b")
    assert tokenizer.decode([tokenizer.eot_id, *tokenizer.encode("a<fin>b")]) == "a<fin>b"
    assert tokenizer.token_bytes[tokenizer.eot_id] == 0


# --- Files that are not tokenizers ----------------------------------------------------------------


def parts(value, path=()):
    """The path of every entry in nested dicts and lists."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in pairs:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from parts(inner, (*path, key))


def mutated(bpe, seed) -> str:
    """A good tokenizer.json in which one entry is missing or has another value."""
    rng, tree = random.Random(seed), json.loads(bpe.to_json())
    wrong = [None, -1, 2**24, 2**40, 1.5, "", "x", [], {}, True, {"type": "Lowercase"}]
    wrong += [{"String": ""}, {"Regex": "("}, {"type": "Metaspace", "replacement": "_"}]
    *path, last = rng.choice([p for p in parts(tree) if not {"vocab", "merges"} & set(p[:-1])])
    holder = tree
    for key in path:
        holder = holder[key]
    holder[last] = rng.choice(wrong)
    if rng.random() < 0.3:
        del holder[last]
    return json.dumps(tree)


def test_no_damaged_file_gives_a_stack_trace(bpe):
    sentences, good = [], 0
    for seed in range(300):
        try:
            tokenizer = Tokenizer.from_json(mutated(bpe, seed), "theirs", allow_lossy=seed % 2 == 0)
        except UserError as error:
            sentences.append(str(error))
            continue
        good += 1
        ids = tokenizer.encode(CODE)
        assert tokenizer.num_bytes(ids) == len(tokenizer.decode(ids).encode())
        assert tokenizer.loss or tokenizer.decode(ids) == CODE
    assert 10 < good < 150
    for sentence in sentences:
        assert sentence.startswith("The tokenizer 'theirs' ")
        assert sentence.endswith(".")
        assert "\n" not in sentence


# --- In the data of a run -------------------------------------------------------------------------


def test_data_counts_the_bytes_of_decoded_text(tmp_path, bpe, corpus, make_config):
    (tmp_path / "t.json").write_text(
        changed(bpe, normalizer=normalizers.Replace("naïve", "n")), "utf-8"
    )
    options = {"tokenizer": str(tmp_path / "t.json"), "vocab_size": 500}
    with pytest.raises(UserError, match="texts that its own rules name"):
        load_data(make_config(**options))
    data = load_data(make_config(**options, allow_lossy_tokenizer=True))
    returned = sum(len(t.replace("naïve", "n").encode()) for t in corpus.texts.values())
    assert data.num_bytes < returned < sum(len(t.encode()) for t in corpus.texts.values())
    targets = [sequences[i].targets for sequences, i in data.validation.rows]
    assert data.validation.num_bytes == sum(data.tokenizer.num_bytes(row) for row in targets)
    exact = load_data(make_config())
    assert data.num_bytes < exact.num_bytes


def test_data_has_the_end_of_text_that_was_asked_for(tmp_path, bpe, make_config):
    (tmp_path / "t.json").write_text(with_specials(bpe, "</s>", "<fin>"), "utf-8")
    options = {"tokenizer": str(tmp_path / "t.json"), "vocab_size": 500}
    usual = load_data(make_config(**options))
    named = load_data(make_config(**options, end_of_text="<fin>"))
    first = [int(d.stream[0].tokens.max()) for d in (usual, named)]
    assert [d.tokenizer.end_of_text for d in (usual, named)] == ["</s>", "<fin>"]
    assert first == [usual.tokenizer.eot_id, named.tokenizer.eot_id]
    assert usual.fingerprint != named.fingerprint
    assert usual.num_bytes == named.num_bytes
    for kind in ("bytes", "bpe"):
        with pytest.raises(UserError, match=r"data\.end_of_text='<fin>' is not a special token"):
            load_data(make_config(tokenizer=kind, end_of_text="<fin>"))
        load_data(make_config(tokenizer=kind, end_of_text="<|endoftext|>"))


def test_a_change_that_no_probe_shows_is_found_while_tokenizing(bpe, tmp_path):
    """A rule with a regular expression that does not match ordinary text."""
    rule = normalizers.Replace(Regex(r"\d{12,}"), "#")
    (tmp_path / "tokenizer.json").write_text(changed(bpe, normalizer=rule))
    assert load_tokenizer(str(tmp_path / "tokenizer.json")).loss == ""
    (tmp_path / "x.txt").write_text("a line\n" * 3000 + "1234567890123\n" + "a line\n" * 3000)
    fields = {"source": str(tmp_path / "x.txt"), "tokenizer": str(tmp_path / "tokenizer.json")}
    fields |= {"cache_dir": str(tmp_path / "cache"), "batch_size": 2}
    with pytest.raises(UserError, match="does not give back the exact text of the document"):
        load_data(tiny.config(data=fields).data)
    assert load_data(tiny.config(data=fields | {"allow_lossy_tokenizer": True}).data)
    with pytest.raises(UserError, match="does not give back the exact text of the document"):
        load_data(tiny.config(data=fields).data)  # the cache does not change the result


def test_dropout_of_a_tokenizer_is_off(bpe):
    """With dropout, the same text would have other tokens each time."""
    stored = json.loads(bpe.to_json())
    stored["model"]["dropout"] = 0.5
    dropping = Tokenizer.from_json(json.dumps(stored))
    assert all(dropping.encode(CODE) == bpe.encode(CODE) for _ in range(3))
