"""Batches: exact resume, any number of processes, packing, splits, mixtures, token cache."""

import errno
import json
import operator
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from yocou_jax import progress
from yocou_jax.data import load_data, pipeline, sources
from yocou_jax.data import tokens as token_cache
from yocou_jax.data.corpus import Split, is_held_out
from yocou_jax.data.pipeline import Batches, Sequences, spread
from yocou_jax.data.sources import open_corpus
from yocou_jax.data.tokenizer import Tokenizer, load_tokenizer
from yocou_jax.errors import UserError

EOT = load_tokenizer("bytes").eot_id


def split_texts(corpus, fraction, held_out):
    return [t for n, t in sorted(corpus.texts.items()) if is_held_out(n, fraction) == held_out]


def joined(texts):
    return [i for text in texts for i in (EOT, *text.encode())]


def same(a, b):
    leaves = jax.tree.leaves(a), jax.tree.leaves(b)
    return all(np.array_equal(x, y) for x, y in zip(*leaves, strict=True))


def take(bundle, sharding, count, start_step=0):
    with bundle.train(sharding, start_step) as iterator:
        return [jax.device_get(next(iterator)) for _ in range(count)]


# --- Sequences and packing ---------------------------------------------------------------------


def test_sequences_are_the_joined_training_documents(make_config, corpus):
    bundle = load_data(make_config())
    tokens = joined(split_texts(corpus, 0.2, held_out=False))
    rows = {tuple(r.tokens): tuple(r.targets) for r in map(bundle.stream.__getitem__, range(200))}
    expected = {
        tuple(tokens[i : i + 16]): tuple(tokens[i + 1 : i + 17])
        for i in range(0, len(tokens) - 16, 16)
    }
    assert rows == expected
    assert bundle.num_sequences == len(expected)
    assert bundle.num_tokens == len(tokens)
    assert bundle.num_bytes == len(tokens) - tokens.count(EOT)
    assert bundle.num_documents == tokens.count(EOT)


def brute_force_packing(tokens, n, i):
    """Segments and positions of sequence i, one token at a time."""
    segment, position, segments, positions = 1, 0, [], []
    for j in range(n):
        if j > 0 and tokens[i * n + j] == EOT:
            segment, position = segment + 1, 0
        segments.append(segment)
        positions.append(position)
        position += 1
    return segments, positions


@pytest.mark.parametrize("n", [1, 2, 5, 16, 61])
def test_packing_against_a_brute_force(n):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 12, 40)  # some documents have one token
    tokens = np.concatenate([[EOT, *rng.integers(0, 256, k - 1)] for k in lengths])
    starts = np.cumsum([0, *lengths[:-1]])
    sequences = Sequences(tokens.astype(np.uint16), starts, n, packing=True)
    assert len(sequences) == (len(tokens) - 1) // n
    for i in range(len(sequences)):
        row = sequences[i]
        segments, positions = brute_force_packing(tokens, n, i)
        assert row.tokens.tolist() == tokens[i * n : i * n + n].tolist()
        assert row.targets.tolist() == tokens[i * n + 1 : i * n + n + 1].tolist()
        assert row.segment_ids.tolist() == segments
        assert row.positions.tolist() == positions
        assert row.loss_weights is None


def test_dtypes_and_absent_fields(make_config, sharding):
    (plain,) = take(load_data(make_config()), sharding, 1)
    assert plain.loss_weights is plain.segment_ids is plain.positions is None
    (packed,) = take(load_data(make_config(packing=True)), sharding, 1)
    assert {x.shape for x in jax.tree.leaves(packed)} == {(8, 16)}
    integers = (packed.tokens, packed.targets, packed.segment_ids, packed.positions)
    assert {x.dtype for x in integers} == {np.dtype("int32")}
    assert same(replace(packed, segment_ids=None, positions=None), plain)


# --- The training stream ---------------------------------------------------------------------


def test_each_epoch_sees_each_sequence_once_in_a_new_order(make_config):
    bundle = load_data(make_config())
    count = bundle.num_sequences
    epochs = [[tuple(bundle.stream[e * count + i].tokens) for i in range(count)] for e in range(3)]
    assert len(set(epochs[0])) == count
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]


def test_seed_decides_the_order(make_config, sharding):
    first, again, other = (
        take(load_data(make_config(seed=seed)), sharding, 3) for seed in (0, 0, 1)
    )
    assert same(first, again)
    assert not same(first, other)


