"""Which kernels passed a check on the device of this machine. "auto" takes no others.

A kernel that nobody has run on a kind of device may hang, crash or be wrong there. So it is first
checked in a child process with a time limit (`pallas_kernels/check.py`): whatever happens there,
the run that wants to use it goes on. The verdicts are kept in a file per kind of device, versions
of all packages that matter, XLA's flags, and text of this package. They are made once, when one is
needed. A verdict is about a *part* of an implementation: one operation in one dtype.

`xla` and `reference` need no check: they are not written for a kind of device.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from pallas_kernels import children
from pallas_kernels.device import Device

logger = logging.getLogger(__name__)

USUAL_LIMIT_S = 240.0  # for each part; most of it is compilation (LOG.md has what was measured)
LIMIT_S = USUAL_LIMIT_S
WAIT_S = 1800.0  # for another process that checks
CHILD = "pallas_kernels.check"  # the module that a child runs
AGAIN = 3  # exit code of a child: a part failed here, start another child for the next ones
NO_MEMORY = 4  # exit code of a child: another program may have used the memory
DTYPES = ("bfloat16", "float32")  # that are checked
COMMAND = "python -m experiments.check_device"
_PACKAGES = r"jax|jaxlib|jax-(cuda|rocm|triton).*|libtpu.*|triton|nvidia-(cudnn|cuda-nvcc).*"
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_PCI = Path("/sys/bus/pci/devices")
# By platform: the vendor on the PCI bus, the classes of its devices that compute (Google also makes
# disks, 01, and network cards, 02), and the modules of which jax needs one.
_BUS = {
    "gpu": ("10de", "03", ("jax_cuda13_plugin", "jax_cuda12_plugin")),
    "tpu": ("1ae0", "(?!0[12])", ("libtpu",)),
}

# By part: None if the kernel passed its check, else a sentence.
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


# --- What is kept ---------------------------------------------------------------------------------


def part(operation: str, dtype: str | None) -> str:
    """The name of a part in verdicts. dtype: that of q. Before a run has arrays it is None, and
    means bfloat16, in which models are computed on accelerators."""
    return f"{operation} in {dtype or DTYPES[0]}"


def cache_folder() -> Path:
    """YOCOU_JAX_CACHE, or ~/.cache/yocou_jax. The verdicts are in its folder "kernels"."""
    return Path(os.path.expanduser(os.environ.get("YOCOU_JAX_CACHE") or "~/.cache/yocou_jax"))


def _place() -> Path:
    return cache_folder() / "kernels"


def _make_folder() -> Path:
    """Makes the folder of the verdicts. Raises OSError if it cannot be made, or if another user
    could change what is in it: verdicts decide which code runs."""
    folder = _place()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = folder.stat()
    if facts.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, "it belongs to another user")
    if facts.st_mode & 0o022:
        raise PermissionError(errno.EPERM, "other users may write to it")
    return folder


@functools.cache
def versions() -> dict[str, str]:
    """All that a verdict depends on, except the kind of device."""
    found = {name: os.environ[name] for name in _FLAGS if os.environ.get(name)}
    for package in importlib.metadata.distributions():
        name = (package.metadata["Name"] or "").lower().replace("_", "-")
        if re.fullmatch(_PACKAGES, name):
            found.setdefault(name, package.version)  # Python imports the first one on its path
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
    return _place() / f"{plain}-{_digest()}.json"


class Kept(NamedTuple):
    """What a file has: verdicts by implementation, and the machines (see `before_start`)."""

    verdicts: dict[str, Verdict]
    machines: list[str]


def _read(path: Path) -> Kept:
    """Nothing if there is no such file, or none that can be read and trusted."""
    try:
        _make_folder()
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = {name: dict(verdict) for name, verdict in found["verdicts"].items()}
        # Only null means that a kernel passed.
        for verdict in rows.values():
            verdict.update({p: str(reason) for p, reason in verdict.items() if reason is not None})
        return Kept(rows, list(map(str, found["machines"])))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return Kept({}, [])


def _update(kind: str, verdicts: dict[str, Verdict], machines: Sequence[str] = ()) -> None:
    """Adds to the file of a kind; call it inside `_alone`. The file is complete at any time. A
    folder that cannot be used costs the next start a check."""
    path = file(kind)
    try:
        _make_folder()
        old = _read(path)
        report = {
            "kind": kind,
            "versions": versions(),
            "verdicts": old.verdicts | verdicts,
            "machines": [*old.machines, *machines],
        }
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
    """Processes of a machine check one after the other. The system frees the lock of a process that
    dies. A folder that cannot be used, or a file system without locks: does not wait.

    Raises:
      NotChecked: another process still checks after WAIT_S seconds.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            lock = stack.enter_context((_make_folder() / f"{_digest()}.lock").open("w"))
            _wait(lock)
        yield


