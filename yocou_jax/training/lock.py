"""One owner for each workdir: a second run in it would overwrite the files of the first one.

The owner holds a lock of the operating system (flock) on workdir/owner.json. The lock ends with the
process, even if it is killed, so nothing stays locked. The file names the owner: host, process id
and start. Some shared file systems have no locks, or do not share them between hosts. So an owner
also sets the time of the file every BEAT_S seconds. If this host cannot see the lock of an owner,
and the time of the file does not change for 2.5 times as long, the owner counts as dead.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from yocou_jax.errors import UserError

FILE = "owner.json"
BEAT_S = 10.0  # seconds after which an owner sets the time of its file again

log = logging.getLogger(__name__)


class WorkdirLock:
    """Holds a workdir for this run inside a `with` block. Makes the folder if it does not exist.

    Every process of a run enters the block, and process 0 takes the lock. If a folder was made here
    and is still empty at the end, it is removed again. Raises UserError if another run holds the
    workdir, or if it cannot be written to.
    """

    def __init__(self, workdir: Path):
        self.workdir, self.path = workdir, workdir / FILE
        self._file: int | None = None
        self._made: list[Path] = []
        self._ended = threading.Event()
        self._me = _myself()

    def __enter__(self) -> "WorkdirLock":
        def take() -> None:
            try:
                self._take()
            except OSError as failure:
                reason = failure.strerror or failure
                raise UserError(
                    f"The workdir {self.workdir} cannot be written to: {reason}."
                ) from failure

        try:
            _on_process_0(take)
        except UserError:
            self._remove_made()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        if self._file is not None:
            with contextlib.suppress(OSError):
                if _read_owner(self._file) == self._me and _is_at(self._file, self.path):
                    self.path.unlink()  # still locked, so a run that has opened it sees this
            self._beats.join(timeout=1)
            os.close(self._file)
        self._remove_made()

    def check(self) -> None:
        """Raises UserError if the workdir does not belong to this run any more: it was removed, or
        another run took it while this one did not run (suspended machine, hanging file system).

        Every process calls it, before it writes what another run may overwrite.
        """
        _on_process_0(self._check_owner)

    def _check_owner(self) -> None:
        try:
            if _is_at(self._file, self.path) and _read_owner(self._file) == self._me:
                return
        except OSError:  # the file system does not answer; the next write will show it
            return
        what = "Another run has taken it" if self.path.exists() else f"{self.path} was removed"
        raise UserError(
            f"The workdir {self.workdir} does not belong to this run any more, so the run ends "
            f"without saving: {what}."
        )

    def _take(self) -> None:
        self._made = _make_folders(self.workdir)
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                locked = _flock(file)
                owner = _read_owner(file)
                if locked is False or (owner and _alive(owner, self.path, locked)):
                    raise UserError(_refusal(self.workdir, owner))
                if not _is_at(file, self.path):  # the owner has just removed it
                    os.close(file)
                    continue
                if owner:
                    log.info("%s was left by a run that has ended (%s).", self.path, _who(owner))
                os.ftruncate(file, 0)
                os.pwrite(file, json.dumps(self._me).encode(), 0)
                if locked is None:  # if several runs write at once, the last one wins
                    time.sleep(BEAT_S / 10)
                    if (winner := _read_owner(file)) != self._me:
                        raise UserError(_refusal(self.workdir, winner))
            except BaseException:
                with contextlib.suppress(OSError):
                    os.close(file)
                raise
            self._file = file
            self._beats = threading.Thread(target=self._beat, name="owner", daemon=True)
            self._beats.start()
            return

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            with contextlib.suppress(OSError):
                os.utime(self._file)

    def _remove_made(self) -> None:
        with contextlib.suppress(OSError):  # a folder that is not empty stays
            for folder in reversed(self._made):
                folder.rmdir()


def _on_process_0(act: Callable[[], None]) -> None:
    """Calls `act` on process 0. If it raises UserError there, this raises UserError in every
    process, so that none waits for the others."""
    error = None
    if jax.process_index() == 0:
        try:
            act()
        except UserError as refusal:
            error = refusal
    if jax.process_count() > 1:
        refused = bool(multihost_utils.broadcast_one_to_all(np.array(error is not None)))
        if refused and not error:
            error = UserError("Process 0 does not hold the workdir, so this process ends too.")
    if error:
        raise error


def _make_folders(folder: Path) -> list[Path]:
    """Makes a folder and its parents. Returns those that did not exist, the outermost first."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()][::-1]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _flock(file: int) -> bool | None:
    """True: this process has the lock. False: another process has it. None: this file system has
    none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        log.info("This file system has no locks (%s): only the file of the owner counts.", error)
        return None
    return True


def _is_at(file: int, path: Path) -> bool:
    """Whether the path still names this open file."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), path.stat())
    return False


def _myself() -> dict:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": now}


def _read_owner(file: int) -> dict | None:
    """The owner that the file names. None if the file is new or incomplete."""
    try:
        owner = json.loads(os.pread(file, 4096, 0))
        return owner if owner.keys() >= {"host", "pid", "started"} else None
    except (ValueError, AttributeError, RecursionError):
        return None


def _alive(owner: dict, path: Path, locked: bool | None) -> bool:
    """Whether the owner that the file names still runs. locked: the result of `_flock`."""
    if locked and owner["host"] == socket.gethostname():
        return False  # if it still ran, it would have the lock
    log.info("Waiting %.0f s to see whether %s still runs.", 2.5 * BEAT_S, _who(owner))
    # Compares two times of the file system's clock, because the clocks of two hosts may differ.
    with contextlib.suppress(FileNotFoundError):  # the owner has ended and removed its file
        before = path.stat().st_mtime_ns
        deadline = time.monotonic() + 2.5 * BEAT_S
        while time.monotonic() < deadline:
            time.sleep(BEAT_S / 10)
            if path.stat().st_mtime_ns != before:
                return True
    return False


def _who(owner: dict) -> str:
    return f"process {owner['pid']} on {owner['host']}, started {owner['started']}"


def _refusal(workdir: Path, owner: dict | None) -> str:
    who = f" ({_who(owner)})" if owner else ""
    return (
        f"The workdir {workdir} is in use by another run{who}. Wait until it ends, or give this "
        f"run another workdir: --workdir={workdir}-2."
    )
