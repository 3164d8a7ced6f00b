"""A kernel that hangs, crashes or is wrong on the device of this machine: "auto" passes it over."""

import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from pallas_kernels import check, children, choose_implementation, device, verdicts
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
    monkeypatch.setattr(verdicts, "USUAL_LIMIT_S", 120.0)
    verdicts.forget()
    yield
    verdicts.forget()


def asked(name: str, device: Device = FAKE, dtype=None) -> list[str | None]:
    return [verdicts.why_not(name, operation, device, dtype) for operation in OPERATIONS]


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


@pytest.mark.parametrize(
    ("usual_s", "kept"), [(120.0, False), pytest.param(6.0, True, marks=pytest.mark.slow)]
)
def test_a_kernel_that_hangs_is_stopped(usual_s, kept, monkeypatch):
    """Its verdict is kept only if it had the usual time."""
    monkeypatch.setattr(verdicts, "LIMIT_S", 6.0)  # a busy machine starts Python in two
    monkeypatch.setattr(verdicts, "USUAL_LIMIT_S", usual_s)
    start = time.monotonic()
    first, second, third, fourth = asked("hang-cross_attention")
    assert time.monotonic() - start < 60
    assert first is None
    assert second == (
        "Its check of cross_attention in bfloat16 on this device ended after 6 s without an answer."
    )
    assert third == fourth == "It was not checked, because cross_attention in bfloat16 hung."
    assert verdicts.file("Fake 1").exists() == kept


def test_after_a_crash_a_new_process_checks_the_rest(tmp_path):
    assert asked("crash-cross_attention") == [
        None,
        "Its check of cross_attention in bfloat16 on this device crashed (SIGABRT).",
        None,
        None,
    ]
    assert asked("fail-decode_cross") == [None, None, None, "It failed."]
    assert asked("fail-window_attention") == ["It failed.", None, None, None]
    assert starts(tmp_path) == 2 + 2 + 2


def test_a_verdict_is_about_one_dtype():
    assert asked("fail-float32") == [None] * 4
    assert asked("fail-float32", dtype="float32")[3] == "It failed."
    assert asked("good", dtype="float32")[2:] == [
        "Its check has no call of decode_window in float32 that it supports.",
        None,
    ]
    assert "no call of decode_cross in float16" in asked("good", dtype="float16")[3]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("killed-decode_cross", "was ended by SIGKILL"),
        ("memory-decode_cross", "ended with exit code 4: MemoryError: no memory"),
    ],
)
def test_what_came_from_outside_is_no_verdict(name, words, tmp_path):
    """It is checked again by the next start."""
    for count in (1, 2):
        (reason,) = set(asked(name))
        assert f"because its check of decode_cross in bfloat16 {words};" in reason
        assert starts(tmp_path) == count
        verdicts.forget()
    assert not verdicts.file("Fake 1").exists()


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


@pytest.mark.parametrize("text", ["{", "[1]", '{"verdicts": {"good": 3}, "machines": []}'])
def test_a_damaged_file_is_made_again(text, tmp_path):
    verdicts._make_folder()
    verdicts.file("Fake 1").write_text(text)
    assert asked("good") == [None] * 4
    assert starts(tmp_path) == 1


def test_only_null_is_a_pass():
    verdicts._make_folder()
    rows = {"window_attention in bfloat16": False, "decode_cross in bfloat16": None}
    kept = {"verdicts": {"good": rows}, "machines": []}
    verdicts.file("Fake 1").write_text(json.dumps(kept))
    assert [reason is None for reason in asked("good")] == [False, False, False, True]


