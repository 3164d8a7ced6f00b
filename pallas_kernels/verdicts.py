"""Which kernels passed a check on the device of this machine. "auto" takes no others.

A kernel that nobody has run on a kind of device may hang, crash or be wrong there. So it is first
checked in a child process with a time limit (`pallas_kernels/check.py`): whatever happens there,
the run that wants to use it goes on. The verdicts are kept in a file per kind of device, versions
of all packages that matter, and text of this package. They are made once, when one is needed.

`xla` and `reference` need no check: they are not written for a kind of device.
"""

import contextlib
import fcntl
import functools
import glob
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from pallas_kernels.device import Device

logger = logging.getLogger(__name__)

LIMIT_S = 240.0  # of one child; what it takes: see README.md of this package
CHILD = "pallas_kernels.check"  # the module that a child runs
AGAIN = 3  # exit code of a child: an operation failed here, start another child for the next ones
COMMAND = "python -m experiments.check_device"
PACKAGES = (
    *("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin", "jax-triton", "triton"),
    *("nvidia-cudnn-cu13", "nvidia-cudnn-cu12"),
)
# By platform: the vendor on the PCI bus, the classes of its devices that compute (Google also makes
# disks, 01, and network cards, 02), and the modules of which jax needs one.
_BUS = {
    "gpu": ("10de", "03", ("jax_cuda13_plugin", "jax_cuda12_plugin")),
    "tpu": ("1ae0", "(?!0[12])", ("libtpu",)),
}

# By operation: None if the kernel passed its check, else a sentence.
Verdict = dict[str, str | None]
# By kind of device and implementation. A text says why there is no verdict.
_known: dict[tuple[str, str], Verdict | str] = {}
_agreed: set[str] = set()  # the kinds of device about which all processes of this run agree


class NotChecked(Exception):
    """The check itself could not run, which says nothing about a kernel. reason: a clause that can
    follow "because"."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class Ended(NamedTuple):
    """A child process that ended: the JSON objects that it printed, its exit code (negative: a
    signal; None: it ran longer than it may), and the end of what it wrote to stderr."""

    rows: list[dict]
    code: int | None
    log: str


# --- What is kept ---------------------------------------------------------------------------------


def cache_folder() -> Path:
    """The folder of the verdicts: YOCOU_JAX_CACHE, or ~/.cache/yocou_jax."""
    return Path(os.path.expanduser(os.environ.get("YOCOU_JAX_CACHE") or "~/.cache/yocou_jax"))


@functools.cache
def versions() -> dict[str, str]:
    """All that a verdict depends on, except the kind of device."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    with contextlib.suppress(OSError):
        found["driver"] = Path("/proc/driver/nvidia/version").read_text().splitlines()[0].strip()
    text = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        text.update(path.read_bytes())
    return found | {"pallas_kernels": text.hexdigest()[:16]}


def _digest() -> str:
    return hashlib.sha256(json.dumps(versions(), sort_keys=True).encode()).hexdigest()[:16]


def file(kind: str) -> Path:
    """The file of the verdicts for this kind of device and these versions."""
    plain = re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")
    return cache_folder() / f"kernels-{plain}-{_digest()}.json"


def _read(path: Path) -> dict:
    """{} if there is no such file, or none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _update(kind: str, **facts) -> None:
    """Adds to the file of a kind. Each of facts is a dict that is added to the one of its name.
    The file is complete at any time. A folder that cannot be written costs the next start a check.
    """
    path = file(kind)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        report = {"kind": kind, "versions": versions()} | _read(path)
        for name, rows in facts.items():
            report[name] = report.get(name, {}) | rows
        new = path.with_name(f"{path.name}.{os.getpid()}.new")
        new.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        new.replace(path)
    except OSError as error:
        logger.warning(
            "The verdicts about kernels cannot be kept in %s (%s): each start checks them again. "
            "YOCOU_JAX_CACHE names another folder.",
            *(path.parent, error.strerror),
        )


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Processes of a machine check one after the other. Waits, but not longer than a check may take
    (a file system without locks: not at all)."""
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        lock = (cache_folder() / f"{_digest()}.lock").open("w")
    except OSError:
        yield
        return
    with lock:
        end = time.monotonic() + LIMIT_S
        while time.monotonic() < end:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.2)
            except OSError:
                break
        yield


