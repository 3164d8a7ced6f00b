"""The parts of verify_device: each is written when it ends, and none takes the others with it."""

import json

import pytest

from benchmarks import verify
from benchmarks.verify import Part

REPORT = {
    "machine": {"devices": {"platform": "cpu", "kind": "Fake 1", "count": 1}},
    "auto": {"window_attention": {"implementation": "xla", "reason": "auto"}},
}


def part(name: str, code: str, weight: float = 1.0, file: str | None = None) -> Part:
    return Part(name, f"What is {name}?", ["-c", code, "{out}"], weight, file)


PARTS = {
    "good": part("good", 'print(\'{"speed": 1.25, "rows": [1, 2]}\')'),
    "wrong": part("wrong", "import sys; print('{\"passed\": false}'); sys.exit(1)"),
    "crashes": part("crashes", "import os; os.abort()"),
    "hangs": part(
        "hangs",
        "import sys, time; from pathlib import Path;"
        "Path(sys.argv[1], 'x.json').write_text('{\"half\": 1}'); time.sleep(99)",
        0.02,
        "x.json",
    ),
    "last": part("last", "print('{\"speed\": 2}')"),
}


@pytest.fixture
def fakes(monkeypatch):
    code = f"import json; print(json.dumps({REPORT}))"
    monkeypatch.setattr(verify, "LEAST_S", 0.5)
    monkeypatch.setattr(verify, "first_part", lambda: part("check", code))
    monkeypatch.setattr(verify, "parts", lambda report: list(PARTS.values()))


def test_every_part_is_written_and_says_how_it_ended(fakes, tmp_path):
    folder, failures = verify.measure(tmp_path, 120.0)
    assert folder == tmp_path / "fake-1"
    assert failures == [
        "wrong: The answer says what is wrong.",
        "crashes: The command crashed (SIGABRT).",
        "hangs: The command ended after 2 s without an answer.",
    ]
    written = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert set(written) == {"check", *PARTS}
    assert {name: record["answer"] for name, record in written.items() if name != "check"} == {
        "good": {"speed": 1.25, "rows": [1, 2]},
        "wrong": {"passed": False},
        "crashes": None,
        "hangs": {"half": 1},
        "last": {"speed": 2},
    }
    page = (folder / "good.md").read_text()
    assert "What is good?" in page
    assert "| speed | 1.25 |" in page
    assert "crashed (SIGABRT)" in (folder / "crashes.md").read_text()


def test_a_run_that_is_cut_short_has_its_parts(fakes, tmp_path, monkeypatch):
    real = verify.run

    def run(part, left_s):
        if part.name == "wrong":
            raise KeyboardInterrupt
        return real(part, left_s)

    monkeypatch.setattr(verify, "run", run)
    with pytest.raises(KeyboardInterrupt):
        verify.measure(tmp_path)
    assert {path.name for path in (tmp_path / "fake-1").iterdir()} == {
        *("check.json", "check.md", "good.json", "good.md")
    }


def test_no_part_starts_after_the_budget(fakes, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "LEAST_S", 1000.0)
    record = verify.run(PARTS["good"], 999.0)
    assert record["failure"] == "It did not start, because the time was over."
    folder, failures = verify.measure(tmp_path)
    assert folder == tmp_path / "unknown-device"
    assert "did not start" in failures[0]


def test_a_first_part_that_hangs_is_written_too(fakes, tmp_path, monkeypatch):
    code = (
        "import sys, time; print('pallas_gpu hangs', file=sys.stderr, flush=True); time.sleep(99)"
    )
    monkeypatch.setattr(verify, "first_part", lambda: part("check", code))
    folder, _ = verify.measure(tmp_path, 4.0)
    record = json.loads((folder / "check.json").read_text())
    assert record["failure"] == "The command ended after 2 s without an answer."
    assert "pallas_gpu hangs" in record["log"]


def test_parts_that_hang_end_within_the_budget_and_leave_the_others_their_share(
    fakes, tmp_path, monkeypatch
):
    clock = [0.0]
    monkeypatch.setattr(verify.time, "monotonic", lambda: clock[0])
    report = REPORT | {"machine": {"devices": {"platform": "gpu", "count": 1, "kind": "Fake 1"}}}
    parts = real_parts(report | {"auto": {"window_attention": {"implementation": "triton"}}})
    monkeypatch.setattr(verify, "parts", lambda report: parts)
    limits = {}

    def run(part, limit_s):
        limits[part.name] = limit_s
        clock[0] += 0.0 if part.name in quick else limit_s
        answer = report if part.name == "check" else None
        record = {"part": part.name, "question": "", "command": [], "date": "", "seconds": 0.0}
        return record | {"answer": answer, "failure": None}

    monkeypatch.setattr(verify, "run", run)
    quick = set()
    verify.measure(tmp_path)
    assert sum(limits.values()) == pytest.approx(480)
    assert limits["check"] == pytest.approx(240)
    assert len(limits) == 8
    assert min(limits.values()) > 25
    least = dict(limits)
    clock[0], quick = 0.0, {"check", "kernels"}
    verify.measure(tmp_path)
    assert limits["inference"] > 1.9 * least["inference"]
    record = real_run(PARTS["good"]._replace(words=["-c", "print('{}')", "--s={budget}"]), 100.0)
    assert record["command"][-1] == "--s=60"


real_parts, real_run = verify.parts, verify.run


@pytest.mark.parametrize(("platform", "count"), [("cpu", 1), ("gpu", 4), ("tpu", 8)])
def test_the_parts_of_a_device(platform, count):
    """A GPU is also asked for its deterministic operations, and a batch divides among devices."""
    report = {**REPORT, "machine": {"devices": {"platform": platform, "count": count}}}
    names = [part.name for part in verify.parts(report)]
    assert ("resume_deterministic" in names) == (platform == "gpu")
    big = {"training_yocou_125m", "training_yocou_1b"}
    assert (set(names) >= big) == (platform != "cpu")
    words = {part.name: part.words for part in verify.parts(report)}
    if platform == "gpu":
        assert "verify.resume('xla', True)" in words["resume_deterministic"][1]
    if platform != "cpu":
        assert f"--config.data.batch_size={2 * count}" in words["training_yocou_1b"]


@pytest.mark.parametrize("kernel", ["xla", "triton"])
def test_a_model_is_not_trained_twice_with_xla(kernel):
    report = {**REPORT, "auto": {"window_attention": {"implementation": kernel}}}
    names = [part.name for part in verify.parts(report)]
    assert ("parity" in names) == (kernel != "xla")
