"""The paper's figures, what is measured on which device, and a tiny run in which a cell fails."""

import dataclasses
import io
import json
import logging
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks import cases, comparison, inference, paper, plots
from configs import yocou_1b, yocou_small
from experiments import profile_inference
from tests import tiny
from yocou_jax import accounting
from yocou_jax import inference as model_inference
from yocou_jax.config import Config
from yocou_jax.errors import UserError
from yocou_jax.plots import STYLES

PROBE = cases.CPU._replace(copy_bytes=4096, matmul=16, heads=(2, 1), head_widths=(8,), rounds=1)
TINY = inference.CPU._replace(
    lengths=(8, 32), batch=2, prefill_tokens=16, chunk_tokens=16, steps=2, turns=2, probe=PROBE
)
BIG = Config.from_dict(yocou_1b.get_config()).model
FLOAT, HALF = tiny.compute(), tiny.compute(dtype="bfloat16")
H200 = 104 * 2**30  # 75% of 139 GiB, which jax takes by default


def siblings(config, names=("transformer", "yoco", "rins", "yoco_u")):
    return {name: accounting.sibling(config, name) for name in names}


def test_the_papers_kv_is_that_of_the_accounting_and_of_the_arrays():
    for name, config in siblings(BIG).items():
        for row in inference.kv_rows({name: config}, paper.LENGTHS, HALF):
            assert row["mib"] == row["paper"] == accounting.kv_bytes(config, row["length"]) / 2**20
    assert paper.is_the_papers(BIG)
    for change in ({"window": 256}, {"num_loops": 5}):
        assert not paper.is_the_papers(dataclasses.replace(BIG, **change))
    assert not paper.is_the_papers(BIG, itemsize=4)


# Tables 8 and 9 of arXiv 2604.01220, by column: transformer, yoco, rins, yoco_u.
TABLE_8 = """
  8192   85707  220662  42905  75637
 16384   66342  219734  33276  75694
 32768   45566  218247  22767  76202
 65536   27276  219106  13630  76148
131072   14987  220416   7397  75534
262144    7475  220407   3739  76301
"""
TABLE_9 = """
  8192    2712    3356   1582   2410
 16384    1795    2539    580   1966
 32768     638    1722    234   1419
 65536     450     975    118    865
131072     220     556     96    514
262144     137     318     56    303
"""


@pytest.mark.parametrize(("kind", "table"), [("prefill", TABLE_8), ("decode", TABLE_9)])
def test_the_papers_speeds(kind, table):
    lines = [[int(word) for word in line.split()] for line in table.strip().splitlines()]
    assert tuple(line[0] for line in lines) == paper.LENGTHS
    for length, *speeds in lines:
        found = [paper.figure(kind, name, BIG, length) for name in siblings(BIG)]
        assert found == speeds, length


def test_the_paper_has_no_figure_for_other_lengths_architectures_and_models():
    assert paper.figure("decode", "yoco", BIG, 9) is None
    assert paper.figure("decode", "parscale", BIG, 8192) is None
    assert paper.figure("prefill", "yoco_u", tiny.model(), 262_144) is None


def test_a_ratio_has_the_papers_ratio_at_each_length_of_the_paper():
    row = {"status": "measured", "batch": 1, "flops_per_token": 1.0, "gb_per_step": 1.0}
    rows = [
        row
        | {"kind": kind, "architecture": name, "length": n, "tokens_per_s": 1.0}
        | {"paper": paper.figure(kind, name, BIG, n)}
        for kind in ("prefill", "decode")
        for name in siblings(BIG)
        for n in paper.LENGTHS
    ]
    found = comparison.ratios(rows, list(siblings(BIG)))
    assert len(found) == 2 * 4 * 6  # kinds, pairs, lengths
    papers = {(r["kind"], r["of"], r["to"], r["length"]): r["paper"] for r in found}
    assert papers["prefill", "yoco_u", "transformer", 131_072] == pytest.approx(75_534 / 14_987)
    assert papers["decode", "yoco_u", "transformer", 8192] == pytest.approx(2410 / 2712)
    assert papers["decode", "rins", "transformer", 32_768] == pytest.approx(234 / 638)
    assert all(papers.values())


