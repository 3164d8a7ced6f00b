"""A kernel that hangs, crashes or is wrong on the device of this machine: "auto" passes it over."""

import json
import logging
import time

import jax
import numpy as np
import pytest

from pallas_kernels import check, choose_implementation, verdicts
from pallas_kernels.attention import api, gpu, triton
from pallas_kernels.device import Device, is_here
from tests.kernels import fakes
from tests.kernels.child import OPERATIONS

FAKE = Device("gpu", "Fake 1")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("YOCOU_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(verdicts, "CHILD", "tests.kernels.child")
    monkeypatch.setattr(verdicts, "LIMIT_S", 120.0)
    verdicts.forget()
    yield
    verdicts.forget()


def asked(name: str, device: Device = FAKE) -> list[str | None]:
    return [verdicts.why_not(name, operation, device) for operation in OPERATIONS]


def starts(folder) -> int:
    return len((folder / "started").read_text().splitlines())


def test_a_check_runs_once_for_a_device_and_these_versions(tmp_path, monkeypatch):
    assert asked("good") == [None] * 4
    assert asked("wrong") == ["It is wrong."] * 4
    verdicts.forget()
    assert asked("good") == [None] * 4
    assert starts(tmp_path) == 2
    kept = json.loads(verdicts.file("Fake 1").read_text())
    assert kept["kind"] == "Fake 1"
    assert kept["versions"]["jax"] == jax.__version__
    verdicts.forget()
    monkeypatch.setattr(verdicts, "versions", lambda: {"jax": "another one"})
    assert asked("good") == [None] * 4
    assert starts(tmp_path) == 3


def test_a_kernel_that_hangs_is_stopped(monkeypatch):
    monkeypatch.setattr(verdicts, "LIMIT_S", 4.0)  # a busy machine starts Python in two
    start = time.monotonic()
    first, second, third, fourth = asked("hang-cross_attention")
    assert time.monotonic() - start < 60
    assert first is None
    assert second == (
        "Its check of cross_attention on this device ended after 4 s without an answer."
    )
    assert third == fourth == "It was not checked, because cross_attention hung."


def test_after_a_crash_a_new_process_checks_the_rest(tmp_path):
    assert asked("crash-cross_attention") == [
        None,
        "Its check of cross_attention on this device crashed (SIGABRT).",
        None,
        None,
    ]
    assert asked("fail-decode_cross") == [None, None, None, "It failed."]
    assert asked("fail-window_attention") == ["It failed.", None, None, None]
    assert starts(tmp_path) == 2 + 1 + 2


def test_a_check_that_could_not_run_says_nothing_about_the_kernel():
    for reason in asked("start"):
        assert reason == (
            "It was not checked on this device, because its check ended with exit code 1: "
            "RuntimeError: no device here; python -m experiments.check_device checks it."
        )
    assert not verdicts.file("Fake 1").exists()


def test_a_process_that_uses_the_tpu_starts_no_other(tmp_path):
    reason = verdicts.why_not("good", "decode_cross", Device("tpu", "Fake 2"))
    assert "because this process already uses the TPU" in reason
    assert "python -m experiments.check_device" in reason
    assert not (tmp_path / "started").exists()


def test_a_process_with_another_device_gives_no_verdict():
    for reason in asked("good", Device("gpu", "Fake 2")):
        assert "because a new process computes on a Fake 1;" in reason


def test_a_folder_that_cannot_be_written_costs_a_check(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(verdicts, "cache_folder", lambda: tmp_path / "file")
    with caplog.at_level(logging.WARNING, logger="pallas_kernels"):
        assert asked("good") == [None] * 4
    assert "YOCOU_JAX_CACHE names another folder" in caplog.text


def test_a_damaged_file_is_made_again(tmp_path):
    assert asked("good") == [None] * 4
    verdicts.file("Fake 1").write_text("{")
    verdicts.forget()
    assert asked("good") == [None] * 4
    assert starts(tmp_path) == 2


def test_the_first_start_on_a_machine_checks_until_a_kernel_passes(tmp_path):
    for _ in range(2):  # the second start finds what the first has made
        verdicts.before_start(["wrong", "good", "crash-decode_cross"], ["10de:1234"], "gpu")
    assert starts(tmp_path) == 2
    assert asked("wrong") == ["It is wrong."] * 4
    assert asked("good") == [None] * 4
    assert starts(tmp_path) == 2
    verdicts.before_start(["good"], ["10de:5678"], "gpu")  # another machine with the same home
    assert starts(tmp_path) == 3


def test_a_start_while_another_program_holds_the_device_keeps_nothing(tmp_path):
    """jax then computes on the CPU without an error."""
    for count in (1, 2):
        verdicts.before_start(["good"], ["1ae0:0063"], "tpu")
        assert starts(tmp_path) == count


def test_a_check_that_cannot_start_is_no_verdict(monkeypatch):
    def no_memory(*args):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(verdicts, "run_child", no_memory)
    (reason,) = set(asked("good"))
    assert "its check could not start (Cannot allocate memory)" in reason
    assert not verdicts.file("Fake 1").exists()


def test_a_cpu_has_no_gate_and_no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(verdicts, "run_child", None)
    assert not is_here(Device("cpu", "cpu"))
    assert not is_here(Device("gpu", "NVIDIA H200"))  # only compiled for
    api.check_kernels()
    assert choose_implementation("cross_attention").reason == "auto"
    assert not list(tmp_path.iterdir())


def test_in_a_run_of_several_processes_a_check_must_pass_in_all(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert "did not compare their checks" in asked("good")[0]
    other = np.array([[True] * 4, [True, False, True, True]])
    monkeypatch.setattr(
        verdicts.multihost_utils, "process_allgather", lambda mine: np.stack([mine, other])
    )
    verdicts.agree(["wrong", "good"], OPERATIONS, FAKE)
    assert asked("good") == [None, "Its check did not pass on every host.", None, None]
    assert asked("wrong") == ["It is wrong."] * 4


# --- Fakes in the table, checked by the real check ------------------------------------------------


@pytest.fixture
def accelerator(monkeypatch):
    """The CPU counts as an accelerator, and the table has only the fakes named, and xla."""
    monkeypatch.setattr(api, "is_here", lambda device: True)
    monkeypatch.setattr(verdicts, "CHILD", "tests.kernels.fakes")

    def table(*names):
        rows = {name: fakes.FAKES[name] for name in names}
        monkeypatch.setattr(api, "_REGISTRY", rows | {"xla": api._REGISTRY["xla"]})

    return table


@pytest.mark.parametrize(
    ("name", "limit_s", "sentence"),
    [
        ("crashes", 120, "Its check of decode_window on this device crashed (SIGABRT)"),
        ("wrong", 120, "Its check of decode_window gave a wrong out: the relative error is 2."),
        pytest.param(
            *("hangs", 25, "Its check of decode_window on this device ended after 25 s without an"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_auto_passes_over_a_fake_kernel_and_takes_the_next(
    name, limit_s, sentence, accelerator, monkeypatch
):
    monkeypatch.setattr(verdicts, "LIMIT_S", limit_s)
    accelerator(name)
    choice = choose_implementation("decode_window")
    assert choice.implementation == "xla"
    assert choice.reason.startswith(f"auto; not {name}: {sentence}")
    named = choose_implementation("decode_window", implementation=name)
    assert named.implementation == name


def test_auto_takes_a_fake_kernel_that_passes(accelerator):
    accelerator("good")
    choice = choose_implementation("decode_window")
    assert (choice.implementation, choice.reason) == ("good", "auto")
    other = choose_implementation("decode_cross")
    assert other.reason.endswith("Its check has no call of decode_cross that it supports")


@pytest.mark.parametrize(
    ("name", "operation", "sentence"),
    [
        ("fails", "cross_attention", "failed: RuntimeError: Too many resources requested for"),
        ("wrong_gradient", "window_attention", "gave a wrong dv: the relative error is 2"),
        ("not_a_number", "decode_window", "gave a wrong out: the relative error is nan"),
    ],
)
def test_what_the_check_finds(name, operation, sentence, monkeypatch):
    monkeypatch.setattr(api, "_REGISTRY", api._REGISTRY | fakes.FAKES)
    monkeypatch.setattr(check, "CASES", fakes.CASES)
    known = [o for o in OPERATIONS if o != operation]
    found = check.rows(name, known)
    assert next(found)["operations"] == list(OPERATIONS)
    assert sentence in next(found)["reason"]


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("pallas_tpu", Device("tpu", "TPU v5 lite")),
        ("pallas_gpu", Device("gpu", "NVIDIA H200")),
        ("triton", Device("gpu", "NVIDIA A100")),
        ("cudnn", Device("gpu", "NVIDIA A100")),
    ],
)
def test_the_check_has_a_call_of_each_operation_that_a_kernel_supports(name, device, monkeypatch):
    """So no kernel is passed over only because its check has no call for it."""
    monkeypatch.setattr(jax, "default_backend", lambda: device.platform)
    monkeypatch.setattr(gpu.plgpu, "InterpretGPUParams", None, raising=False)
    monkeypatch.setattr(triton, "_missing_triton", lambda: None)
    monkeypatch.setattr(triton, "_misfit", lambda: None)
    for operation in OPERATIONS:
        calls = [check.described(operation, case, device) for case in check.CASES[operation]]
        reasons = [api.unsupported_reason(name, call) for call in calls]
        assert None in reasons, reasons
