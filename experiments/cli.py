"""What every command shares: a user's mistake is answered with one sentence and exit code 2.

CONFIG = cli.config_file("configs/yocou_small.py", "What to train.")
STEPS = flags.DEFINE_integer("steps", 4, "Updates of one measurement.")

if __name__ == "__main__":
    cli.run(main)  # main(argv) returns its exit code, or None

A process knows each flag once, so a test imports only commands whose flags have different names.
"""

import contextlib
import ctypes
import errno
import functools
import logging
import os
import sys
from collections.abc import Callable

# C++ chatter of XLA below errors; before jax is imported, or it has no effect.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import absl.logging
from absl import app

from experiments.command_line import parse
from experiments.config_flag import config_file
from yocou_jax.errors import UserError

__all__ = ["config_file", "keep_freed_memory", "parse", "run"]

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE
# The state of a machine, not a bug: its text says all there is to say.
MACHINE_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES),
    *(errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENOMEM),
}


def run(main: Callable[[list[str]], int | None], arguments: int = 0) -> None:
    """Parses the flags, runs `main` and exits with its code; unexpected errors keep their trace.

    main gets argv[0] and at most so many `arguments` that are no flags.
    """
    try:
        app.run(main, flags_parser=functools.partial(_prepare, arguments=arguments))
    except UserError as error:
        _stop(str(error), EXIT_USER_ERROR)
    except KeyboardInterrupt:
        _stop("Interrupted.", EXIT_INTERRUPTED)
    except BrokenPipeError:  # whoever read stdout (head, say) has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_BROKEN_PIPE)
    except OSError as error:
        if error.errno not in MACHINE_ERRORS:
            raise
        where = f" ({error.filename})" if error.filename else ""
        _stop(f"{error.strerror}{where}. What was saved before is intact.", EXIT_USER_ERROR)


def keep_freed_memory() -> None:
    """Lets the CPU backend of jax reuse its scratch memory from step to step (glibc only).

    By default glibc hands large blocks back to the kernel when they are freed, and every train step
    faults the same pages in again: 327,000 of them, 0.7-0.9 s of system time a step, in a sketch of
    8 layers of D = 256 on 4,096 tokens; none with this. A gain in wall time was not established.
    """
    m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8  # <malloc.h>
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return  # another C library: nothing to set
    for option, value in ((m_arena_max, 1), (m_mmap_max, 0), (m_trim_threshold, 2**31 - 1)):
        mallopt(option, value)


def _stop(sentence: str, code: int) -> None:
    # Whoever started this may have closed both, or gone.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        print(sentence, file=sys.stderr)
    sys.exit(code)


def _prepare(argv: list[str], arguments: int) -> list[str]:
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    # No text of a model or a file name ends a command because the terminal cannot show it.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    _quiet()
    return parse(argv, arguments=arguments)


# --- Logging --------------------------------------------------------------------------------------


def _quiet() -> None:
    """What we log as plain sentences, warnings of others with their origin, and no chatter.

    Orbax logs whole traces of errors that it also raises, and asyncio those of its abandoned reads:
    yocou_jax.checkpoint turns them into one sentence, so they are left out here.
    """
    absl.logging.set_verbosity(absl.logging.WARNING)
    absl.logging.get_absl_handler().addFilter(lambda record: "/orbax/" not in record.pathname)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    ours = logging.getLogger("yocou_jax")
    ours.setLevel(logging.INFO)
    ours.addHandler(_CurrentStderr())
    ours.propagate = False


class _CurrentStderr(logging.Handler):
    """Writes to what sys.stderr is now: rich replaces it while a live line is on the screen."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody may be there to read it
            print(self.format(record), file=sys.stderr)