@pytest.mark.parametrize("gib", [1, 4, 40, 104])
def test_what_is_measured_fits_and_the_rest_is_named(gib):
    for length in inference.ACCELERATOR.lengths:
        cells, left_out = inference.cells_at(
            length, siblings(BIG), inference.ACCELERATOR, gib * 2**30, HALF
        )
        assert len(set(cells)) == len(cells)
        assert all(inference.memory(cell) <= 0.92 * gib * 2**30 for cell in cells)
        assert all(row["status"] == "no memory" for row in left_out)
        found = {(cell.kind, cell.architecture) for cell in cells}
        missing = {(row["kind"], row["architecture"]) for row in left_out}
        assert len(found) + len(missing) == len(found | missing) == 8
        assert bool(missing) == (gib < 40)
        # What the aims need comes first.
        assert [cell.architecture == "rins" for cell in cells] == sorted(
            cell.architecture == "rins" for cell in cells
        )


def test_an_h200_measures_every_pair_at_a_batch_in_common():
    cells = {
        n: inference.cells_at(n, siblings(BIG), inference.ACCELERATOR, H200, HALF)[0]
        for n in (65_536, 262_144)
    }
    assert {(c.batch, c.piece, c.capacity) for c in cells[262_144] if c.kind == "prefill"} == {
        (1, 16_384, 262_144)
    }
    decode = {(c.architecture, n, c.batch) for n in cells for c in cells[n] if c.kind == "decode"}
    assert {("transformer", 65_536, 32), ("rins", 65_536, 16)} <= decode
    # The ratio with the transformer, and that with yoco at the paper's batch.
    assert {(name, 262_144, 8) for name in ("yoco_u", "yoco", "transformer")} <= decode
    assert {(name, 262_144, 32) for name in ("yoco_u", "yoco")} <= decode
    assert {(name, 262_144, 4) for name in ("rins", "transformer")} <= decode
    assert inference.Cell("prefill", "yoco", BIG, 100, 4, 32, HALF).capacity == 128


def test_the_small_model_crosses_within_the_lengths():
    configs, notes = inference.choose_configs(BIG, ["transformer", "yoco_u"], on_cpu=True)
    assert "is measured instead" in notes[0]
    flops = [
        accounting.prefill_flops_per_token(configs["transformer"], n)
        / accounting.prefill_flops_per_token(configs["yoco_u"], n)
        for n in inference.CPU.lengths
    ]
    (where,) = comparison.crossings(inference.CPU.lengths, flops)
    assert 3500 < where < 4500
    assert flops[-1] > 2
    as_it_is = Config.from_dict(yocou_small.get_config()).model
    assert inference.choose_configs(as_it_is, ["yoco_u"], on_cpu=True) == ({"yoco_u": as_it_is}, [])
    assert inference.choose_configs(BIG, ["yoco_u"], on_cpu=False) == ({"yoco_u": BIG}, [])


def test_crossings_and_exponents():
    lengths = np.array([1000, 2000, 4000, 8000])
    assert np.allclose(comparison.crossings(lengths, lengths / 3000), [3000])
    assert np.allclose(comparison.crossings(lengths, (3000 / lengths) ** 2), [3000])
    assert comparison.crossings(lengths, lengths / 9000) == []
    assert len(comparison.crossings(lengths, [0.9, 1.1, 0.9, 1.1])) == 3
    assert np.isclose(comparison.exponent(lengths, 3e-6 * lengths**1.7), 1.7)


def test_errors_are_one_sentence():
    for lengths in (["8k"], ["-1"], ["0", "128"], [""], ["64"]):
        with pytest.raises(UserError, match="must be whole numbers above 64"):
            inference.check_lengths(lengths, steps=64)
    assert inference.check_lengths(["256", "128", "256"], 64) == (128, 256)
    for names in (["yoko"], []):
        with pytest.raises(UserError, match=f"--architectures={','.join(names)} must be some of"):
            inference.choose_configs(BIG, names, on_cpu=False)
    odd = dataclasses.replace(BIG, architecture="transformer", num_layers=3)
    with pytest.raises(UserError, match="num_layers=3 is odd"):
        inference.choose_configs(odd, ["yoco_u"], on_cpu=False)


def shown(report) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    profile_inference.show(report, console)
    return console.export_text()


