"""Random data files: the documents that are loaded are right, or one sentence says why not.

    python -m tests.data.fuzz_files --seed=0 --count=2000

A case writes documents to a folder, as text, JSON, parquet or with a tokenizer.json, in one of many
forms that mean the same. Then it may damage a file. It passes if `load_data`

* gives exactly the documents of the case (for a damaged file: what an independent reader gets from
  its bytes, and never markup or compressed bytes), or
* raises UserError with one sentence, only for damaged files,

within 20 s and without any other exception. Exits with 1 if a case fails. `--only=N` runs one case.
"""

import argparse
import bz2
import collections
import contextlib
import dataclasses
import functools
import gzip
import importlib.util
import json
import lzma
import random
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from yocou_jax.data import load_data
from yocou_jax.data.sources import open_corpus
from yocou_jax.data.tokenizer import train_bpe
from yocou_jax.errors import UserError

SECONDS = 20
BOM = b"\xef\xbb\xbf"
WORDS = ["the", "naïve", "straße", "日本語", "🙂", "x=1;", "f(x)", *"{}[]\"':,\\#é"]
COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": functools.partial(lzma.compress, preset=0),  # the others take 100 MB
}
DECOMPRESS = [gzip.decompress, bz2.decompress, lzma.decompress]
if importlib.util.find_spec("zstandard"):
    import zstandard

    def unzstd(content: bytes) -> bytes:
        """All frames of zstd data. A decompressor alone would stop after the first one."""
        with zstandard.ZstdDecompressor().stream_reader(content, read_across_frames=True) as file:
            return file.read()

    COMPRESS[".zst"] = zstandard.ZstdCompressor(write_checksum=True).compress
    DECOMPRESS.append(unzstd)
PARQUET = importlib.util.find_spec("pyarrow") is not None
BAD_VALUES = ["null", "5", "-1e9", "true", "[]", '["text"]', "{}", '{"text": "inner"}']


@dataclasses.dataclass
class Case:
    """Files in a folder, and the documents in them. None: `reading` decides."""

    folder: Path
    source: str
    expected: list[str] | None
    bad_rows: str = "refuse"
    skipped: int = 0
    tokenizer: str = "bytes"
    may_refuse: bool = False  # there are damaged files, or too few files
    reading: Callable[[], list[str]] = list  # for damaged files that can be loaded


# --- Files with documents ----------------------------------------------------------------------


def random_texts(rng: random.Random, count: int) -> list[str]:
    """Different documents of 12 to about 300 characters."""
    ends = ["\n", "\r\n", "\r", " ", ""]
    texts = []
    for i in range(count):
        end = rng.choice(ends)
        words = rng.choices([*WORDS, end], k=rng.randint(3, 60))
        texts.append(f"document {i} {' '.join(words)}")
    return texts


def compressed(rng: random.Random, name: str, content: bytes) -> tuple[str, bytes]:
    """A name and bytes for the content: unchanged, or compressed with or without a suffix."""
    suffix = rng.choice(["", *COMPRESS])
    if suffix:
        cut = rng.choice([0, rng.randrange(len(content) + 1)])
        members = [content[:cut], content[cut:]] if cut else [content]
        content = b"".join(map(COMPRESS[suffix], members))
        if rng.random() < 0.05:
            content = gzip.compress(content)
    suffix = rng.choice([suffix, suffix, suffix.upper(), ""])
    return name + suffix, content


def text_files(rng: random.Random, folder: Path) -> Case:
    texts = random_texts(rng, rng.randint(8, 30))
    suffix = rng.choice([".txt", ".TXT", ".md", ".py", ""])
    for i, text in enumerate(texts):
        content = rng.choice([b"", b"", BOM]) + text.encode()
        name, content = compressed(rng, f"{i:03}{suffix}", content)
        (folder / name).write_bytes(content)
    return Case(folder, f"{folder}/*", texts)


