"""Settings of this process that make a command faster."""

import contextlib
import ctypes
import hashlib
import os
import platform
import sys
import time
import typing
from pathlib import Path

import jax

from experiments.heap import Gaps
from pallas_kernels import api, verdicts
from yocou_jax.files import expand_path

EXIT_LOST = 69  # EX_UNAVAILABLE of sysexits.h
GRACE_S = 3.0


def keep_freed_memory() -> None:
    """Lets the CPU backend of jax use the same temporary memory in each step (glibc only). Call it
    before jax starts. Does nothing if `verdicts.accelerators` finds one.

    By default, glibc returns large blocks to the operating system when they are freed, and every
    train step gets the same pages again. In a test with 8 layers of D = 256 and 4,096 tokens, these
    were 327,000 page faults, which took 0.7-0.9 s of system time per step. With this function there
    were none.

    XLA's CPU backend allocates with glibc, so these options reach it. Another test (jaxlib 0.10.2,
    2 cores): a gradient with 272 MB of temporary memory made 69,777 page faults per call, about one
    for each page of it, and 6,953 with this function. System time went from 275 to 27 ms per call,
    and user time stayed at 0.9 s. In `make train`: 110,000 faults per second without it, and none
    with it, which trains 1.3 times as many tokens per second (LOG.md).
    """
    if verdicts.accelerators():
        return
    # A thread of jax that has an arena of its own would get large blocks by mmap, whatever the
    # options say. So there must be no other arena than the main one when these threads start.
    m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8  # <malloc.h>
    try:
        libc = ctypes.CDLL(None)
        mallopt = libc.mallopt
    except (AttributeError, OSError):
        return  # another C library, which has no such options
    for option, value in ((m_arena_max, 1), (m_mmap_max, 0), (m_trim_threshold, 2**31 - 1)):
        mallopt(option, value)
    gaps = Gaps(libc)
    jax.monitoring.register_event_duration_secs_listener(gaps.listen)


def end_alone(sentence: str, code: int = EXIT_LOST) -> typing.NoReturn:
    """Ends one of several processes at once. Otherwise jax would wait for the others, of which one
    may be dead, until its heartbeats are missed, and then abort.

    Process 0 waits GRACE_S first. If it ends, jax aborts all others, and these may be about to
    say the same.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
    # The disk of a log may be full, and the reader of a pipe may have ended.
    with contextlib.suppress(OSError, ValueError):
        print(sentence, file=sys.stderr, flush=True)
    if jax.process_index() == 0:
        time.sleep(GRACE_S)
    os._exit(code)


def check_kernels(attention: str) -> None:
    """The first start on a kind of accelerator checks its attention kernels in other processes; so
    call this before jax starts. Does nothing on a CPU, or if attention is the name of a kernel."""
    if attention == "auto":
        api.check_kernels()


def keep_compiled_programs(cache_dir: str) -> None:
    """Keeps compiled programs in a folder below `cache_dir`, so that the next start reads them.

    Not if JAX_COMPILATION_CACHE_DIR names a folder. Processors of several kinds may share a file
    system, and a program may have instructions that only some of them know. So each kind has a
    folder of its own.
    """
    if jax.config.jax_compilation_cache_dir is None:
        folder = expand_path(cache_dir) / f"compiled-{_processor()}"
        jax.config.update("jax_compilation_cache_dir", str(folder))


def _processor() -> str:
    """A short name for the instructions that this processor has."""
    facts = platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        facts += next(line for line in lines if line.startswith(("flags", "Features")))
    return hashlib.sha256(facts.encode()).hexdigest()[:8]