@pytest.mark.slow
def test_a_tiny_run_measures_and_a_failing_cell_fails_alone(monkeypatch, tmp_path):
    usual = inference.run_decode

    def decode(cell):
        if cell.architecture == "yoco":
            raise MemoryError("RESOURCE_EXHAUSTED: Out of memory\nmore")
        return usual(cell)

    monkeypatch.setitem(inference.RUN, "decode", decode)
    monkeypatch.setattr(paper, "AIM_LENGTH", max(TINY.lengths))
    configs = siblings(tiny.model(vocab_size=37), ("transformer", "yoco", "yoco_u"))
    kept = []
    report = inference.measure(configs, TINY, 1000, FLOAT, kept.append)
    first = {row["length"] for row in kept[0]["rows"] if row["kind"] != "kv"}
    assert first == {max(TINY.lengths)}  # what the aims are about
    assert kept[-1]["rows"] == report["rows"]
    report = json.loads(json.dumps(report, allow_nan=False))
    rows = {(r["kind"], r["architecture"], r["length"]): r for r in report["rows"]}
    assert len(rows) == len(report["rows"]) == 18
    for (kind, name, length), row in rows.items():
        if (kind, name) == ("decode", "yoco"):
            assert row["status"] == "failed"
            assert row["reason"] == "MemoryError: RESOURCE_EXHAUSTED: Out of memory"
        elif kind != "kv":
            assert (row["status"], row["samples"]) == ("measured", 2)
            tokens = row["batch"] * (length if kind == "prefill" else 2)
            assert np.isclose(row["tokens_per_s"] * row["seconds"], tokens)
    step = rows["decode", "yoco_u", 32]
    read = accounting.decode_bytes_per_step(configs["yoco_u"], 2, 31, bytes_per_value=4)
    assert np.isclose(step["gb_per_s"] * 1e9, read * step["tokens_per_s"] / 2)
    assert np.isclose(step["of_copy"], step["gb_per_s"] / report["reference"]["copy_gb_per_s"])
    compared = {(r["kind"], r["of"], r["to"], r["length"]): r for r in report["ratios"]}
    speed = compared["decode", "yoco_u", "transformer", 32]
    other = rows["decode", "transformer", 32]
    assert np.isclose(speed["value"], step["tokens_per_s"] / other["tokens_per_s"])
    assert np.isclose(speed["expected"], other["gb_per_step"] / step["gb_per_step"])
    assert ("prefill", "yoco_u", "yoco", 32) in compared
    assert ("decode", "yoco_u", "yoco", 32) not in compared
    assert [aim["verdict"] for aim in report["aims"]] == ["not measured"] * 4
    assert sum("grows as N^" in line for line in report["findings"]) == 3
    text = shown(report)
    assert "failed: decode, yoco, N = 32, B = 2: MemoryError: RESOURCE_EXHAUSTED" in text
    assert "decode_cross runs on xla (auto)" in text
    plots.plot(report, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_begun_after_the_deadline(monkeypatch):
    cells = [
        inference.Cell("decode", "yoco", tiny.model("yoco"), n, 2, 2, FLOAT) for n in (8, 16, 32)
    ]
    groups = [[cell] for cell in cells]
    monkeypatch.setattr(inference, "compile_ahead", lambda cells: {})
    ran = []

    def decode(cell):
        ran.append(cell.length)
        if len(ran) == 2:
            monkeypatch.setattr(time, "perf_counter", lambda: 1e12)
        return 0.1

    monkeypatch.setitem(inference.RUN, "decode", decode)
    rows = inference.measure_cells(groups, TINY, 1e9, deadline=1e11)
    assert ran == [8, 16]
    assert [row["status"] for row in rows] == ["measured", "measured", "no time"]
    monkeypatch.undo()
    report = inference.measure(siblings(tiny.model(), ("yoco", "yoco_u")), TINY, 0.0, FLOAT)
    assert {row["status"] for row in report["rows"] if row["kind"] != "kv"} == {"no time"}
    assert "no time: prefill, yoco_u, N = 8" in shown(report)


def test_what_cannot_be_compiled_fails_alone(monkeypatch):
    good = inference.Cell("decode", "yoco", tiny.model("yoco"), 32, 2, 2, FLOAT)
    bad = good._replace(compute=tiny.compute(attention="pallas_tpu"))
    monkeypatch.setitem(inference.RUN, "decode", lambda cell: 0.1)
    rows = inference.measure_cells([[bad, good]], TINY, 1e9, time.perf_counter() + 1000)
    assert [row["status"] for row in rows] == ["failed", "measured"]
    assert "pallas_tpu" in rows[0]["reason"]
    assert rows[1]["samples"] == 2


@pytest.mark.slow
def test_nothing_is_compiled_in_a_measurement(caplog):
    """The programs that are compiled ahead are those that inference calls."""
    config = tiny.model("yoco_u", vocab_size=33)  # shapes that no other test compiles
    cells = [
        inference.Cell("prefill", "yoco_u", config, 32, 3, 8, FLOAT),
        inference.Cell("decode", "yoco_u", config, 32, 3, 2, FLOAT),
    ]
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        assert inference.compile_ahead(cells) == {}
        ahead = compilations(caplog)
        assert ahead >= {"prefill_chunk", "next_logits", "decode_block"}
        caplog.clear()
        for cell in cells:
            assert inference.RUN[cell.kind](cell) > 0
        assert not ahead & compilations(caplog)


def compilations(caplog) -> set[str]:
    """The names of the programs that were lowered, in any thread. Every compilation begins so."""
    lines = [r.getMessage() for r in caplog.records]
    return {x.split("jit(")[1].split(")")[0] for x in lines if x.startswith("Compiling jit(")}


@pytest.mark.slow
def test_the_decode_block_takes_greedy_steps():
    config = tiny.model("yoco_u")
    model = model_inference.prepare(tiny.params(config), config, tiny.compute())
    prompt = np.asarray(tiny.tokens(2, 5))
    cache, logits = model_inference.prefill(model, prompt, capacity=16)
    first = jnp.argmax(logits, -1).astype(jnp.int32)
    out = model_inference.generate(model, prompt.tolist(), max_new_tokens=4, capacity=16)
    cache, last = inference.decode_block(model, cache, first, np.int32(5), steps=3)
    assert np.array_equal(last, out.tokens[:, 3])
    assert np.array_equal(cache.lengths, [8, 8])


def test_a_plot_says_what_was_not_measured():
    """If the budget is 0, the report has only the sizes of caches, which need no measurement."""
    configs = siblings(tiny.model(vocab_size=37), ("transformer", "yoco"))
    report = inference.measure(configs, TINY, 0, FLOAT)
    figure = Figure()
    for axes, kind in zip(figure.subplots(1, 3), comparison.TITLES, strict=True):
        plots.draw(report, kind, axes)
    figure.savefig(io.BytesIO())
    said = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert said == [["Nothing was measured."], ["Nothing was measured."], []]
    drawn = {line.get_label(): line.get_marker() for line in figure.axes[2].lines}
    assert {name: STYLES[name][1] for name in configs}.items() <= drawn.items()


def test_the_papers_own_speeds_reach_the_aims(monkeypatch, tmp_path):
    """The device of this test is as fast as the paper's; everything else is as in a run."""
    monkeypatch.setattr(inference, "compile_ahead", lambda cells: {})
    monkeypatch.setattr(inference, "device_memory", lambda: H200)
    for kind in inference.RUN:
        monkeypatch.setitem(
            inference.RUN,
            kind,
            lambda cell: cell.tokens / paper.figure(cell.kind, cell.architecture, BIG, cell.length),
        )
    sizes = inference.ACCELERATOR._replace(lengths=(8192, 262_144), probe=PROBE)
    report = inference.measure(siblings(BIG), sizes, budget_s=1000, compute=HALF)
    assert [aim["verdict"] for aim in report["aims"]] == ["reached"] * 4
    assert [aim["batch"] for aim in report["aims"]] == [1, 8, 1, 32]
    text = " ".join(shown(report).split())
    assert "yoco_u's prefill is slower than the transformer's at N = 8192 (0.88x)." in text
    assert "10.2x the transformer's: reached (10.2, B = 1; FLOPs or bytes alone give 7.07)" in text
    for words in ("76,301 [76,301]", "3,356 [3,356]", "10.21 (7.07) [10.21]", "18.89 [18.89]"):
        assert words in text
    plots.plot(report, tmp_path / "paper.svg")
    worse = {"kind": "prefill", "of": "yoco_u", "to": "transformer", "length": 262_144}
    worse |= {"batch": 1, "value": 10.14, "expected": 7.07, "paper": 10.2}
    assert comparison.aims({"ratios": [worse]})[0]["verdict"] == "not reached"