# --- The check, in child processes ----------------------------------------------------------------


def run_child(words: Sequence[str], limit_s: float, env: dict[str, str] | None = None) -> Ended:
    """Runs `python words` and reads the JSON objects on its stdout, one a line. Kills it, and all
    that it has started, after limit_s seconds."""
    root = str(Path(__file__).parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    # Files, not pipes: a grandchild that keeps a pipe open would block this process.
    with tempfile.TemporaryFile("w+b") as out, tempfile.TemporaryFile("w+b") as log:
        process = subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=log,
            env=os.environ | {"PYTHONPATH": path} | (env or {}),
            start_new_session=True,
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # also after Ctrl-C
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            # A process that waits for a driver does not even answer SIGKILL.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
        out.seek(0)
        log.seek(0)
        text = log.read().decode("utf-8", "replace")
        return Ended(_objects(out.read()), code, text[-4000:])


def _objects(data: bytes) -> list[dict]:
    rows = []
    for line in data.splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            rows += [row] if isinstance(row, dict) else []
    return rows


def how(ended: Ended, limit_s: float) -> str:
    """How a child ended that has not answered, as the end of a sentence without its full stop."""
    if ended.code is None:
        return f"ended after {limit_s:g} s without an answer"
    lines = [line.strip() for line in ended.log.splitlines() if line.strip()]
    said = f": {lines[-1][:200]}" if lines else ""
    if ended.code < 0:
        with contextlib.suppress(ValueError):
            return f"crashed ({signal.Signals(-ended.code).name})"
        return f"crashed (signal {-ended.code})"
    return f"ended with exit code {ended.code}{said}"


def environment() -> dict[str, str]:
    """Of a child that shares a GPU with others, and that is alone on the chip of a TPU."""
    found = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    wanted = jax.config.jax_platforms
    if wanted and "cpu" not in wanted.split(","):  # the reference runs on the host
        found["JAX_PLATFORMS"] = f"{wanted},cpu"
    if "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):  # a pod: do not wait for its other hosts
        one = {"TPU_PROCESS_BOUNDS": "1,1,1", "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1"}
        found |= one | {"TPU_VISIBLE_CHIPS": "0"}
    return found


class Checked(NamedTuple):
    """The device of the process that checked; the verdict; why the implementation does not support
    the other operations there, as sentences."""

    device: Device
    verdict: Verdict
    unsupported: dict[str, str]


def check(name: str) -> Checked:
    """Checks an implementation on the device that a new process gets, and keeps the verdict.

    Each operation is checked until one hangs. After one that failed or crashed, a new process
    checks the next ones, because the device of the old one may be unusable.

    Raises:
      NotChecked: no process could compute anything there.
    """
    verdict: Verdict = {}
    unsupported: dict[str, str] = {}
    while True:
        known = [*verdict, *unsupported]
        try:
            ended = run_child(["-m", CHILD, name, *known], LIMIT_S, environment())
        except OSError as error:  # no memory or no space for a process, for example
            raise NotChecked(f"its check could not start ({error.strerror})") from error
        if not ended.rows:
            raise NotChecked(f"its check {how(ended, LIMIT_S)}".rstrip("."))
        first, *rows = ended.rows
        device = Device(first["platform"], first["kind"])
        for row in rows:
            (verdict if row["supported"] else unsupported)[row["operation"]] = row["reason"]
        left = [o for o in first["operations"] if o not in verdict and o not in unsupported]
        # With AGAIN the last row says what failed. Without a row the process failed by itself.
        if left and (ended.code != AGAIN or not rows):
            verdict[left[0]] = f"Its check of {left[0]} on this device {how(ended, LIMIT_S)}."
            if ended.code is None:
                verdict |= {o: f"It was not checked, because {left[0]} hung." for o in left[1:]}
            left = left[1:]
        if not left or ended.code is None:
            break
    _update(device.kind, verdicts={name: verdict})
    _known[device.kind, name] = verdict
    return Checked(device, verdict, unsupported)


# --- What "auto" asks -----------------------------------------------------------------------------


def forget() -> None:
    """Reads the files again when the next question is asked."""
    _known.clear()
    _agreed.clear()


def _find(name: str, device: Device) -> Verdict | str:
    if (found := _read(file(device.kind)).get("verdicts", {}).get(name)) is not None:
        return found
    if device.platform == "tpu":
        return "this process already uses the TPU, and a check needs it"
    with _alone():  # another process may have made it by now
        if (found := _read(file(device.kind)).get("verdicts", {}).get(name)) is not None:
            return found
        return _check_here(name, device)


def _check_here(name: str, device: Device) -> Verdict | str:
    logger.info("Checking %s on %s, once (at most %g s).", name, device.kind, LIMIT_S)
    try:
        checked = check(name)
    except NotChecked as error:
        return error.reason
    same = checked.device == device
    return checked.verdict if same else f"a new process computes on a {checked.device.kind}"


def _why_not(name: str, operation: str, device: Device) -> str | None:
    key = device.kind, name
    if key not in _known:
        _known[key] = _find(name, device)
    verdict = _known[key]
    if isinstance(verdict, str):
        return f"It was not checked on this device, because {verdict}; {COMMAND} checks it."
    return verdict.get(operation, f"Its check has no call of {operation} that it supports.")


def why_not(name: str, operation: str, device: Device) -> str | None:
    """Why "auto" does not take an implementation that could run the operation on this device, as a
    sentence; None if its check passed. Without a verdict this may start the check and wait."""
    if jax.process_count() > 1 and device.kind not in _agreed:
        return "The processes of this run did not compare their checks (set_up compares them)."
    return _why_not(name, operation, device)


def agree(names: Sequence[str], operations: Sequence[str], device: Device) -> None:
    """Processes that took different kernels would wait for each other forever. So in a run of
    several, a check has passed only if it passed in all of them. Every process must call this."""
    mine = [[_why_not(name, o, device) is None for o in operations] for name in names]
    passed = multihost_utils.process_allgather(np.array(mine)).all(0)
    for name, row in zip(names, passed, strict=True):
        _known[device.kind, name] = {
            o: None if ok else _why_not(name, o, device) or "Its check did not pass on every host."
            for o, ok in zip(operations, row, strict=True)
        }
    _agreed.add(device.kind)


# --- Before jax starts ----------------------------------------------------------------------------


def bus(platform: str) -> list[str]:
    """The accelerators on the PCI bus as vendor:device; [] if the system does not tell."""
    vendor, classes, _ = _BUS[platform]
    found = set()
    for path in map(Path, glob.glob("/sys/bus/pci/devices/*")):
        with contextlib.suppress(OSError):
            facts = ((path / name).read_text().strip() for name in ("vendor", "device", "class"))
            found.add(tuple(fact.removeprefix("0x") for fact in facts))
    return sorted(f"{v}:{d}" for v, d, c in found if v == vendor and re.match(classes, c))


def accelerators() -> dict[str, list[str]]:
    """The accelerators of this machine that jax has a plugin for, by platform, without starting
    jax. {} if jax is set to use the CPU only."""
    if set((jax.config.jax_platforms or "").split(",")) == {"cpu"}:
        return {}
    found = {}
    for platform, (_, _, modules) in _BUS.items():
        if any(map(importlib.util.find_spec, modules)) and (ids := bus(platform)):
            found[platform] = ids
    return found


def before_start(names: Sequence[str], ids: list[str], platform: str) -> None:
    """Makes the verdicts of this machine in the order of `names`, until one passes everything, if
    no start on such a machine has made them before. Call it before jax has started: on a TPU no
    other process can compute later, and on a GPU there is more memory.

    ids: which accelerators the machine has, so that its file is found without jax.
    platform: theirs. If a child computes on another one, perhaps because a program holds the
    device, nothing is kept, and the next start checks again.
    """
    machine = " ".join(ids)
    with _alone():
        for path in cache_folder().glob(f"kernels-*-{_digest()}.json"):
            if machine in _read(path).get("machines", {}):
                return
        logger.info("Checking the kernels for this device, once (at most %g s for each).", LIMIT_S)
        for name in names:
            try:
                checked = check(name)
            except NotChecked as error:
                logger.warning("No kernel was checked, because %s.", error.reason)
                return
            if checked.device.platform != platform:
                where = checked.device.kind
                logger.warning("No kernel was checked: a new process computes on %s.", where)
                return
            if checked.verdict and not any(checked.verdict.values()):
                break
        _update(checked.device.kind, machines={machine: names})