@pytest.mark.parametrize("packing", [False, True])
def test_resume_at_step_k_is_bit_identical(make_config, sharding, packing):
    bundle = load_data(make_config(packing=packing))
    steps = 3 * bundle.num_sequences // 8  # more than one epoch
    whole = take(bundle, sharding, steps)
    for k in (1, 7, steps - 2):
        resumed = take(load_data(make_config(packing=packing)), sharding, 2, start_step=k)
        assert same(resumed, whole[k : k + 2])
    assert not same(whole[0], whole[1])


def test_step_counts_the_batches_handed_out_not_those_read_ahead(make_config, sharding):
    with load_data(make_config()).train(sharding, start_step=5) as iterator:
        time.sleep(0.1)
        assert iterator.step == 5
        next(iterator)
        assert iterator.step == 6


def test_close_stops_the_thread(make_config, sharding):
    before = set(threading.enumerate())
    iterator = load_data(make_config()).train(sharding)
    next(iterator)
    (thread,) = set(threading.enumerate()) - before
    iterator.close()
    thread.join(timeout=5)
    assert not thread.is_alive()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)
    iterator.close()


def test_an_error_of_the_thread_reaches_the_train_loop(make_config, sharding):
    def row(_):
        raise OSError("disk gone")

    with (
        pipeline.TrainIterator(Batches(row, 8, 16, sharding)) as iterator,
        pytest.raises(OSError, match="disk gone"),
    ):
        next(iterator)


# --- Shardings and processes -----------------------------------------------------------------


class OneProcess:
    """The view of one of several processes on a sharding: some devices are not addressable."""

    def __init__(self, sharding, devices):
        self.sharding, self.devices = sharding, devices

    def shard_shape(self, shape):
        return self.sharding.shard_shape(shape)

    def addressable_devices_indices_map(self, shape):
        indices = self.sharding.devices_indices_map(shape)
        return {device: indices[device] for device in self.devices}


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_any_number_of_processes_gives_the_same_global_batch(make_config, sharding, processes):
    bundle = load_data(make_config(packing=True))
    expected = take(bundle, sharding, 6)
    devices = list(sharding.mesh.devices.flat)
    share = len(devices) // processes
    for k in (0, 5):
        seen = []
        for p in range(processes):
            read = []

            def row(r, read=read):
                read.append(r)
                return bundle.stream[r]

            view = OneProcess(sharding, devices[p * share : (p + 1) * share])
            batches = Batches(row, 8, 16, view)
            local = batches.host_batch(k)
            wanted = jax.tree.map(lambda x, rows=batches.local_rows: x[rows], expected[k])
            assert same(local, wanted)
            assert len(read) == 8 // processes  # rows of other processes were not read
            seen += batches.local_rows
        assert sorted(seen) == list(range(8))


