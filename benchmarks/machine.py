"""What this machine is, what is wrong with it in sentences, and which kernels work on it.

Whatever touches a device runs in a child process with a time limit, and this process does not start
jax before they have ended: a driver may hang, and a TPU serves one process at a time.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks import cases, device, kernels
from benchmarks.report import Grid
from benchmarks.timing import Pace
from pallas_kernels import OPERATIONS, api, children, target_device, verdicts

DEVICES_LIMIT_S = 120.0
TIMES_LIMIT_S = 240.0
ROOM = 2 << 30  # free bytes below which a disk counts as full: a checkpoint of a small model
PACKAGES = (*device.PACKAGES, "jax-cuda13-pjrt", "flax", "numpy")
ACCELERATOR = cases.ACCELERATOR._replace(
    lengths=(2048,), head_widths=(128,), decode=((8, 8192),), decode_ring=(8,), rounds=3
)
CPU = cases.CPU._replace(lengths=(512,), decode=((4, 2048),), decode_ring=(4,), rounds=2)


class Problem(NamedTuple):
    """What is wrong, as a sentence, and the command that fixes it."""

    sentence: str
    command: str


class Machine(NamedTuple):
    """The facts of a machine. nvidia: its cards by nvidia-smi, or that it has a driver. tpu: the
    PCI ids of its TPU chips. devices: what `devices` finds; devices_error: why it found nothing.
    unwritable: folders that cannot be written, with the system's words. full: folders with less
    room than ROOM, with their free bytes."""

    system: str
    cores: int
    memory_bytes: int
    versions: dict[str, str]
    jax_platforms: str
    nvidia: list[str]
    tpu: list[str]
    devices: dict[str, Any]
    devices_error: str | None
    unwritable: dict[str, str]
    full: dict[str, int]


# --- The facts ------------------------------------------------------------------------------------


def nvidia_cards() -> list[str]:
    """ "name, driver version, memory" of each card. Without nvidia-smi, what shows that there is a
    card; [] if nothing does."""
    query = ["--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        found = subprocess.run(
            ["nvidia-smi", *query], capture_output=True, text=True, timeout=20, check=True
        )
        if lines := [line.strip() for line in found.stdout.splitlines() if line.strip()]:
            return lines
    except (OSError, subprocess.SubprocessError):
        pass
    signs = ("/proc/driver/nvidia/version", "/dev/nvidia0", "/dev/dxg")
    return [f"{sign} exists, but nvidia-smi gives no answer" for sign in signs if _exists(sign)][:1]


def _exists(path: str) -> bool:
    return Path(path).exists()


def devices() -> dict[str, Any]:
    """The devices that jax has in this process."""
    first = jax.devices()[0]
    return {
        "platform": first.platform,
        "kind": first.device_kind,
        "count": jax.device_count(),
        "memory_bytes": device.memory(),
        "runtime": first.client.platform_version.splitlines()[0].strip(),
    }


def in_child(call: str, limit_s: float) -> tuple[dict[str, Any], str | None]:
    """The dict that an expression of this module returns in a new process, such as "devices()".
    Without one: {} and how the process ended."""
    code = f"import json; from benchmarks import machine; print(json.dumps(machine.{call}))"
    ended = children.run(["-c", code], limit_s, verdicts.environment())
    return (ended.rows[-1], None) if ended.rows else ({}, children.how(ended, limit_s))


def _unwritable(folder: Path) -> str | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)


def _free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def describe() -> Machine:
    folders = [verdicts.cache_folder(), Path.cwd(), Path(tempfile.gettempdir())]
    if cache := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folders.append(Path(cache))
    unwritable = {str(folder): _unwritable(folder) for folder in folders}
    free = {str(folder): _free(folder) for folder in folders}
    found, error = in_child("devices()", DEVICES_LIMIT_S)
    return Machine(
        system=f"{platform.platform()}, {platform.machine()}",
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        versions=device.installed(PACKAGES),
        jax_platforms=os.environ.get("JAX_PLATFORMS", ""),
        nvidia=nvidia_cards(),
        tpu=verdicts.bus("tpu"),
        devices=found,
        devices_error=error,
        unwritable={folder: why for folder, why in unwritable.items() if why},
        full={folder: size for folder, size in free.items() if size < ROOM},
    )


# --- What is wrong --------------------------------------------------------------------------------


def _numbers(version: str) -> str:
    return re.match(r"[\d.]*", version).group().rstrip(".")


def _plugins(machine: Machine) -> list[Problem]:
    """A plugin that does not fit: jax then goes on without it."""
    jaxlib = machine.versions.get("jaxlib", "")
    return [
        Problem(
            f"{name} {version} does not fit jaxlib {jaxlib}: jax uses a plugin of its own version "
            "only, and otherwise the CPU.",
            "pip install -r requirements-gpu.txt",
        )
        for name, version in machine.versions.items()
        if re.fullmatch(r"jax-cuda\d+-(plugin|pjrt)", name)
        and _numbers(version) != _numbers(jaxlib)
    ]


def _hidden(machine: Machine, what: str, platforms: set[str], plugins: set[str], file: str):
    """Why jax does not use an accelerator that the machine has."""
    wanted = set(filter(None, machine.jax_platforms.split(",")))
    if wanted and not wanted & platforms:
        sentence = f"JAX_PLATFORMS={machine.jax_platforms} hides {what} from jax."
        return [Problem(sentence, "unset JAX_PLATFORMS")]
    if not plugins & machine.versions.keys():
        sentence = f"This machine has {what}, but the installed jax can only use CPUs."
        return [Problem(sentence, f"pip install -r {file}")]
    if machine.devices.get("platform") == "cpu" and not _plugins(machine):
        sentence = f"This machine has {what}, but jax does not find it and uses the CPU."
        look = "nvidia-smi" if "cuda" in platforms else "sudo lsof -w /dev/accel* /dev/vfio/*"
        return [Problem(sentence, look)]
    return []


def problems(machine: Machine) -> list[Problem]:
    """What is wrong with the machine, by its facts alone."""
    found = _plugins(machine)
    if machine.nvidia:
        what, plugins = "an NVIDIA card", {"jax-cuda13-plugin", "jax-cuda12-plugin"}
        found += _hidden(machine, what, {"cuda", "gpu"}, plugins, "requirements-gpu.txt")
    if machine.tpu:
        found += _hidden(machine, "a TPU", {"tpu"}, {"libtpu"}, "requirements-tpu.txt")
    if machine.devices_error:
        sentence = f"jax cannot start: a process that asked for its devices {machine.devices_error}"
        found.append(Problem(sentence.rstrip(".") + ".", 'python -c "import jax; jax.devices()"'))
    for folder, why in machine.unwritable.items():
        sentence = f"The folder {folder} cannot be written ({why})."
        cache = folder == str(verdicts.cache_folder())
        fix = "export YOCOU_JAX_CACHE=/a/folder/of/yours" if cache else f"ls -ld {folder}"
        found.append(Problem(sentence, fix))
    for folder, size in machine.full.items():
        sentence = f"The disk of {folder} has only {size / 2**30:.1f} GiB left."
        found.append(Problem(sentence, f"df -h {folder}"))
    return found


# --- The kernels ----------------------------------------------------------------------------------


def check(name: str) -> dict[str, Any]:
    """What the check of an implementation says of each part (an operation in a dtype): passed,
    failed (part: sentence) and unsupported (part: sentence); or not_checked, a clause."""
    try:
        found = verdicts.check(name)
    except verdicts.NotChecked as error:
        return {"passed": [], "failed": {}, "unsupported": {}, "not_checked": error.reason}
    failed = {part: reason for part, reason in found.verdict.items() if reason}
    passed = [part for part in found.verdict if part not in failed]
    return {"passed": passed, "failed": failed, "unsupported": found.unsupported}


def times(names: list[str]) -> dict[str, Any]:
    """Times of the implementations named, in this process: rows of benchmarks.kernels."""
    sizes = CPU if jax.default_backend() == "cpu" else ACCELERATOR
    pace, rows = Pace(1e10 if sizes is CPU else 1e14), []
    for group in cases.grouped(sizes):
        rows += kernels.measure_group(group, sizes, pace, names)[0]
    return {"rows": rows}


def choices(checks: dict[str, dict]) -> dict[str, dict[str, str]]:
    """What "auto" takes for each operation on this process's device (on an accelerator: in
    bfloat16), and why. checks: what `check` has said of each implementation."""
    kind = target_device().kind
    for name, row in checks.items():
        clause = row.get("not_checked")
        verdict = clause or {**row["failed"], **dict.fromkeys(row["passed"])}
        verdicts.tell(name, kind, verdict)
    found = {operation: api.choose_implementation(operation) for operation in OPERATIONS}
    return {o: {"implementation": c.implementation, "reason": c.reason} for o, c in found.items()}


def measure(quick: bool, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """The machine, its problems, the checks, times (not if quick), what "auto" takes."""
    say("Looking at the machine and at the devices of jax.")
    machine = describe()
    report: dict[str, Any] = {"machine": machine._asdict(), "checks": {}, "times": [], "auto": {}}
    found = problems(machine)
    if machine.devices:
        for name in (n for n in api.IMPLEMENTATIONS if n not in ("auto", "reference")):
            say(f"Checking {name} (at most {verdicts.LIMIT_S:g} s without an answer).")
            report["checks"][name] = check(name)
        found += _failures(report["checks"])
        if not quick:
            say("Measuring times.")
            names = [name for name, row in report["checks"].items() if row["passed"]]
            timed, error = in_child(f"times({json.dumps(names)})", TIMES_LIMIT_S)
            report["times"] = timed.get("rows", [])
            if error:
                sentence = f"The process that measured times {error.rstrip('.')}."
                found.append(Problem(sentence, "python -m experiments.benchmark_kernels"))
        report["auto"], error = in_child(f"choices({report['checks']!r})", DEVICES_LIMIT_S)
        if error:
            sentence = f"The process that asked what auto takes {error.rstrip('.')}."
            found.append(Problem(sentence, "python -m experiments.check_device"))
    return report | {"problems": [problem._asdict() for problem in found]}


def _failures(checks: dict[str, dict]) -> list[Problem]:
    found = []
    for name, row in checks.items():
        again = f"python -m pallas_kernels.check {name}"
        if "not_checked" in row:
            found.append(Problem(f"{name} was not checked, because {row['not_checked']}.", again))
        for reason in row["failed"].values():
            found.append(Problem(f'{name}: {reason} "auto" passes it over.', again))
    return found


# --- The report -----------------------------------------------------------------------------------


def lines(report: dict[str, Any]) -> list[str]:
    """What the machine is, in lines."""
    machine, found = report["machine"], report["machine"]["devices"]
    memory = found.get("memory_bytes")
    room = "" if memory is None else f", {memory / 2**30:.1f} GiB each"
    packages = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return [
        f"machine: {machine['system']}; {machine['cores']} cores, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB",
        *(f"card: {card}" for card in machine["nvidia"]),
        f"devices of jax: {found['count']} x {found['kind']} ({found['platform']}){room}; "
        f"{found['runtime']}"
        if found
        else "devices of jax: none",
        f"versions: {packages}",
    ]


def grids(report: dict[str, Any]) -> list[Grid]:
    """The checks and the times, as tables."""

    def cell(row: dict, operation: str) -> str:
        words = {"passed": "right", "failed": "FAILED", "unsupported": "-"}
        parts = [verdicts.part(operation, dtype) for dtype in verdicts.DTYPES]
        found = [next((words[k] for k in words if p in row[k]), "not checked") for p in parts]
        return " / ".join(found)

    rows = [[n, *(cell(r, o) for o in OPERATIONS)] for n, r in report["checks"].items()]
    title = f"against the reference on odd shapes, in {' / '.join(verdicts.DTYPES)}"
    found = [Grid(title, ["", *OPERATIONS], rows)]
    table: dict[str, dict[str, str]] = {}
    for row in report["times"]:
        label = f"{row['operation']}, B = {row['B']}, S = {row['S']}, H = {row['H']}, {row['pass']}"
        text = "failed" if row["error"] else f"{1e3 * row['seconds']:,.3g} ms"
        table.setdefault(label, {})[row["implementation"]] = text
    names = list(dict.fromkeys(name for cells in table.values() for name in cells))
    times = [[label, *(cells.get(n, "-") for n in names)] for label, cells in table.items()]
    return found + ([Grid("times", ["", *names], times, texts=1)] if times else [])


def reasons(report: dict[str, Any]) -> list[str]:
    """Why an implementation does not run here, and what "auto" takes."""
    found = []
    for name, row in report["checks"].items():
        sentences = list(dict.fromkeys(row["unsupported"].values()))
        found += [f"{name}: {sentence}" for sentence in sentences]
    for operation, choice in report["auto"].items():
        found.append(f"{operation}: {choice['implementation']} ({choice['reason']})")
    return found
