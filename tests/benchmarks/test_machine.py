"""What is wrong with a machine, in sentences."""

import sys

import pytest

from benchmarks import machine
from benchmarks.machine import Machine, Problem, problems
from pallas_kernels import OPERATIONS, children, verdicts

GOOD = Machine(
    system="Linux",
    cores=2,
    memory_bytes=2**33,
    versions={"jax": "0.11.2", "jaxlib": "0.11.2"},
    jax_platforms="",
    nvidia=[],
    tpu=[],
    devices={"platform": "cpu", "kind": "cpu", "count": 1, "memory_bytes": None, "runtime": "cpu"},
    devices_error=None,
    unwritable={},
    full={},
)
CARD = GOOD._replace(nvidia=["NVIDIA H100, 580.1, 81559 MiB"])
PLUGIN = {**GOOD.versions, "jax-cuda13-plugin": "0.11.2", "jax-cuda13-pjrt": "0.11.2"}
FOUND = {**GOOD.devices, "platform": "gpu", "kind": "NVIDIA H100"}


@pytest.mark.parametrize(
    "usable",
    [
        GOOD,
        GOOD._replace(jax_platforms="cpu"),
        GOOD._replace(versions=PLUGIN),
        CARD._replace(versions=PLUGIN, devices=FOUND),
        CARD._replace(versions=PLUGIN, devices=FOUND, jax_platforms="cuda,cpu"),
    ],
)
def test_a_machine_that_can_be_used_has_no_problem(usable):
    assert problems(usable) == []


@pytest.mark.parametrize(
    ("broken", "sentence", "command"),
    [
        (
            CARD,
            "This machine has an NVIDIA card, but the installed jax can only use CPUs.",
            "pip install -r requirements-gpu.txt",
        ),
        (
            CARD._replace(versions=PLUGIN, jax_platforms="cpu"),
            "JAX_PLATFORMS=cpu hides an NVIDIA card from jax.",
            "unset JAX_PLATFORMS",
        ),
        (
            CARD._replace(versions=PLUGIN),
            "This machine has an NVIDIA card, but jax does not find it and uses the CPU.",
            "nvidia-smi",
        ),
        (
            CARD._replace(versions={**GOOD.versions, "jax-cuda13-plugin": "0.12.0.1"}),
            "jax-cuda13-plugin 0.12.0.1 does not fit jaxlib 0.11.2: jax uses a plugin of its own "
            "version only, and otherwise the CPU.",
            "pip install -r requirements-gpu.txt",
        ),
        (
            GOOD._replace(tpu=["1ae0:0063"]),
            "This machine has a TPU, but the installed jax can only use CPUs.",
            "pip install -r requirements-tpu.txt",
        ),
        (
            GOOD._replace(devices={}, devices_error="ended after 120 s without an answer"),
            "jax cannot start: a process that asked for its devices ended after 120 s without an "
            "answer.",
            'python -c "import jax; jax.devices()"',
        ),
        (
            GOOD._replace(unwritable={"/data": "Read-only file system"}),
            "The folder /data cannot be written (Read-only file system).",
            "ls -ld /data",
        ),
        (
            GOOD._replace(full={"/data": 2**29}),
            "The disk of /data has only 0.5 GiB left.",
            "df -h /data",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence_with_the_command_that_mends_it(
    broken, sentence, command
):
    assert problems(broken) == [Problem(sentence, command)]


def test_the_cache_folder_has_a_mend_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("YOCOU_JAX_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(machine, "in_child", lambda call, limit_s: (GOOD.devices, None))
    found = machine.describe()
    assert list(found.unwritable) == [str(tmp_path / "file" / "cache")]
    (problem,) = (p for p in problems(found) if "cache" in p.sentence)
    assert problem.command == "export YOCOU_JAX_CACHE=/a/folder/of/yours"


def test_a_device_that_hangs_is_a_sentence(monkeypatch):
    def hangs(words, limit_s, env=None):
        return real([*words[:-1], "import time; time.sleep(1000)"], 0.5, env)

    real = children.run
    monkeypatch.setattr(children, "run", hangs)
    found, error = machine.in_child("devices()", 0.5)
    assert (found, error) == ({}, "ended after 0.5 s without an answer")


def test_the_report_names_a_kernel_that_failed(monkeypatch):
    """The checks and the processes are fakes; the report is made of them."""
    device = verdicts.Device("gpu", "NVIDIA H100")
    none = {f"{operation} in bfloat16": None for operation in OPERATIONS}
    wide = {f"{operation} in float32": None for operation in OPERATIONS}
    missing = dict.fromkeys(none | wide, "It is not installed.")
    answers = {
        "pallas_gpu": verdicts.Checked(
            device, none | {"decode_cross in bfloat16": "It crashed."}, dict.fromkeys(wide, "No.")
        ),
        "triton": verdicts.Checked(device, {}, missing),
    }

    def check(name):
        if name == "cudnn":
            raise verdicts.NotChecked("no process started")
        return answers.get(name, verdicts.Checked(device, none | wide, {}))

    auto = {o: {"implementation": "xla", "reason": "auto"} for o in OPERATIONS}
    monkeypatch.setattr(verdicts, "check", check)
    monkeypatch.setattr(machine, "describe", lambda: CARD._replace(versions=PLUGIN, devices=FOUND))
    monkeypatch.setattr(machine, "in_child", lambda call, limit_s: (auto, None))
    report = machine.measure(quick=True)
    assert [problem["sentence"] for problem in report["problems"]] == [
        'pallas_gpu: It crashed. "auto" passes it over.',
        "cudnn was not checked, because no process started.",
    ]
    rows = {row[0]: row[1:] for row in machine.grids(report)[0].rows}
    assert rows["pallas_gpu"] == [*["right / -"] * 3, "FAILED / -"]
    assert rows["triton"] == ["- / -"] * 4
    assert rows["cudnn"] == ["not checked / not checked"] * 4
    assert rows["xla"] == ["right / right"] * 4
    assert "triton: It is not installed." in machine.reasons(report)
    assert any("1 x NVIDIA H100 (gpu)" in line for line in machine.lines(report))


@pytest.mark.slow
def test_the_library_does_not_start_jax_where_a_child_should():
    """So that on a TPU the children can use it."""
    code = "from benchmarks import machine; from jax._src import xla_bridge; import json;"
    code += "print(json.dumps({'started': xla_bridge.backends_are_initialized()}))"
    ended = children.run(["-c", code], 120)
    assert ended.rows == [{"started": False}], (ended, sys.executable)