SPECS = [
    PartitionSpec(),
    PartitionSpec("data"),
    PartitionSpec(("data", "fsdp"), None),
    PartitionSpec("data", "fsdp"),
    PartitionSpec(("fsdp", "data")),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_sharding_gives_the_same_values(make_config, sharding, spec):
    bundle = load_data(make_config(packing=True))
    expected = jax.tree.map(lambda *x: np.stack(x), *[bundle.stream[8 + r] for r in range(8)])
    target = NamedSharding(sharding.mesh, spec)
    with bundle.train(target, start_step=1) as iterator:
        batch = next(iterator)
    assert all(x.sharding == target for x in jax.tree.leaves(batch))
    assert same(batch, expected)
    for shard in batch.tokens.addressable_shards:
        assert np.array_equal(shard.data, expected.tokens[shard.index])


def test_batch_that_does_not_divide(make_config, sharding):
    bundle = load_data(make_config(batch_size=6))
    with pytest.raises(UserError, match=r"data.batch_size=6 .* does not divide evenly over"):
        bundle.train(sharding)
    with pytest.raises(UserError, match=r"data.batch_size=6 .* does not divide evenly over"):
        bundle.validation.batches(sharding)


WORKER = """
    import hashlib, json, sys
    from types import SimpleNamespace
    import jax
    port, rank, fields = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
    from jax.sharding import AxisType, NamedSharding, PartitionSpec
    from yocou_jax.data import load_data, sources, tokens as token_cache
    from yocou_jax.errors import UserError
    sources.SHARD_BYTES = int(sys.argv[4])
    token_cache.PIECE_BYTES, made, write = 500, [], token_cache._write_piece
    token_cache._write_piece = lambda path, *args: (made.append(path.name), write(path, *args))
    mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    bundle = load_data(SimpleNamespace(**fields))
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    assert len(sharding.addressable_devices) == 2
    with bundle.train(sharding, start_step=3) as iterator:
        batch = next(iterator)
    total = jax.jit(lambda b: (b.tokens * b.positions).sum())(batch)
    rows = {s.index[0].start: s.data.tolist() for s in batch.tokens.addressable_shards}
    try:
        fields["source"] = fields["source"].replace("*", "[0-3]*") if rank else fields["source"]
        load_data(SimpleNamespace(**fields))
        mismatch = "none"
    except UserError as error:
        mismatch = str(error)
    print("RESULT", json.dumps([rows, int(total), mismatch, sorted(set(made))]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("shard_bytes", [200, 10**9])
def test_two_real_processes(make_config, sharding, shard_bytes):
    config = make_config(packing=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-c", textwrap.dedent(WORKER), str(port)]
    workers = [
        subprocess.Popen(
            [*command, str(rank), json.dumps(vars(config)), str(shard_bytes)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=120) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    rows, totals, made = {}, [], []
    for rank, (out, err) in enumerate(outputs):
        line = next((x for x in out.splitlines() if x.startswith("RESULT ")), None)
        assert line, err[-3000:]
        shards, total, mismatch, pieces = json.loads(line.removeprefix("RESULT "))
        made.append(pieces)
        rows |= {int(start): data for start, data in shards.items()}
        totals.append(total)
        assert f"Process {rank} reads other data" in mismatch
    # Each has made half of the pieces, because they share the folder of the cache.
    numbers, total = [[int(name[:6]) for name in pieces] for pieces in made], sum(map(len, made))
    if shard_bytes > 1000:  # one shard: all read it
        assert numbers == [list(range(rank, total, 2)) for rank in range(2)]
    else:
        assert numbers == [list(range(total // 2)), list(range(total // 2, total))]
    (expected,) = take(load_data(config), sharding, 1, start_step=3)
    assert np.array_equal(np.concatenate([rows[start] for start in sorted(rows)]), expected.tokens)
    assert totals == [int((expected.tokens * expected.positions).sum())] * 2


# --- Splits, mixtures, validation ------------------------------------------------------------


def test_held_out_documents_are_never_in_training(make_config, corpus, tmp_path):
    bundle = load_data(make_config(sequence_length=1, validation_sequences=10**6))
    text = {}
    for split in ("train", "held_out"):
        (path,) = (tmp_path / "cache").glob(f"tokens-*/{split}.bin")
        tokens = np.fromfile(path, np.uint16)
        text[split] = bytes(tokens[tokens < 256].astype(np.uint8)).decode()
    held_out = {name for name in corpus.texts if is_held_out(name, 0.2)}
    assert 5 < len(held_out) < 25
    for name in corpus.texts:
        assert (f"<{name[:2]}>" in text["held_out"]) == (name in held_out)
        assert (f"<{name[:2]}>" in text["train"]) == (name not in held_out)
    # The iterators read only these two files.
    train = np.array([bundle.stream[r].targets[0] for r in range(bundle.num_sequences)])
    assert sorted(train[train != EOT]) == sorted(text["train"].encode())
    validation = [w[i].targets[0] for w, i in bundle.validation.rows]
    assert bytes(t for t in validation if t != EOT).decode() == text["held_out"]


def test_mixture_shares_are_exact_and_random_access(make_config, corpus, tmp_path):
    (tmp_path / "other.jsonl").write_text(
        "".join(f'{{"text": "{"z" * (40 + i)}"}}\n' for i in range(40))
    )
    config = make_config(source=f"0.7*{corpus.source} + 0.3*{tmp_path}/other.jsonl")
    bundle = load_data(config)
    is_other = [ord("z") in bundle.stream[r].tokens for r in range(1000)]
    for r in (10, 50, 333, 1000):
        assert abs(sum(is_other[:r]) - 0.3 * r) <= 1
    assert [ord("z") in bundle.stream[r].tokens for r in (999, 0, 500)] == [
        is_other[r] for r in (999, 0, 500)
    ]
    others = sum(ord("z") in w[i].tokens for w, i in bundle.validation.rows)
    assert (others, bundle.validation.num_sequences) == (3, 10)
    assert bundle.fingerprint != load_data(make_config()).fingerprint


@pytest.mark.parametrize("second", ["a", "b"])
def test_every_component_and_every_seed_has_its_own_order(make_config, tmp_path, second):
    """Each document fills one sequence, which shows its number. Both files have the same ones."""
    for name in "ab":
        rows = [f'{{"text": "{name}{i:014}"}}\n' for i in range(300)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jsonl").write_text("".join(rows))  # one name: one split
    source = f"0.5*{tmp_path}/a/x.jsonl + 0.5*{tmp_path}/{second}/x.jsonl"
    orders = []
    for seed in (0, 7):
        bundle = load_data(make_config(source=source, seed=seed))
        count = bundle.num_sequences // 2
        for component in (0, 1):
            rows = [bundle.stream[2 * r + component].tokens[-10:] for r in range(count)]
            orders.append([bytes(row.astype(np.uint8)) for row in rows])
            assert len(set(orders[-1])) == count  # one epoch: every sequence once
    for i, order in enumerate(orders):
        for later in orders[i + 1 :]:
            assert sum(map(operator.eq, order, later)) < 0.1 * len(order)


def meta_of(tmp_path):
    (path,) = (tmp_path / "cache").glob("tokens-*/meta.json")
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("separator", ["\n", " ", "\r"], ids=ascii)
@pytest.mark.parametrize("seed", range(6))
def test_small_text_is_split_for_any_name(make_config, tmp_path, seed, separator):
    text = separator.join(f"{i * 7919 % 100_003}" for i in range(20_000))
    path = tmp_path / f"name{seed}.txt"
    path.write_bytes(text.encode())
    changes = {"sequence_length": 128, "validation_fraction": 0.02}
    bundle = load_data(make_config(source=str(path), **changes))
    assert bundle.num_sequences > 500
    assert bundle.validation.num_sequences == 10
    assert 1280 < meta_of(tmp_path)["held_out"]["bytes"] < 0.3 * len(text)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_no_held_out_text_in_training_where_documents_are_cut(
    make_config, tmp_path, tokenizer, monkeypatch
):
    sample, train = [], pipeline.cached_bpe

    def recorded(texts, *rest):
        sample.extend(texts)
        return train(sample, *rest)

    monkeypatch.setattr(pipeline, "cached_bpe", recorded)
    path = tmp_path / "one.jsonl"
    text = "".join(f"[{i:04}]" for i in range(500))
    path.write_text(json.dumps({"text": text}))
    bundle = load_data(make_config(source=str(path), tokenizer=tokenizer, sequence_length=8))
    sides = []
    for split in ("train", "held_out"):
        (tokens,) = (tmp_path / "cache").glob(f"tokens-*/{split}.bin")
        sides.append(bundle.tokenizer.decode(np.fromfile(tokens, np.uint16)))
    found = [set(re.findall(r"\[(\d{4})\]", side)) for side in sides]
    assert min(map(len, found)) > 5
    assert not found[0] & found[1]
    assert sum(map(len, sides)) == len(text)
    assert "".join(sample) == (sides[0] if tokenizer == "bpe" else "")


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_the_proposal_of_the_sentence_helps(make_config, tmp_path, tokenizer):
    path = tmp_path / "small.txt"
    path.write_text(" ".join(map(str, range(400))))
    changes = {"source": str(path), "tokenizer": tokenizer, "batch_size": 2, "vocab_size": 260}
    with pytest.raises(UserError, match=r"tokens that one sequence needs.* or a data\.") as error:
        load_data(make_config(sequence_length=1000, **changes))
    shorter = int(re.search(r"at most (\d+)\.", str(error.value))[1])
    assert shorter > 30
    assert load_data(make_config(sequence_length=shorter, **changes)).num_sequences >= 2
    path.write_text("a")
    with pytest.raises(UserError, match=r"has 1 documents and 2 tokens, .*; use more text\."):
        load_data(make_config(**changes))


def test_rows_without_text_are_refused_or_counted(make_config, tmp_path):
    rows = [{"text": f"row {i} {'x' * (i % 7)}"} for i in range(200)]
    rows[3], rows[50] = {"text": None}, {"body": "b"}
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"Line 4 of .* has null in the field 'text'"):
        load_data(make_config(source=str(path)))
    bundle = load_data(make_config(source=str(path), bad_rows="skip"))
    assert bundle.num_skipped == 2
    assert meta_of(tmp_path)["skipped"] == 2
    mixture = f"0.5*{path}+0.5*{path}"
    assert load_data(make_config(source=mixture, bad_rows="skip")).num_skipped == 4


def test_a_source_that_changes_while_it_is_read(tmp_path, make_config, monkeypatch):
    """Otherwise the tokens would be stored under the name of the old text."""
    path = tmp_path / "x.txt"
    text = "".join(f"line {i}\n" for i in range(3000))
    path.write_text(text)
    make = token_cache._make_pieces

    def swap(*args):
        path.write_text(text.replace("line", "poison"))
        return make(*args)

    monkeypatch.setattr(token_cache, "_make_pieces", swap)
    config = make_config(source=str(path))
    with pytest.raises(UserError, match="has changed while it was read"):
        load_data(config)
    monkeypatch.setattr(token_cache, "_make_pieces", make)
    path.write_text(text)
    batch = load_data(config).stream[0]
    assert "poison" not in bytes(x for x in batch.tokens if x < 256).decode()


def test_long_work_reports_its_progress(make_config, corpus, monkeypatch, caplog):
    caplog.set_level("INFO", "yocou_jax")
    load_data(make_config())
    assert not caplog.records
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    load_data(make_config(validation_fraction=0.3, verify=True))
    lines = [record.getMessage() for record in caplog.records]
    for what, of in (("Reading", ""), ("Tokenizing", r" of 0\.0 MB")):
        pattern = rf"{what} {re.escape(corpus.source)}: 0\.0 MB{of}\."
        assert sum(bool(re.fullmatch(pattern, line)) for line in lines) == len(corpus.texts)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_validation_counts_exact_bytes(make_config, corpus, sharding, tokenizer, packing):
    config = make_config(
        tokenizer=tokenizer, packing=packing, sequence_length=1, validation_sequences=10**6
    )
    validation = load_data(config).validation
    texts = split_texts(corpus, 0.2, held_out=True)
    # Sequences of one token have every target, so the bytes are those of the documents.
    assert validation.num_bytes == sum(len(text.encode()) for text in texts)
    assert validation.num_tokens == validation.num_sequences
    weights = sum(float(b.loss_weights.sum()) for b in validation.batches(sharding))
    assert weights == validation.num_tokens


def test_validation_batches_hold_each_sequence_once(make_config, sharding):
    bundle = load_data(make_config(validation_sequences=10))
    first, second = (jax.device_get(list(bundle.validation.batches(sharding))) for _ in range(2))
    assert same(first, second)
    assert [b.loss_weights.sum() for b in first] == [8 * 16, 2 * 16]  # the rest is padding
    rows = np.concatenate([b.tokens for b in first])[:10]
    assert same(list(rows), [w[i].tokens for w, i in bundle.validation.rows])


@pytest.mark.parametrize("count", [3, 7, 20, 1000])
def test_validation_has_about_as_much_of_each_document(count):
    """Documents of 1, 50, 3, 9 and 4 sequences of 10 tokens, with an <eot> in front of each."""
    sizes = np.array([1, 50, 3, 9, 4])
    starts = np.cumsum([0, *10 * sizes[:-1]])
    sequences = Sequences(np.zeros(10 * sizes.sum() + 1, np.uint16), starts, 10, packing=False)
    chosen = spread(sequences, count)
    assert list(chosen) == sorted(set(chosen))
    each = np.bincount(np.searchsorted(starts, 10 * chosen, side="right") - 1, minlength=5)
    assert each.sum() == min(count, sizes.sum())
    assert each.max() - np.where(each == sizes, each.max(), each).min() <= 1
    if count == 20:  # of the long document, not only its beginning
        gaps = np.diff(chosen[(chosen >= 1) & (chosen < 51)])
        assert gaps.max() < 2.7 * 50 / each[1]


def test_validation_is_shorter_when_the_split_is(make_config):
    validation = load_data(make_config(validation_sequences=10**6)).validation
    assert 10 < validation.num_sequences < 100


def test_bpe_is_trained_on_the_training_split_only(make_config, corpus, monkeypatch):
    seen = []

    def train(texts, *_):
        seen.extend(texts)
        return load_tokenizer("bytes")

    monkeypatch.setattr(pipeline, "cached_bpe", train)
    load_data(make_config(tokenizer="bpe"))
    assert seen == split_texts(corpus, 0.2, held_out=False)
    monkeypatch.setattr(pipeline, "BPE_SAMPLE_BYTES", 1000)
    seen.clear()
    load_data(make_config(tokenizer="bpe"))
    assert 300 < sum(len(text.encode()) for text in seen) < 2500


# --- The token cache -------------------------------------------------------------------------


def test_second_load_tokenizes_nothing(make_config, corpus, monkeypatch):
    first = load_data(make_config())
    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "_make_pieces", lambda *_: pytest.fail("tokenized again"))
        assert load_data(make_config(seed=5)).fingerprint == first.fingerprint
        # Another sequence length or packing reads the same cache.
        assert load_data(make_config(sequence_length=8, packing=True)).num_tokens
    (corpus.folder / "00.txt").write_text("changed")
    assert load_data(make_config()).fingerprint != first.fingerprint


def test_another_split_or_tokenizer_has_another_cache(make_config, tmp_path):
    for changes in ({}, {"validation_fraction": 0.3}, {"tokenizer": "bpe"}):
        load_data(make_config(**changes))
    assert len(list((tmp_path / "cache").glob("tokens-*"))) == 3
    load_data(make_config(tokenizer="bpe", validation_fraction=0.3))  # it has other training texts
    found = sorted((tmp_path / "cache").glob("bpe-*"))
    assert len(found) == 2
    contents = [path.read_bytes() for path in found]
    found[0].write_bytes(b"")  # as after a power failure
    for fraction in (0.2, 0.3):
        load_data(make_config(tokenizer="bpe", validation_fraction=fraction))
    assert [path.read_bytes() for path in found] == contents


def test_token_width_follows_the_vocabulary(tmp_path, corpus):
    tokenizer = load_tokenizer("bytes")
    for vocab_size, dtype in ((2**16, "uint16"), (2**16 + 1, "uint32")):
        wide = Tokenizer(None, vocab_size, vocab_size - 1, tokenizer.pad_id)
        split = Split(open_corpus(corpus.source), 0.2)
        folder, meta = token_cache.tokenized(split, wide, tmp_path / dtype, False)
        ids = np.fromfile(folder / "train.bin", dtype)
        assert meta["dtype"] == dtype
        assert ids[0] == vocab_size - 1
        assert (ids > 255).sum() == len(np.load(folder / "train.starts.npy"))


KILLED = """
    import json, os, signal, sys
    from types import SimpleNamespace
    from yocou_jax.data import load_data, tokens as token_cache
    token_cache.PIECE_BYTES = 500
    write = token_cache._write_piece
    def killed(path, *args):
        if path.name.startswith("000003"):
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, *args)
    token_cache._write_piece = killed
    load_data(SimpleNamespace(**json.loads(sys.argv[1])))