def one_text_file(rng: random.Random, folder: Path) -> Case:
    kind = rng.choice(["lines", "one line", "one character", "CR"])
    lines = random_texts(rng, rng.choice([10, 100, 400]))
    text = {
        "lines": "\n".join(lines),
        "one line": re.sub(r"[\r\n]", " ", " ".join(lines)),
        "one character": rng.choice("xé日🙂") * 200_000,
        "CR": re.sub(r"[\r\n]+", "\r", "\r".join(lines)),
    }[kind]
    name, content = compressed(rng, rng.choice(["book.txt", "BOOK", "a + b.txt"]), text.encode())
    (folder / name).write_bytes(content)
    case = Case(folder, f"{folder}/{name}", [text])
    if kind == "one character":  # its pieces are equal, and copies are left out
        case = dataclasses.replace(case, expected=None, may_refuse=True, reading=lambda: [text])
    return case


def a_row(rng: random.Random, text: str) -> dict[str, Any]:
    fields = [("text", text), ("id", rng.random()), ("meta", {"text": "inner", "n": [1, None]})]
    return dict(rng.sample(fields, 3) if rng.random() < 0.5 else fields[:1])


def json_rows(rng: random.Random, folder: Path) -> Case:
    texts = random_texts(rng, rng.randint(8, 30))
    ascii_only = rng.random() < 0.5
    rows = [json.dumps(a_row(rng, text), ensure_ascii=ascii_only) for text in texts]
    bad_rows, skipped = "refuse", 0
    if rng.random() < 0.3:
        bad_rows, skipped = "skip", rng.randint(1, 4)
        for _ in range(skipped):
            value = rng.choice(BAD_VALUES)
            bad = rng.choice(['{"body": "b"}', f'{{"text": {value}}}'])
            rows.insert(rng.randint(1, len(rows)), bad)
    layout = rng.choice(["lines", "lines", "array", "indented", "joined"])
    newline = rng.choice(["\n", "\r\n", "\n\n", "\r"])
    content = {
        "lines": newline.join(rows) + rng.choice(["", newline]),
        "array": f"[{','.join(rows)}]",
        "indented": json.dumps([json.loads(row) for row in rows], indent=rng.choice([None, 0, 2])),
        "joined": "".join(rows),
    }[layout].encode()
    content = rng.choice([b"", b"", BOM, b"\n "]) + content
    suffix = rng.choice([".jsonl", ".json", ".ndjson", ".JSONL", ".json.00001", ".txt", ""])
    name, content = compressed(rng, f"data{suffix}", content)
    (folder / name).write_bytes(content)
    return Case(folder, f"{folder}/{name}", texts, bad_rows, skipped)


def json_files(rng: random.Random, folder: Path) -> Case:
    """One object per file."""
    texts = random_texts(rng, rng.randint(8, 20))
    for i, text in enumerate(texts):
        content = json.dumps(a_row(rng, text), indent=rng.choice([None, 2])).encode()
        name, content = compressed(rng, f"{i:03}{rng.choice(['.json', '.JSON'])}", content)
        (folder / name).write_bytes(content)
    return Case(folder, f"{folder}/*", texts)


def parquet(rng: random.Random, folder: Path) -> Case:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = random_texts(rng, rng.randint(8, 30))
    rows: list[str | None] = list(texts)
    skipped = rng.choice([0, 0, 2])
    for _ in range(skipped):
        rows.insert(rng.randrange(len(rows)), None)
    column = pa.array(rows, rng.choice([pa.string(), pa.large_string()]))
    column = column.dictionary_encode() if rng.random() < 0.3 else column
    table = pa.table({"id": list(range(len(rows))), "text": column})
    name = rng.choice(["x.parquet", "X.PARQUET", "x", "x.jsonl", "x.txt"])
    pq.write_table(
        table, folder / name, row_group_size=rng.choice([3, 1000]), write_page_checksum=True
    )
    return Case(folder, f"{folder}/{name}", texts, "skip" if skipped else "refuse", skipped)


KINDS = [text_files, one_text_file, json_rows, json_rows, json_files, *[parquet] * PARQUET]


# --- Damage ------------------------------------------------------------------------------------


