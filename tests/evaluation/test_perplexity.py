"""The losses are those of the numpy oracle, and the views of them are sums by hand."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from tests import oracle
from tests.trained import BYTES, model
from yocou_jax.config import MeshConfig
from yocou_jax.data.pipeline import Sequences, Validation
from yocou_jax.errors import UserError
from yocou_jax.evaluation import loops, perplexity
from yocou_jax.evaluation.options import Options, with_loops
from yocou_jax.sharding import make_mesh

COUNT, LENGTH = 5, 12  # five sequences do not fill three batches of two devices


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=1, tensor=1), jax.devices()[:2])


def sequences(packing=False) -> Sequences:
    tokens = np.random.default_rng(0).integers(97, 123, COUNT * LENGTH + 1)
    starts = np.array([0, 17, 40])
    tokens[starts] = BYTES.eot_id
    return Sequences(tokens, starts, LENGTH, packing)


def validation(packing=False) -> Validation:
    return Validation.of([(1.0, sequences(packing))], COUNT, COUNT, BYTES)


def by_oracle(one, rows) -> np.ndarray:
    """-log p of every target [rows, N]. rows: pairs of sequences and index."""
    batch = jax.tree.map(lambda *x: np.stack(x), *(text[i] for text, i in rows))
    params = oracle.to_float64(one.params)
    logits, _ = oracle.logits(params, one.config, batch.tokens, batch.positions, batch.segment_ids)
    picked = np.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]
    return oracle.logsumexp(logits) - picked


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_losses_are_those_of_the_oracle(mesh, packing, monkeypatch):
    monkeypatch.setattr(perplexity, "TOKENS_AT_ONCE", LENGTH)  # one sequence on each device
    one, text = model(), validation(packing)
    with jax.set_mesh(mesh):
        close(perplexity.losses(one, text, mesh), by_oracle(one, text.rows))


def test_means_and_positions():
    nll = np.array([[1, 2, 3, 4, 5], [3, 4, 5, 6, 7]], np.float32)
    # The means of the sequences are 3 and 5, with a standard deviation of sqrt(2).
    assert perplexity.mean(nll) == {"nats": 4.0, "stderr": pytest.approx(1.0)}
    assert math.isnan(perplexity.mean(nll[:1])["stderr"])
    found = [tuple(row.values())[:3] for row in perplexity.by_position(nll)]
    assert found == [(1, 1, 2.0), (2, 2, 3.0), (3, 4, 4.5), (5, 5, 6.0)]
    assert [row["from"] for row in perplexity.by_position(np.ones((1, 16), np.float32))] == [
        *(1, 2, 3, 5, 9)
    ]


@pytest.mark.parametrize("packing", [False, True])
def test_the_tail_of_a_sequence(packing):
    text = sequences(packing)
    for i in range(COUNT):
        whole, (same, at) = text[i], perplexity.tail(text, i, LENGTH)
        jax.tree.map(np.testing.assert_array_equal, whole, same[at])
        short, at = perplexity.tail(text, i, 7)
        assert short[at].tokens.tolist() == whole.tokens[-7:].tolist()
        assert short[at].targets.tolist() == whole.targets[-7:].tolist()
        if packing:  # the same documents are kept apart
            assert (np.diff(short[at].segment_ids) == np.diff(whole.segment_ids[-7:])).all()


@pytest.mark.parametrize(
    ("length", "given", "expected"),
    [
        (4096, None, ([512, 1024, 2048, 4096], 512)),
        (512, None, ([128, 256, 512], 128)),
        (100, None, ([25, 50, 100], 25)),
        (3, None, ([1, 2, 3], 1)),
        (8192, (8192, 2048), ([2048, 8192], 512)),
        (8192, (300, 8192), ([300, 8192], 300)),
    ],
)
def test_the_lengths_that_the_model_sees(length, given, expected, tmp_path):
    assert perplexity.seen_lengths(Options(tmp_path, lengths=given), length) == expected


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    """A text of one document, as one more than the sequences need."""
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(sequences().tokens[1:].astype(np.uint8).tobytes().replace(b"\0", b"z"))
    return path


def test_the_report_of_both_tasks(mesh, text_file, tmp_path):
    """Perplexity, and a depth curve in which the trained count is that loss."""
    one, lengths = model(), (3, LENGTH)
    options = Options(tmp_path, source=str(text_file), lengths=lengths, samples=COUNT)
    with jax.set_mesh(mesh):
        report = perplexity.run(one, mesh, options)
        curve = loops.run(one, mesh, dataclasses.replace(options, loops=(2,)))
    text = np.array([BYTES.eot_id, *text_file.read_bytes()])
    rows = [(Sequences(text, np.array([0]), LENGTH, False), i) for i in range(COUNT)]
    nll = by_oracle(one, rows)
    assert report["scalars"]["nats"] == pytest.approx(nll.mean(), rel=1e-5)
    bits = nll.sum() / math.log(2) / (COUNT * LENGTH)
    assert report["scalars"]["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    facts = [report[name] for name in ("sequences", "length", "tokens", "bytes", "loops", "last")]
    assert facts == [COUNT, LENGTH, COUNT * LENGTH, COUNT * LENGTH, [3], 3]
    for row, length in zip(list(report["tables"].values())[2], lengths, strict=True):
        seen = by_oracle(one, [perplexity.tail(*row, length) for row in rows])[:, -3:]
        assert row == {
            "length": length,
            "nats": pytest.approx(seen.mean(), rel=1e-5),
            "stderr": pytest.approx(seen.mean(1).std(ddof=1) / math.sqrt(COUNT), rel=1e-4),
        }
    two, three = next(iter(curve["tables"].values()))
    assert (two["loops"], two["trained"], three["loops"], three["trained"]) == (2, False, 3, True)
    assert {name: three[name] for name in ("nats", "stderr", "bits_per_byte")} == {
        name: report["scalars"][name] for name in ("nats", "stderr", "bits_per_byte")
    }
    assert three["difference"] == 0
    other = by_oracle(with_loops(one, 2), rows)
    assert two["nats"] == pytest.approx(other.mean(), rel=1e-5)
    more = (other - nll).mean(1)
    assert two["difference"] == pytest.approx(more.mean(), rel=1e-3)
    assert two["difference_stderr"] == pytest.approx(more.std(ddof=1) / math.sqrt(COUNT), rel=1e-3)


def test_the_text_before_the_last_tokens_is_of_their_document(mesh, tmp_path):
    assert [perplexity.in_one_document(sequences(), i) for i in range(COUNT)] == [
        *(True, False, True, False, True)
    ]
    texts = [bytes(97 + i % 7 for i in range(30)), bytes(104 + i % 5 for i in range(40))]
    for name, text in zip("ab", texts, strict=True):
        (tmp_path / f"{name}.txt").write_bytes(text)
    ids = np.array([BYTES.eot_id, *texts[0], BYTES.eot_id, *texts[1]])
    one, whole = model(), Sequences(ids, np.array([0, 31]), LENGTH, False)
    options = Options(tmp_path, source=f"{tmp_path}/*.txt", lengths=(3, LENGTH), samples=COUNT)
    with jax.set_mesh(mesh):
        report = perplexity.run(one, mesh, options)
    assert (report["sequences"], report["sequences_of_last"]) == (COUNT, 4)  # not the third
    for row in list(report["tables"].values())[2]:
        rows = [perplexity.tail(whole, i, row["length"]) for i in (0, 1, 3, 4)]
        assert row["nats"] == pytest.approx(by_oracle(one, rows)[:, -3:].mean(), rel=1e-5)


def test_loop_counts_that_are_not_possible(mesh, tmp_path):
    for task, one, given, sentence in (
        (loops, model("yoco"), None, "has no loop, so it has no depth curve"),
        (perplexity, model("yoco"), (2,), "has no looped stage"),
    ):
        with pytest.raises(UserError, match=sentence):
            task.run(one, mesh, Options(tmp_path, loops=given))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"loops": (0,)}, "--loops=0 must be whole numbers from 1 to 10000."),
        ({"loops": ()}, "--loops= must be"),
        ({"lengths": (4, 2**25)}, "--lengths=4,33554432 must be"),
        ({"samples": 0}, "--samples=0 must be from 1 to 2147483647."),
        ({"seed": -1}, "--seed=-1 must be from 0"),
    ],
)
def test_options_that_are_not_possible(fields, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        Options(tmp_path, **fields)
