"""One owner for each workdir: a second run in it would overwrite what the first one writes.

The owner holds a lock of the operating system (flock) on workdir/owner.json, which ends with the
process however that ends, so nothing stays locked after a kill. The file says who the owner is:
host, process id and start. Some shared file systems have no such locks, or keep them apart by
host, so an owner also touches the file at every beat; one whose lock cannot be seen from here is
taken for dead once it misses two beats.
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
BEAT_S = 10.0

log = logging.getLogger(__name__)


class WorkdirLock:
    """Holds a workdir for this run, from `with` to its end; makes the folder if there is none.

    Every process of a run enters; process 0 takes the lock. A folder made here that is still empty
    at the end is removed again. Raises UserError if another run holds the workdir, or if it cannot
    be written to.
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
                    self.path.unlink()  # while it is held: whoever opened it sees that it is gone
            self._beats.join(timeout=1)
            os.close(self._file)
        self._remove_made()

    def check(self) -> None:
        """Raises UserError if the workdir is not this run's any more: it was removed, or another
        run took it while this one stood still (a suspended machine, a file system that hung).

        Every process calls it, before it writes what another run may overwrite.
        """
        _on_process_0(self._check_owner)

    def _check_owner(self) -> None:
        try:
            if _is_at(self._file, self.path) and _read_owner(self._file) == self._me:
                return
        except OSError:  # a file system that hangs: the write that follows will tell
            return
        what = "Another run has taken it" if self.path.exists() else f"{self.path} was removed"
        raise UserError(
            f"The workdir {self.workdir} is not this run's any more, so it ends without saving: "
            f"{what}."
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
                if not _is_at(file, self.path):  # its owner has just removed it
                    os.close(file)
                    continue
                if owner:
                    log.info("%s was left by a run that has ended (%s).", self.path, _who(owner))
                os.ftruncate(file, 0)
                os.pwrite(file, json.dumps(self._me).encode(), 0)
                if locked is None:  # the last of several that write at once wins
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
        with contextlib.suppress(OSError):  # not empty
            for folder in reversed(self._made):
                folder.rmdir()


def _on_process_0(act: Callable[[], None]) -> None:
    """Does it on process 0; a UserError there is one on every process: nobody goes on alone."""
    error = None
    if jax.process_index() == 0:
        try:
            act()
        except UserError as refusal:
            error = refusal
    if jax.process_count() > 1:
        refused = bool(multihost_utils.broadcast_one_to_all(np.array(error is not None)))
        if refused and not error:
            error = UserError("Process 0 does not have the workdir, so this one ends too.")
    if error:
        raise error


def _make_folders(folder: Path) -> list[Path]:
    """Makes a folder and returns those that were not there, outermost first."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()][::-1]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _flock(file: int) -> bool | None:
    """True: locked; False: another process has it; None: this file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        log.info("No locks on this file system (%s): the owner's file alone counts.", error)
        return None
    return True


def _is_at(file: int, path: Path) -> bool:
    """Whether the open file is the one that the path names now."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), path.stat())
    return False


def _myself() -> dict:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": now}


def _read_owner(file: int) -> dict | None:
    """What the file says; None if it is new, or not whole."""
    try:
        owner = json.loads(os.pread(file, 4096, 0))
        return owner if owner.keys() >= {"host", "pid", "started"} else None
    except (ValueError, AttributeError, RecursionError):
        return None


def _alive(owner: dict, path: Path, locked: bool | None) -> bool:
    """Whether the owner that the file names still runs, seen from a process that `locked` it."""
    if locked and owner["host"] == socket.gethostname():
        return False  # or it would have the lock
    log.info("Waiting %.0f s to see whether %s is still at work.", 2.5 * BEAT_S, _who(owner))
    # Two readings of one clock, that of the file system: those of two hosts may differ.
    with contextlib.suppress(FileNotFoundError):  # it has ended while we looked
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
        f"The workdir {workdir} is in use by another run{who}. Wait for its end, or give this run "
        f"a workdir of its own: --workdir={workdir}-2."
    )