def damaged_bytes(rng: random.Random, content: bytes) -> bytes:
    at, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    flipped = bytearray(content or b"x")
    for _ in range(rng.choice([1, 1, 3, 20])):
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return rng.choice(
        [
            bytes(flipped),
            content[:at],
            content[at:],
            content[:at] + content[end:],
            content[:at] + b"\0" * rng.choice([1, 50]) + content[at:],
            content[:at] + rng.randbytes(rng.choice([1, 50, 2000])) + content[at:],
            content[:at] + rng.choice([b"\n", b"\r", b"{", b"}", b"[", b'"', BOM]) + content[at:],
            content + content[at:],
            b"",
        ]
    )


def damage(rng: random.Random, case: Case) -> Case:
    """Damages one file, or gives it a wrong name."""
    path = rng.choice(sorted(case.folder.iterdir()))
    meant = case.expected or case.reading()
    if rng.random() < 0.2 and len(list(case.folder.iterdir())) == 1:
        suffix = rng.choice([".parquet", ".gz", ".jsonl", ".json", ".bz2", ".ZST"])
        new = path.rename(path.with_name(f"x{suffix}"))
        case = dataclasses.replace(case, source=str(new), may_refuse=True, expected=None)
        return dataclasses.replace(case, reading=lambda: [*meant, "".join(meant)])
    content = path.read_bytes()
    packed = decompressed(content) != content
    # Compressed data without a suffix is recognized only by its beginning.
    kept = 10 if packed and path.suffix.lower() not in COMPRESS else 0
    path.write_bytes(content[:kept] + damaged_bytes(rng, content[kept:]))

    def reading() -> list[str]:
        now = path.read_bytes()
        texts = [] if packed and decompressed(now) == now else plain_reading(now)
        return [*meant, *texts, *plain_reading(content)]

    return dataclasses.replace(case, may_refuse=True, expected=None, reading=reading)


def plain_reading(content: bytes) -> list[str]:
    """All texts that the bytes of a file may mean, read in the simplest way, and the whole."""
    content = decompressed(content)
    if b"PAR1" in content:
        return []
    whole = content.decode("utf-8", "replace")
    texts = [] if re.match(r'[\s\ufeff\[]*\{\s*"', whole) else [whole.removeprefix("\ufeff")]
    for piece in re.finditer(r'"text"\s*:\s*("(?:[^"\\]|\\.)*")', whole, re.DOTALL):
        with contextlib.suppress(ValueError):
            texts.append(json.loads(piece[1], strict=False))
    # Half of a surrogate pair is not a character, so it becomes U+FFFD.
    return [re.sub("[\ud800-\udfff]", "\ufffd", text) for text in texts]


def decompressed(content: bytes) -> bytes:
    for decompress in DECOMPRESS if content else []:
        with contextlib.suppress(Exception):  # another compression, or damaged
            return decompressed(decompress(content))
    return content


# --- Tokenizers --------------------------------------------------------------------------------


def tokenizer_file(rng: random.Random, folder: Path) -> Case:
    """Text files, and a tokenizer.json with damage in its text or its values."""
    texts = random_texts(rng, rng.randint(8, 30))
    for i, text in enumerate(texts):
        (folder / f"{i:03}.txt").write_bytes(text.encode())
    stored = json.loads(train_bpe(texts, 300).to_json())
    for _ in range(rng.choice([0, 1, 1, 3])):
        change_json(rng, stored)
    content = json.dumps(stored).encode()
    content = rng.choice([content, content, BOM + content, damaged_bytes(rng, content)])
    (folder / "tokenizer.json").write_bytes(content)
    source, tokenizer = f"{folder}/*.txt", f"{folder}/tokenizer.json"
    return Case(folder, source, texts, tokenizer=tokenizer, may_refuse=True)


