"""Sizes, budgets, rows of the report and the loop that is timed; one tiny run measures."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import cases, kernels, timing

TINY = cases.CPU._replace(
    lengths=(16,), heads=(2, 1), head_widths=(8,), decode=(), decode_ring=(1,), rounds=1
)._replace(copy_bytes=4096, matmul=16, error_length=16)


def test_pairs_are_those_that_a_query_sees():
    for N, window in ((5, None), (5, 2), (5, 5), (3, 9)):
        i, j = np.arange(N)[:, None], np.arange(N)[None, :]
        seen = (j <= i) & (i - j < (window or N))
        case = cases.Case("window_attention", 1, N, N, 2, 1, 8, window)
        assert case.pairs == seen.sum()
        assert case.flops == 4 * 8 * seen.sum() * 2
        assert case._replace(backward=True).flops == 3.5 * case.flops
    decode = cases.Case("decode_cross", 3, 1, 100, 4, 2, 8, None)
    assert decode.bytes(2) == 3 * 100 * 2 * 8 * 2 * 2


def test_cases_cover_what_is_asked_for():
    found = [case for group in cases.grouped(cases.ACCELERATOR) for case in group]
    attention = [case for case in found if not case.decodes]
    assert {case.N for case in attention} == {2048 * 2**i for i in range(6)}
    assert {case.H for case in attention} == {64, 128}
    assert {case.window for case in attention} == {None, 512}
    assert len(attention) == 6 * 2 * 2 * 2
    decode = {(case.operation, case.B, case.S) for case in found if case.decodes}
    assert {("decode_cross", 8, 131_072), ("decode_window", 8, 512)} <= decode


def test_the_loop_makes_every_call_and_each_sees_the_one_before():
    def call(x, y):
        return {"a": 1e6 * (x + 1.0), "b": y}

    x, y = jnp.zeros((2, 3)), jnp.zeros((4,))
    got = jax.jit(timing.repeated(call, 3))(x, y)
    # x00 -> x00 + 1e-6 (1e6 (x00 + 1)), three times from 0: 1, 3, 7.
    np.testing.assert_allclose(got, np.array([[7.0, 0, 0], [0, 0, 0]]), rtol=1e-5)


def test_a_dense_or_slow_call_is_left_out():
    case = cases.Case("cross_attention", 1, 65_536, 65_536, 16, 4, 128, None)
    pace = timing.Pace(2e14)
    dense, blocked = (kernels.Subject(lambda: None, dense=dense) for dense in (True, False))
    assert "256 GiB" in kernels._left_out(case, "reference", dense, pace, cases.ACCELERATOR)
    assert kernels._left_out(case, "xla", blocked, pace, cases.ACCELERATOR) is None
    pace.note("xla", case, 3.0)
    assert "3.0 s" in kernels._left_out(case, "xla", blocked, pace, cases.ACCELERATOR)


@pytest.mark.slow
def test_a_tiny_run_reports_failures_and_what_was_left_out(monkeypatch):
    usual = kernels.subjects

    def subjects(case, dtype):
        def broken(*args):
            raise NotImplementedError("Not today.\nMore.")

        def inaccurate(q, k, v, lengths=None):
            return 1.1 * usual(case, dtype)["xla"].call(*[q, k, v, lengths][: 3 + case.decodes])

        found = {"xla": usual(case, dtype)["xla"], "broken": kernels.Subject(broken, True)}
        return found | {"off": kernels.Subject(inaccurate, True)}

    monkeypatch.setattr(kernels, "subjects", subjects)
    monkeypatch.setattr(cases, "WINDOW", 4)
    monkeypatch.setattr(kernels, "ERROR_OPERATIONS", ("decode_cross",))
    kept = []
    keep = lambda report: kept.append((report["complete"], kernels.markdown(report)))  # noqa: E731
    report = json.loads(json.dumps(kernels.measure(TINY, 1000, keep)))
    # After the errors, after each of three groups, and at the end.
    assert [complete for complete, _ in kept] == [False] * 4 + [True]
    assert "## cross_attention" not in kept[1][1]
    assert "## window_attention" in kept[1][1]
    assert "cut short" in kept[1][1]
    assert "cut short" not in kept[-1][1]
    assert {row["implementation"] for row in report["times"]} == {"xla", "broken", "off"}
    times = {
        (r["operation"], r["pass"]): r for r in report["times"] if r["implementation"] == "xla"
    }
    # There is no row for the backward if noise makes the difference negative.
    assert len([key for key in times if key[1] != kernels.DERIVED]) == 5
    assert times["cross_attention", "forward"]["tflops"] > 0
    decode, base = times["decode_window", "forward"], report["reference"]
    assert decode["of_copy"] == decode["gb_per_s"] / base["copy_gb_per_s"] > 0
    assert base["loop_turn_s"] > 0
    assert any("NotImplementedError: Not today." in x for x in report["failures"])
    assert any("off" in x and "the error of" in x for x in report["failures"])
    assert not any(x.startswith("xla") for x in report["failures"])
    page = kernels.markdown(report)
    assert "## window_attention, H = 8, forward + backward: TFLOP/s" in page
    assert "failed" in page
    assert "loop turn: " in page
    monkeypatch.setattr(kernels, "measure_errors", lambda sizes: [])
    late = kernels.measure(TINY, budget_s=-1)
    assert late["times"] == []
    assert len(late["left_out"]) == 5
    assert all(x.startswith("all, ") for x in late["left_out"])


def test_a_baseline_that_cannot_be_built_fails_alone(monkeypatch):
    def missing(case):
        raise ModuleNotFoundError("No module named 'tokamax'\nand more")

    def subjects(case, dtype):
        add = kernels.Subject(lambda q, k, v: q + 1)
        return {"add": add, "tokamax": kernels.Subject(kernels._late(missing, case))}

    monkeypatch.setattr(kernels, "subjects", subjects)
    group = [cases.Case("cross_attention", 1, 16, 16, 2, 1, 8, None)]
    rows, _ = kernels.measure_group(group, TINY, timing.Pace(1e9))
    errors = {row["implementation"]: row["error"] for row in rows}
    assert errors == {"add": None, "tokamax": "ModuleNotFoundError: No module named 'tokamax'"}
    assert kernels.failures({"errors": [], "times": rows}) == []


def test_a_call_that_fails_later_than_at_first_fails_alone(monkeypatch):
    turns = []

    def seconds(function, *args):
        turns.append(function)
        if function == "bad" and turns.count("bad") == 2:
            raise MemoryError("full")
        return 0.1

    named = {name: kernels.Subject(lambda q, k, v: q) for name in ("good", "bad")}
    monkeypatch.setattr(kernels, "subjects", lambda case, dtype: named)
    monkeypatch.setattr(timing, "compile_all", lambda programs: {key: key[1] for key in programs})
    monkeypatch.setattr(timing, "seconds", seconds)
    group = [cases.Case("cross_attention", 1, 16, 16, 2, 1, 8, None)]
    rows, _ = kernels.measure_group(group, TINY._replace(rounds=3), timing.Pace(1e9))
    found = {row["implementation"]: row for row in rows}
    assert found["bad"]["error"] == "MemoryError: full"
    assert found["good"]["samples"] == 3


def test_what_is_built_while_tracing_is_built_once_and_belongs_to_no_trace():
    built = []

    def make(case):
        built.append(jnp.ones(3))
        return lambda x: x + built[0]

    call = kernels._late(make, cases.Case("cross_attention", 1, 16, 16, 2, 1, 8, None))
    for size in (3, 1):
        np.testing.assert_allclose(jax.jit(call)(jnp.zeros(size)), np.ones(3))
    assert len(built) == 1
    assert not isinstance(built[0], jax.core.Tracer)


def test_the_backward_alone_is_the_difference_of_two_times():
    case = cases.Case("window_attention", 2, 64, 64, 4, 2, 8, 16)
    group = [case, case._replace(backward=True)]
    sub = kernels.Subject(lambda: None)

    def row(case, name, seconds, **more):
        times = {"seconds": seconds, "spread": 0.1, "samples": 5}
        return kernels._row(case, name, sub, 1) | times | more

    rows = [row(group[0], "x", 0.001), row(group[1], "x", 0.003), row(group[1], "y", 0.003)]
    rows += [row(group[0], "z", 0.001, error="no"), row(group[1], "z", 0.003)]
    rows += [row(group[0], "noisy", 0.004), row(group[1], "noisy", 0.003)]
    (found,) = kernels.derived(group, rows)
    assert (found["implementation"], found["pass"]) == ("x", kernels.DERIVED)
    assert np.isclose(found["seconds"], 0.002)
    assert np.isclose(found["tflops"], 10 * 8 * case.pairs * 4 * 2 / 0.002 / 1e12)
    assert np.isclose(found["spread"], 0.2)


def test_both_files_are_complete_at_any_time(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "markdown", lambda report: "page")
    kernels.write(tmp_path, {"times": [1]})
    kernels.write(tmp_path, {"times": [1, 2]})
    assert json.loads((tmp_path / "kernels.json").read_text()) == {"times": [1, 2]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernels.json", "kernels.md"]
