"""Python in a process of its own with a time limit, which ends with the process that started it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

# What the code of a kernel, its compiler or its driver can end a process with. Any other signal
# came from outside: from a user, from a scheduler, or because the host had no memory left.
CRASHES = {signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}


ALARM_S = 3600.0  # of a child whose parts have a time limit each; see `bound`


class Ended(NamedTuple):
    """A child process that ended: the JSON objects that it printed, its exit code (negative: a
    signal; None: its time was over), and the end of what it wrote to stderr."""

    rows: list[dict]
    code: int | None
    log: str


# A command that ends with the process that started it (Linux), and at a time (any system: SIGALRM
# ends even a process that hangs). Both stay as they are when it becomes another program.
_BOUND = """
import contextlib, ctypes, os, signal, sys
parent, limit, *words = sys.argv[1:]
signal.alarm(int(limit))
with contextlib.suppress(AttributeError, OSError):
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() == int(parent):
    os.execv(words[0], words)
"""


def bound(words: Sequence[str], limit_s: float) -> list[str]:
    """The command that runs `python words`, and does not outlive this process for long, even if
    this process is killed: not at all on Linux, at most limit_s + 10 seconds elsewhere. On Linux it
    also ends with the thread that starts it."""
    start = [sys.executable, "-I", "-S", "-c", _BOUND, str(os.getpid()), str(int(limit_s) + 10)]
    return [*start, sys.executable, *words]


def run(
    words: Sequence[str],
    limit_s: float,
    env: dict[str, str] | None = None,
    *,
    for_each: bool = False,
) -> Ended:
    """Runs `python words` and reads the JSON objects on its stdout, one a line. Kills it, and all
    that it has started, after limit_s seconds. env: its environment; None: that of this process.
    for_each: the time begins again with each object (with anything that it prints)."""
    env = dict(os.environ if env is None else env)
    root = str(Path(__file__).parent.parent)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (root, env.get("PYTHONPATH"))))
    # Files, not pipes: a grandchild that keeps a pipe open would block this process.
    with tempfile.TemporaryFile("w+b") as out, tempfile.TemporaryFile("w+b") as log:
        process = subprocess.Popen(
            bound(words, max(ALARM_S, 10 * limit_s) if for_each else limit_s),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=log,
            env=env,
            start_new_session=True,
        )
        try:
            code = _wait(process, limit_s, out if for_each else None)
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


def _wait(process: subprocess.Popen, limit_s: float, out: IO[bytes] | None) -> int | None:
    """The exit code; None if the time is over. It begins again when the file `out` has grown."""
    size, end = 0, time.monotonic() + limit_s
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(max(0.0, min(0.5, end - time.monotonic())))
        if out is not None and (grown := os.fstat(out.fileno()).st_size) > size:
            size, end = grown, time.monotonic() + limit_s
        elif time.monotonic() >= end:
            return None


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
        name = f"signal {-ended.code}"
        with contextlib.suppress(ValueError):
            name = signal.Signals(-ended.code).name
        return f"crashed ({name})" if -ended.code in CRASHES else f"was ended by {name}"
    return f"ended with exit code {ended.code}{said}"