def _wait(lock) -> None:
    end, waits = time.monotonic() + WAIT_S, False
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise NotChecked(f"another process still checks after {WAIT_S:g} s") from None
        if not waits:
            logger.info("Another process checks kernels: waiting, at most %g s.", WAIT_S)
        waits = True
        time.sleep(0.2)


# --- The check, in child processes ----------------------------------------------------------------


def _platforms() -> list[str]:
    """The platforms that jax is set to use, the default one first; [] if it is not set."""
    return [name for name in (jax.config.jax_platforms or "").split(",") if name]


def environment() -> dict[str, str]:
    """The environment of a child that computes. It takes no more memory of a GPU than it needs.

    In a TPU pod, a process waits for those of the other hosts. So there a child gets one chip, and
    is not told of other hosts and slices. Only these variables show that this is a pod: if only the
    metadata server of the cloud knows it, a child may wait until its time is over. Schedulers and
    MPI have variables too, but only `jax.distributed.initialize` reads them, and no child calls it.
    """
    found = dict(os.environ) | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if wanted := _platforms():  # the reference runs on the host, the kernel on the first platform
        found["JAX_PLATFORMS"] = ",".join([*(name for name in wanted if name != "cpu"), "cpu"])
    hosts = [found.get(name, "") for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")]
    slices = found.get("MEGASCALE_NUM_SLICES", "1")
    if any("," in names for names in hosts) or slices not in ("", "1"):
        pod = r"MEGASCALE_.*|TPU_(HOST|CHIPS_PER_HOST)_BOUNDS|TPU_PROCESS_(ADDRESSES|PORT)"
        found = {name: value for name, value in found.items() if not re.fullmatch(pod, name)}
        found |= dict.fromkeys(("TPU_PROCESS_BOUNDS", "TPU_CHIPS_PER_PROCESS_BOUNDS"), "1,1,1")
        found |= dict.fromkeys(("TPU_VISIBLE_CHIPS", "TPU_WORKER_ID", "CLOUD_TPU_TASK_ID"), "0")
        found["TPU_WORKER_HOSTNAMES"] = "localhost"
    return found


class Checked(NamedTuple):
    """The device of the process that checked; the verdict; why the implementation does not support
    the other parts there, as sentences."""

    device: Device
    verdict: Verdict
    unsupported: dict[str, str]


def check(name: str) -> Checked:
    """Checks an implementation on the device that a new process gets, and keeps the verdict.

    Each part is checked until one hangs. After one that failed or crashed, a new process checks the
    next ones, because the device of the old one may be unusable.

    Raises:
      NotChecked: no process could compute anything there; one was ended from outside, or had no
        memory; or another process of this machine checks for too long.
    """
    with _alone():
        return _check(name)


def _check(name: str) -> Checked:
    verdict: Verdict = {}
    unsupported: dict[str, str] = {}
    while True:
        known = [*verdict, *unsupported]
        try:
            ended = children.run(["-m", CHILD, name, *known], LIMIT_S, environment(), for_each=True)
        except OSError as error:  # no memory or no space for a process, for example
            raise NotChecked(f"its check could not start ({error.strerror})") from error
        said = children.how(ended, LIMIT_S).rstrip(".")
        if not ended.rows:
            raise NotChecked(f"its check {said}")
        first, *rows = ended.rows
        device = Device(first["platform"], first["kind"])
        for row in rows:
            (verdict if row["supported"] else unsupported)[row["part"]] = row["reason"]
        left = [p for p in first["parts"] if p not in verdict and p not in unsupported]
        # With AGAIN the last row says what failed. Without a row the process failed by itself.
        if left and (ended.code != AGAIN or not rows):
            if not _by_itself(ended):
                raise NotChecked(f"its check of {left[0]} {said}")
            verdict[left[0]] = f"Its check of {left[0]} on this device {said}."
            if ended.code is None:
                verdict |= {p: f"It was not checked, because {left[0]} hung." for p in left[1:]}
            left = left[1:]
        if not left or ended.code is None:
            break
    # A kernel that takes longer than a shorter limit may still pass at another start.
    if ended.code is not None or LIMIT_S >= USUAL_LIMIT_S:
        _update(device.kind, {name: verdict})
    _known[device.kind, name] = verdict
    return Checked(device, verdict, unsupported)


def _by_itself(ended: children.Ended) -> bool:
    """Whether the way in which a child ended says something about the kernel."""
    if ended.code is None or ended.code >= 0:
        return ended.code != NO_MEMORY
    return -ended.code in children.CRASHES


# --- What "auto" asks -----------------------------------------------------------------------------


def forget() -> None:
    """Reads the files again when the next question is asked."""
    _known.clear()
    _agreed.clear()


def tell(name: str, kind: str, verdict: Verdict | str) -> None:
    """Tells this process a verdict that another one has made, or why there is none."""
    _known[kind, name] = verdict


def _kept(name: str, device: Device) -> Verdict | None:
    return _read(file(device.kind)).verdicts.get(name)


def _find(name: str, device: Device) -> Verdict | str:
    if (found := _kept(name, device)) is not None:
        return found
    if device.platform == "tpu":
        return "this process already uses the TPU, and a check needs it"
    try:
        with _alone():  # another process may have made it by now
            if (found := _kept(name, device)) is not None:
                return found
            logger.info(
                "Checking %s on %s, once (at most %g s an operation).", name, device.kind, LIMIT_S
            )
            checked = _check(name)
    except NotChecked as error:
        return error.reason
    same = checked.device == device
    return checked.verdict if same else f"a new process computes on a {checked.device.kind}"


def _sentence(name: str, what: str, device: Device) -> str | None:
    """Why a part may not be used, by what this process knows."""
    verdict = _known[device.kind, name]
    if isinstance(verdict, str):
        return f"It was not checked on this device, because {verdict}; {COMMAND} checks it."
    return verdict.get(what, f"Its check has no call of {what} that it supports.")


def why_not(name: str, operation: str, device: Device, dtype: str | None = None) -> str | None:
    """Why "auto" does not take an implementation that could run the operation on this device, as a
    sentence; None if its check passed. Without a verdict this may start the check and wait."""
    if jax.process_count() > 1 and device.kind not in _agreed:
        return "The processes of this run did not compare their checks (set_up compares them)."
    if (device.kind, name) not in _known:
        _known[device.kind, name] = _find(name, device)
    return _sentence(name, part(operation, dtype), device)


def agree(names: Sequence[str], operations: Sequence[str], device: Device) -> None:
    """Processes that took different kernels would wait for each other forever. So in a run of
    several, a check has passed only if it passed in all of them.

    Every process must call this, with the same names and operations. It starts no check, because
    the other processes would wait in their collective operation.
    """
    parts = [part(operation, dtype) for dtype in DTYPES for operation in operations]
    for name in names:
        if (device.kind, name) not in _known:
            missing = "no check was made before the processes of this run joined"
            found = _kept(name, device)
            _known[device.kind, name] = missing if found is None else found
    mine = {name: {p: _sentence(name, p, device) for p in parts} for name in names}
    table = np.array([[mine[name][p] is None for p in parts] for name in names])
    passed = multihost_utils.process_allgather(table).all(0)
    for name, row in zip(names, passed, strict=True):
        _known[device.kind, name] = {
            p: None if ok else mine[name][p] or "Its check did not pass on every host."
            for p, ok in zip(parts, row, strict=True)
        }
    _agreed.add(device.kind)


# --- Before jax starts ----------------------------------------------------------------------------


def bus(platform: str) -> list[str]:
    """The accelerators on the PCI bus as vendor:device; [] if the system does not tell."""
    vendor, classes, _ = _BUS[platform]
    found = set()
    for path in _PCI.glob("*"):
        with contextlib.suppress(OSError):
            facts = ((path / name).read_text().strip() for name in ("vendor", "device", "class"))
            found.add(tuple(fact.removeprefix("0x") for fact in facts))
    return sorted(f"{v}:{d}" for v, d, c in found if v == vendor and re.match(classes, c))


def accelerators() -> dict[str, list[str]]:
    """The accelerators of this machine that jax has a plugin for, by platform, without starting
    jax. {} if jax is set to use the CPU only."""
    if set(_platforms()) == {"cpu"}:
        return {}
    found = {}
    for platform, (_, _, modules) in _BUS.items():
        if any(map(importlib.util.find_spec, modules)) and (ids := bus(platform)):
            found[platform] = ids
    return found


def before_start(names: Sequence[str], ids: list[str], platform: str) -> None:
    """Makes the verdicts of this machine in the order of `names`, until one supports and passes all
    parts (on a GPU none supports all), if no start on such a machine has made them before. Call it
    before jax has started: on a TPU no other process can compute later, and on a GPU there is more
    memory.

    ids: which accelerators the machine has, so that its file is found without jax.
    platform: theirs. If a child computes on another one, perhaps because a program holds the
    device, the next start checks again.
    """
    try:
        with _alone():
            _check_machine(names, " ".join(ids), platform)
    except NotChecked as error:
        logger.warning("No kernel was checked, because %s.", error.reason)


def _check_machine(names: Sequence[str], machine: str, platform: str) -> None:
    if any(machine in _read(path).machines for path in _place().glob(f"*-{_digest()}.json")):
        return
    logger.info("Checking the kernels of this device, once (at most %g s an operation).", LIMIT_S)
    complete = True
    for name in names:
        try:
            checked = _check(name)
        except NotChecked as error:  # the next kernels may have more luck
            logger.warning("%s was not checked, because %s.", name, error.reason)
            complete = False
            continue
        if checked.device.platform != platform:
            raise NotChecked(f"a new process computes on {checked.device.kind}")
        # Calls that it does not support need another kernel.
        if checked.verdict and not any(checked.verdict.values()) and not checked.unsupported:
            break
    if complete:
        _update(checked.device.kind, {}, [machine])