"""


def cache_files(folder):
    (found,) = folder.glob("tokens-*")
    return {path.name: path.read_bytes() for path in found.iterdir()}


@pytest.fixture
def written(monkeypatch):
    """The numbers of the pieces that are written, of 500 bytes of text."""
    numbers, write = [], token_cache._write_piece

    def noted(path, *args):
        numbers.append(int(path.name[:6]))
        write(path, *args)

    monkeypatch.setattr(token_cache, "PIECE_BYTES", 500)
    monkeypatch.setattr(token_cache, "_write_piece", noted)
    return numbers


def test_a_kill_while_tokenizing_loses_one_piece(make_config, tmp_path, written):
    config = make_config()
    command = [sys.executable, "-c", textwrap.dedent(KILLED), json.dumps(vars(config))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    load_data(config)
    assert written == list(range(3, 3 + len(written)))
    resumed, written[:] = list(written), []
    load_data(make_config(cache_dir=str(tmp_path / "other")))
    assert written == [0, 1, 2, *resumed]
    assert cache_files(tmp_path / "cache") == cache_files(tmp_path / "other")
    token_cache.PIECE_BYTES = 10**6  # the size of the pieces changes nothing
    load_data(make_config(cache_dir=str(tmp_path / "one")))
    assert cache_files(tmp_path / "one") == cache_files(tmp_path / "other")


def test_a_piece_is_used_only_for_its_documents(make_config, corpus, tmp_path, written):
    """Also if the source was another one for some time, and its first reading is remembered."""
    load_data(make_config())
    want, count = cache_files(tmp_path / "cache"), len(written)
    (folder,) = (tmp_path / "cache").glob("tokens-*")
    shutil.rmtree(folder)
    pieces = folder.with_name(f"{folder.name}.pieces")
    pieces.mkdir()
    (pieces / "000000-0123456789abcdef.npz").write_bytes(b"of other documents")
    written.clear()
    load_data(make_config())
    assert len(written) == count
    assert cache_files(tmp_path / "cache") == want
    assert not pieces.exists()


def test_a_damaged_piece_is_made_again(make_config, tmp_path, written, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            token_cache, "_join_pieces", lambda *_: (_ for _ in ()).throw(UserError("stop"))
        )
        with pytest.raises(UserError, match="stop"):
            load_data(make_config())
    (piece, *_) = sorted((tmp_path / "cache").glob("tokens-*.pieces/*.npz"))
    piece.write_bytes(piece.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"000000-\w+.npz' of the data cache was damaged and is de"):
        load_data(make_config())
    written.clear()
    assert load_data(make_config()).num_tokens
    assert written == [0]


def test_what_killed_processes_have_left_is_removed_when_it_is_old(make_config, tmp_path):
    folders = [tmp_path / "cache" / name for name in (".tmp-1", "tokens-1.pieces")]
    files = [tmp_path / "cache" / name for name in (".tmp-2", "shard-1.npz")]
    for path in folders:
        path.mkdir(parents=True)
    for path in files:
        path.touch()
    left = folders + files
    load_data(make_config())
    assert all(path.exists() for path in left)  # another process may use them
    for path in left:
        os.utime(path, (0, 0))
    load_data(make_config(tokenizer="bpe"))
    assert not any(path.exists() for path in left)


def test_two_builders_at_once(make_config, monkeypatch, tmp_path):
    barrier, make, results = threading.Barrier(2), token_cache._make_pieces, []

    def both_at_once(*arguments):
        barrier.wait(timeout=20)
        paths = make(*arguments)
        barrier.wait(timeout=20)
        return paths

    monkeypatch.setattr(token_cache, "_make_pieces", both_at_once)
    threads = [
        threading.Thread(target=lambda: results.append(load_data(make_config()))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, second = results
    assert same([first.stream[r] for r in range(20)], [second.stream[r] for r in range(20)])
    names = {p.name[:7] for p in (tmp_path / "cache").iterdir()}
    assert names <= {"corpus-", "tokens-"}


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_disk_full_leaves_nothing(make_config, monkeypatch, tmp_path, tokenizer):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = (token_cache.np, "savez") if tokenizer == "bytes" else (os, "replace")
    with monkeypatch.context() as patch:
        patch.setattr(*target, full)
        with pytest.raises(UserError, match=r"cache'?: No space left on device.*data\.cache_dir"):
            load_data(make_config(tokenizer=tokenizer))
        left = [p for p in (tmp_path / "cache").rglob("*") if not p.is_dir()]
        assert all(re.fullmatch(r"corpus-\w+\.npz", path.name) for path in left)
    assert load_data(make_config(tokenizer=tokenizer)).num_tokens


def test_cache_dir_that_cannot_be_made(make_config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="data cache could not be written"):
        load_data(make_config(cache_dir=str(tmp_path / "file" / "cache")))


def test_cache_dir_with_a_tilde(make_config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    load_data(make_config(cache_dir="~/cache"))
    assert list((tmp_path / "home" / "cache").glob("tokens-*"))


def test_damaged_cache(make_config, tmp_path):
    load_data(make_config())
    (path,) = (tmp_path / "cache").glob("tokens-*/train.bin")
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match="is damaged; delete it and run again"):
        load_data(make_config())


# --- Bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sequence_length": 10**6}, r"train split .* fewer than the 1000001 tokens that one"),
        ({"batch_size": 5000}, r"\d+ training sequences .* fewer than data.batch_size=5000"),
        ({"source": "nowhere"}, "is not a file that exists"),
        ({"tokenizer": "nowhere.json"}, "nor a readable tokenizer"),
        ({"tokenizer": "bpe", "vocab_size": 100}, "data.vocab_size=100 is too small"),
    ],
)
def test_bad_configurations(make_config, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        load_data(make_config(**changes))


def test_the_built_in_source_loads(tmp_path, make_config):
    bundle = load_data(make_config(source="python", sequence_length=256, batch_size=16))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    (batch,) = take(bundle, NamedSharding(mesh, PartitionSpec("data")), 1)
    assert batch.tokens.shape == (16, 256)
    assert 0.99 < bundle.bytes_per_token < 1
    assert bundle.validation.num_sequences == 10


# --- A start that reads nothing -------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_second_start_reads_no_file(make_config, readings, tokenizer):
    first = load_data(make_config(tokenizer=tokenizer))
    assert readings
    readings.clear()
    second = load_data(make_config(tokenizer=tokenizer))
    assert readings == []
    assert second.fingerprint == first.fingerprint
    for field in ("num_documents", "num_tokens", "num_bytes", "num_sequences", "num_duplicates"):
        assert getattr(second, field) == getattr(first, field)
    np.testing.assert_array_equal(first.stream[3].tokens, second.stream[3].tokens)
    load_data(make_config(tokenizer=tokenizer, verify=True))
    assert readings


def test_mixtures_and_splits_of_known_files_read_nothing(make_config, corpus, readings):
    """But for the tokens of another split."""
    load_data(make_config())
    readings.clear()
    source = f"0.5*{corpus.source} + 0.5*{corpus.source}"
    load_data(make_config(source=source, batch_size=4, seed=3))
    assert readings == []
    load_data(make_config(validation_fraction=0.3))
    assert sorted(set(readings)) == sorted(readings)  # once, to tokenize


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_other_weights_of_a_mixture_read_nothing(
    make_config, corpus, tmp_path, readings, tokenizer
):
    """The tokenizer that is trained does not depend on them."""
    (tmp_path / "other.txt").write_text("another text with other words\n" * 400)
    sources = (corpus.source, tmp_path / "other.txt")

    def load(first, second):
        mixture = f"{first}*{sources[0]} + {second}*{sources[1]}"
        return load_data(make_config(source=mixture, tokenizer=tokenizer))

    one = load(0.5, 0.5)
    readings.clear()
    other = load(0.75, 0.25)
    assert readings == []
    assert other.tokenizer.fingerprint == one.tokenizer.fingerprint
    assert other.fingerprint != one.fingerprint


def test_a_file_is_known_by_its_size_and_both_times(monkeypatch, tmp_path):
    facts = {"st_size": 1, "st_mtime_ns": 2, "st_ctime_ns": 3, "st_mtime": 0, "st_ctime": 0}
    stamps = set()
    for changed in ({}, {"st_size": 9}, {"st_mtime_ns": 9}, {"st_ctime_ns": 9}):
        with monkeypatch.context() as patch:
            one = SimpleNamespace(**facts | changed)
            patch.setattr(sources.Path, "stat", lambda path, one=one: one)
            file = sources.File.of(tmp_path / "a", tmp_path)
            stamps.add(sources._stamp(tmp_path, [file], "text"))
    assert len(stamps) == 4


def test_what_is_known_depends_on_how_rows_are_read(make_config, tmp_path, readings):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"text {i} " * 20, "other": f"another {i} " * 20} for i in range(40)]
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"text": None, "other": "x"}])
    )
    config = {"source": str(path), "bad_rows": "skip"}
    first = load_data(make_config(**config))
    for changes in ({"text_field": "other"}, {"bad_rows": "refuse", "text_field": "other"}):
        readings.clear()
        assert load_data(make_config(**config | changes)).fingerprint != first.fingerprint
        assert readings
    with pytest.raises(UserError, match=r"rows\.jsonl"):  # although its skipped row is remembered
        load_data(make_config(**config | {"bad_rows": "refuse"}))


def test_a_changed_file_is_read_even_if_its_size_and_its_time_are_those_of_before(
    make_config, corpus, readings
):
    first = load_data(make_config())
    path = corpus.folder / "00.txt"
    before = path.stat()
    path.write_bytes(bytes(reversed(path.read_bytes())))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    readings.clear()
    assert load_data(make_config()).fingerprint != first.fingerprint
    assert readings


@pytest.mark.parametrize("content", [b"", b"PK", b"\x00" * 1000])
def test_a_damaged_memory_of_a_corpus_is_made_again(make_config, tmp_path, readings, content):
    first = load_data(make_config())
    (path,) = (tmp_path / "cache").glob("corpus-*.npz")
    path.write_bytes(content)
    readings.clear()
    assert load_data(make_config()).fingerprint == first.fingerprint
    assert readings
    assert path.stat().st_size > 1000


def test_verify_replaces_what_was_remembered(make_config, tmp_path, readings):
    """As if a change had left all stamps as they were: the memory is that of another text."""
    first = load_data(make_config())
    (path,) = (tmp_path / "cache").glob("corpus-*.npz")
    right = path.read_bytes()
    with np.load(path) as found:
        arrays = dict(found)
    wrong = json.loads(str(arrays["summary"])) | {"fingerprint": "0" * 64}
    np.savez(path, **(arrays | {"summary": json.dumps(wrong)}))
    forged = path.read_bytes()
    with pytest.raises(UserError, match="has changed while it was read"):
        load_data(make_config())
    assert not path.exists()  # so the next start reads the files
    assert load_data(make_config()).fingerprint == first.fingerprint
    assert path.read_bytes() == right
    path.write_bytes(forged)
    assert load_data(make_config(verify=True)).fingerprint == first.fingerprint
    assert path.read_bytes() == right


def test_files_that_changed_just_now_are_read_again(make_config, readings, monkeypatch):
    monkeypatch.setattr(sources, "YOUNG", 1000.0)
    load_data(make_config())
    readings.clear()
    load_data(make_config())
    assert readings