def change_json(rng: random.Random, value: Any) -> None:
    """Changes a random entry of nested dicts and lists."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    if not keys:
        return
    key = rng.choice(keys)
    if isinstance(value[key], dict | list) and rng.random() < 0.8:
        change_json(rng, value[key])
    elif rng.random() < 0.3:
        del value[key]
    else:
        value[key] = rng.choice([None, -1, 0, 10**12, 1.5, "", "x", [], {}, True, "Lowercase"])


# --- Running a case ----------------------------------------------------------------------------


def make_case(seed: int, number: int, folder: Path) -> tuple[str, Case]:
    rng = random.Random(f"{seed} {number}")
    if rng.random() < 0.1:
        return "tokenizer.json", tokenizer_file(rng, folder)
    kind = rng.choice(KINDS)
    case = kind(rng, folder)
    if rng.random() < 0.5:
        return f"{kind.__name__}, damaged", damage(rng, case)
    return kind.__name__, case


def loaded(case: Case) -> tuple[list[str], int]:
    """The whole documents as `load_data` wrote them, and the number of rows left out."""
    config = SimpleNamespace(
        source=case.source,
        text_field="text",
        bad_rows=case.bad_rows,
        tokenizer=case.tokenizer,
        end_of_text="",
        allow_lossy_tokenizer=False,
        vocab_size=300,
        packing=False,
        batch_size=1,
        sequence_length=4,
        validation_fraction=0.1,
        validation_sequences=4,
        seed=0,
        cache_dir=f"{case.folder}-cache",
        verify=False,
    )
    bundle = load_data(config)
    documents = [d.text for d in open_corpus(case.source, "text", case.bad_rows).documents()]
    (cache,) = Path(config.cache_dir).glob("tokens-*")
    meta = json.loads((cache / "meta.json").read_text())
    text = "\0".join(documents)
    found = 0
    for split in ("train", "held_out"):
        tokens = np.fromfile(cache / f"{split}.bin", meta["dtype"])
        for part in np.split(tokens, np.flatnonzero(tokens == bundle.tokenizer.eot_id))[1:]:
            piece = bundle.tokenizer.decode(part)
            assert piece in text, f"the cache holds {piece[:80]!r}, which no document does"
            found += len(piece)
    assert found == sum(map(len, documents)), "the cache holds more or less than the documents"
    return documents, bundle.num_skipped


def check(case: Case) -> str:
    """Returns "loaded" or "refused". Raises an error if the case fails."""
    try:
        documents, skipped = loaded(case)
    except UserError as error:
        sentence = str(error)
        assert case.may_refuse, f"refused: {sentence}"
        assert re.fullmatch(r"[^\n]+\.", sentence), f"not one sentence: {sentence!r}"
        return "refused"
    if case.expected is not None:
        meant = "".join(case.expected) if len(documents) > 1 else case.expected[0]
        same = documents == case.expected or "".join(documents) == meant
        assert same, f"loaded {documents[:3]!r}, not {case.expected[:3]!r}"
        assert skipped == case.skipped, f"{skipped} rows were skipped, not {case.skipped}"
        return "loaded"
    meant = case.reading()
    for document in documents:
        assert any(document in text for text in meant), f"nobody meant {document[:200]!r}"
    return "loaded"


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(seed: int, numbers: range) -> tuple[collections.Counter, list[str]]:
    """The number of cases of each kind and result, and the failures with their stack traces."""
    ends, failures = collections.Counter(), []
    for number in numbers:
        with tempfile.TemporaryDirectory() as scratch, time_limit():
            folder = Path(scratch) / "data"
            folder.mkdir()
            kind = "unmade"
            try:
                kind, case = make_case(seed, number, folder)
                ends[kind, check(case)] += 1
            except BaseException as error:  # a panic in Rust is not an Exception
                if isinstance(error, KeyboardInterrupt):
                    raise
                ends[kind, "FAILED"] += 1
                trace = "".join(traceback.format_exception(error)[-3:])
                files = sorted(path.name for path in folder.iterdir())[:5]
                failures.append(f"--seed={seed} --only={number} ({kind}; {files}):\n{trace}")
    return ends, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--only", type=int, help="run this case alone")
    options = parser.parse_args()
    only = options.only
    numbers = range(options.count) if only is None else range(only, only + 1)
    ends, failures = run(options.seed, numbers)
    print(*failures, sep="\n")
    for (kind, end), count in sorted(ends.items()):
        print(f"{count:6} {end:8} {kind}")
    print(f"{len(numbers)} cases of seed {options.seed}: {len(failures)} failed.")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