def test_verdicts_that_another_user_could_write_are_not_read(tmp_path, caplog, monkeypatch):
    assert asked("good") == [None] * 4
    folder = tmp_path / "kernels"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o770)
    with caplog.at_level(logging.WARNING, logger="pallas_kernels"):
        for count in (2, 3):
            verdicts.forget()
            assert asked("good") == [None] * 4
            assert starts(tmp_path) == count
    assert "kernels (other users may write to it): each start checks them again" in caplog.text
    folder.chmod(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(PermissionError, match="it belongs to another user"):
        verdicts._make_folder()


def test_a_start_waits_for_another_one_that_checks(monkeypatch, tmp_path):
    monkeypatch.setattr(verdicts, "WAIT_S", 0.3)
    lock = verdicts._make_folder() / f"{verdicts._digest()}.lock"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        (reason,) = set(asked("good"))
    assert "because another process still checks after 0.3 s;" in reason
    assert not (tmp_path / "started").exists()
    verdicts.forget()
    assert asked("good") == [None] * 4  # its owner has gone


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it ends when its time is over")
def test_a_child_ends_with_the_process_that_started_it(tmp_path):
    """That process is killed, so it cannot stop its child itself."""
    file = tmp_path / "child"
    child = f"import os, time; open({str(file)!r}, 'w').write(f'{{os.getpid()}} '); time.sleep(99)"
    words = children.bound(["-c", child], 30)
    words[words.index(str(os.getpid()))] = "PARENT"
    code = (
        "import os, subprocess, sys;"
        "subprocess.run([str(os.getpid()) if w == 'PARENT' else w for w in sys.argv[1:]])"
    )
    parent = subprocess.Popen([sys.executable, "-I", "-S", "-c", code, *words])
    while not (file.exists() and file.read_text().endswith(" ")):
        time.sleep(0.01)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    end = time.monotonic() + 10
    while _runs(int(file.read_text())):
        assert time.monotonic() < end
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return " Z " not in state


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
    def no_memory(*args, **kwargs):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(children, "run", no_memory)
    (reason,) = set(asked("good"))
    assert "its check could not start (Cannot allocate memory)" in reason
    assert not verdicts.file("Fake 1").exists()


def test_a_cpu_has_no_gate_and_no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(children, "run", None)
    assert not is_here(Device("cpu", "cpu"))
    assert not is_here(Device("gpu", "NVIDIA H200"))  # only compiled for
    api.check_kernels()
    assert choose_implementation("cross_attention").reason == "auto"
    assert not list(tmp_path.iterdir())


def test_a_device_is_here_if_any_platform_of_jax_has_it(monkeypatch, unchecked):
    """For example with JAX_PLATFORMS=cpu,cuda and a mesh of GPUs."""
    card = types.SimpleNamespace(
        platform="cuda", device_kind="NVIDIA H200", compute_capability="9.1"
    )

    def local_devices(backend=None):
        if backend == "tpu":
            raise RuntimeError("Unknown backend tpu")
        return [card] if backend == "gpu" else jax.devices()

    monkeypatch.setattr(device.jax, "local_devices", local_devices)
    assert is_here(Device("gpu", "NVIDIA H200"))
    assert Device("gpu", "NVIDIA H200").compute_capability == 91
    assert Device("gpu", "NVIDIA H100").compute_capability == 90  # only compiled for: by the table
    assert not is_here(Device("tpu", "TPU v6 lite"))
    assert not is_here(Device("cpu", "cpu"))


def test_the_accelerators_of_the_bus(tmp_path, monkeypatch):
    rows = {
        "00:01.0": ("0x10de", "0x2330", "0x030200"),  # an NVIDIA card
        "00:02.0": ("0x10de", "0x2330", "0x030200"),
        "00:03.0": ("0x10de", "0x22a3", "0x068000"),  # a bridge of NVIDIA
        "00:04.0": ("0x1ae0", "0x0063", "0x120000"),  # a TPU
        "00:05.0": ("0x1ae0", "0x0042", "0x020000"),  # a network card of Google
        "00:06.0": ("0x8086", "0x1237", "0x060000"),
    }
    for address, facts in rows.items():
        (tmp_path / address).mkdir()
        for name, text in zip(("vendor", "device", "class"), facts, strict=True):
            (tmp_path / address / name).write_text(text + "\n")
    (tmp_path / "00:07.0").mkdir()  # the system says nothing about it
    monkeypatch.setattr(verdicts, "_PCI", tmp_path)
    assert verdicts.bus("gpu") == ["10de:2330"]
    assert verdicts.bus("tpu") == ["1ae0:0063"]
    there = {"jax_cuda12_plugin"}
    monkeypatch.setattr(verdicts.importlib.util, "find_spec", lambda name: name in there or None)
    monkeypatch.setattr(verdicts, "_platforms", list)
    assert verdicts.accelerators() == {"gpu": ["10de:2330"]}
    there.add("libtpu")
    assert verdicts.accelerators() == {"gpu": ["10de:2330"], "tpu": ["1ae0:0063"]}
    monkeypatch.setattr(verdicts, "_platforms", lambda: ["cpu"])
    assert verdicts.accelerators() == {}


@pytest.mark.parametrize(
    ("platforms", "theirs"), [([], None), (["cuda"], "cuda,cpu"), (["cpu", "cuda"], "cuda,cpu")]
)
def test_a_child_computes_on_the_accelerator_and_has_a_host(platforms, theirs, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(verdicts, "_platforms", lambda: platforms)
    found = verdicts.environment()
    assert found["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert found.get("JAX_PLATFORMS") == theirs


@pytest.mark.parametrize(
    "pod",
    [
        {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1", "TPU_HOST_BOUNDS": "1,2,1"},
        {"TPU_PROCESS_ADDRESSES": "a:8476,b:8476", "TPU_PROCESS_PORT": "8476"},
        {
            "MEGASCALE_NUM_SLICES": "2",
            "MEGASCALE_COORDINATOR_ADDRESS": "a",
            "CLOUD_TPU_TASK_ID": "3",
        },
    ],
)
def test_a_child_does_not_join_a_pod(pod, monkeypatch):
    for name, value in pod.items():
        monkeypatch.setenv(name, value)
    theirs = {
        "TPU_PROCESS_BOUNDS": "1,1,1",
        "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1",
        "TPU_VISIBLE_CHIPS": "0",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "CLOUD_TPU_TASK_ID": "0",
    }
    found = verdicts.environment()
    assert {name: found[name] for name in found if name in (pod | theirs)} == theirs


def test_one_host_keeps_its_chips(monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    assert "TPU_VISIBLE_CHIPS" not in verdicts.environment()


def test_a_verdict_depends_on_the_packages_and_the_flags_of_xla(monkeypatch):
    def package(name, version):
        return types.SimpleNamespace(metadata={"Name": name}, version=version)

    names = ("jax", "jaxlib", "jax_cuda13_pjrt", "libtpu-nightly", "jaxtyping", None)
    packages = [package(name, str(i)) for i, name in enumerate(names)]
    find = lambda: [*packages, package("jax", "old")]  # noqa: E731
    monkeypatch.setattr(verdicts.importlib.metadata, "distributions", find)
    monkeypatch.setenv("XLA_FLAGS", "--xla_some_flag")
    found = verdicts.versions.__wrapped__()
    digests = found.pop("pallas_kernels"), found.pop("driver", None)
    assert len(digests[0]) == 16
    assert found == {
        **{"jax": "0", "jaxlib": "1", "jax-cuda13-pjrt": "2", "libtpu-nightly": "3"},
        "XLA_FLAGS": "--xla_some_flag",
    }


def test_in_a_run_of_several_processes_a_check_must_pass_in_all(monkeypatch, tmp_path):
    for name in ("wrong", "good"):
        verdicts.check(name)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert "did not compare their checks" in asked("good")[0]
    other = np.ones((3, 8), bool)  # in float32 too
    other[1, 1] = False
    monkeypatch.setattr(
        verdicts.multihost_utils, "process_allgather", lambda mine: np.stack([mine, other])
    )
    verdicts.agree(["wrong", "good", "nobody"], OPERATIONS, FAKE)
    assert asked("good") == [None, "Its check did not pass on every host.", None, None]
    assert asked("wrong") == ["It is wrong."] * 4
    assert asked("good", dtype="float32")[3] is None
    (reason,) = set(asked("nobody"))
    assert "because no check was made before the processes of this run joined;" in reason
    assert starts(tmp_path) == 2  # while the others wait, no process checks


@pytest.mark.slow
def test_two_processes_agree(tmp_path):
    """Each has a verdict of its own; one has none about the second kernel."""
    script = tmp_path / "agree.py"
    script.write_text(AGREE)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    words = [[sys.executable, str(script), address, str(rank)] for rank in range(2)]
    env = os.environ | {"PYTHONPATH": os.getcwd(), "XLA_FLAGS": ""}
    pipes = {"stdout": subprocess.PIPE, "env": env, "text": True}
    both = [subprocess.Popen(line, **pipes) for line in words]
    found = [json.loads(process.communicate(timeout=100)[0].splitlines()[-1]) for process in both]
    assert found == [
        [None, "Its check did not pass on every host.", "Its check did not pass on every host."],
        [
            None,
            "It crashed.",
            "It was not checked on this device, because no check was made before "
            "the processes of this run joined; python -m experiments.check_device checks it.",
        ],
    ]


AGREE = """
import json, sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from pallas_kernels import verdicts
from pallas_kernels.device import Device
device, rank = Device("gpu", "Fake 1"), int(sys.argv[2])
parts = [verdicts.part(o, d) for o in ("one", "two") for d in verdicts.DTYPES]
verdicts._known[device.kind, "good"] = dict.fromkeys(parts)
if rank == 1:
    verdicts._known[device.kind, "good"]["two in bfloat16"] = "It crashed."
else:
    verdicts._known[device.kind, "other"] = dict.fromkeys(parts)
verdicts.agree(["good", "other"], ["one", "two"], device)
asked = [("good", "one"), ("good", "two"), ("other", "one")]
print(json.dumps([verdicts.why_not(name, o, device) for name, o in asked]), flush=True)
"""


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
        ("crashes", 120, "Its check of decode_window in bfloat16 on this device crashed (SIG"),
        ("wrong", 120, "Its check of decode_window gave a wrong out: the relative error is 2."),
        pytest.param(
            *(
                "hangs",
                12,  # the import of jax is a part of it
                "Its check of decode_window in bfloat16 on this device ended after 12 s",
            ),
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
    assert other.reason.endswith("no call of decode_cross in bfloat16 that it supports")


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
    known = [f"{o} in bfloat16" for o in OPERATIONS if o != operation]
    found = check.rows(name, known)
    assert next(found)["parts"] == [f"{o} in bfloat16" for o in OPERATIONS]
    assert sentence in next(found)["reason"]


def test_a_device_without_memory_says_nothing_about_a_kernel(monkeypatch, capsys):
    def no_memory(name, what):
        with check._memory_errors():
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory.\nMore.")

    monkeypatch.setattr(check, "check", no_memory)
    assert check.main(["good"]) == verdicts.NO_MEMORY
    assert len(capsys.readouterr().out.splitlines()) == 1  # the device, but no row


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
    monkeypatch.setattr("pallas_kernels.attention.cudnn.is_here", lambda device: True)
    monkeypatch.setattr(gpu.plgpu, "InterpretGPUParams", None, raising=False)
    monkeypatch.setattr(triton, "_missing_triton", lambda: None)
    monkeypatch.setattr(triton, "_misfit", lambda: None)
    for what, (operation, cases) in check.parts().items():
        calls = [check.described(operation, case, device) for case in cases]
        reasons = [api.unsupported_reason(name, call) for call in calls]
        if name == "pallas_tpu":
            assert set(reasons) == {None}, reasons
        elif "bfloat16" in what:
            assert None in reasons, reasons
