"""What every command shares: a user's mistake is answered with one sentence and exit code 2.

if __name__ == "__main__":
    cli.run(main)  # main(argv) returns its exit code, or None
"""

import ctypes
import errno
import logging
import os
import re
import sys
from collections.abc import Callable

# C++ chatter of XLA below errors; before jax is imported, or it has no effect.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import absl.logging
from absl import app, flags

from yocou_jax.errors import UserError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE
# The state of a machine, not a bug: its text says all there is to say.
MACHINE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}


def run(main: Callable[[list[str]], int | None]) -> None:
    """Parses the flags, runs `main` and exits with its code; unexpected errors keep their trace."""
    try:
        app.run(main, flags_parser=_parse)
    except UserError as error:
        _stop(str(error), EXIT_USER_ERROR)
    except KeyboardInterrupt:
        _stop("Interrupted.", EXIT_INTERRUPTED)
    except BrokenPipeError:  # whoever read stdout (head, say) has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_BROKEN_PIPE)
    except OSError as error:
        if error.errno in MACHINE_ERRORS:
            where = f" ({error.filename})" if error.filename else ""
            _stop(f"{error.strerror}{where}. What was saved before is intact.", EXIT_USER_ERROR)
        # A missing config file surfaces only when the config is first looked at.
        if "Configuration is not available" not in str(error):
            raise
        name = re.search(r"Attempted \[.*\]:\s+(.*)", str(error))
        known = f"The config file {name[1]} does not exist." if name else "--config names no file."
        _stop(known, EXIT_USER_ERROR)


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
    sys.stdout.flush()
    print(sentence, file=sys.stderr)
    sys.exit(code)


def _parse(argv: list[str]) -> list[str]:
    _quiet()
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        raise UserError(_flag_sentence(error)) from error
    except (AttributeError, KeyError) as error:
        if not _raised_by_ml_collections(error):
            raise
        raise UserError(_key_sentence(str(error.args[0]), argv)) from error
    if len(rest) > 1:
        raise UserError(f"The argument {rest[1]!r} means nothing here: every option is a --flag.")
    return rest


def _flag_sentence(error: flags.Error) -> str:
    """absl's text as a sentence, or what get_config() raised, which comes buried in a trace."""
    text, cause = str(error), error
    while cause.__context__ is not None:
        cause = cause.__context__
    if "Error whilst parsing config file" in text:
        return str(cause)
    if isinstance(error, flags.UnrecognizedFlagError):
        hint = re.search(r"Did you mean: ([\w-]+)", text)
        return f"There is no flag --{error.flagname}." + (
            f" Did you mean --{hint[1]}?" if hint else ""
        )
    if required := re.match(r"flag --(\w+)=None: .*must have a value", text):
        return f"The flag --{required[1]} is missing."
    if illegal := re.match(r"flag (--[^:]+): (.*)", text, re.DOTALL):
        reason = ": ".join(map(str, cause.args)) if isinstance(cause.args, tuple) else illegal[2]
        return f"The value of {illegal[1]} is not possible: {reason.rstrip('.')}."
    return f"{text.rstrip('.')}."


def _raised_by_ml_collections(error: Exception) -> bool:
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return "ml_collections" in trace.tb_frame.f_code.co_filename


def _key_sentence(text: str, argv: list[str]) -> str:
    key = re.search(r"'(\w+)\\?'", text)
    if key is None or "no attribute 'get_config'" in text:
        return f"The config file cannot be used: {text.rstrip('.')}."
    where = [a for a in argv if re.match(rf"--\w+(\.\w+)*\.{key[1]}\b", a)]
    hint = re.search(r'Did you mean "(\w+)"', text)
    return (
        f"There is no config field '{key[1]}'"
        + (f" (in {where[0]})." if where else ".")
        + (f" Did you mean '{hint[1]}'?" if hint else " configs/base.py lists every field.")
    )


def _quiet() -> None:
    """Warnings of our own as plain sentences, those of others with their origin, and no chatter.

    Orbax logs whole traces of errors that it also raises, and asyncio those of its abandoned reads:
    yocou_jax.checkpoint turns them into one sentence, so they are left out here.
    """
    absl.logging.set_verbosity(absl.logging.WARNING)
    absl.logging.get_absl_handler().addFilter(lambda record: "/orbax/" not in record.pathname)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    ours = logging.getLogger("yocou_jax")
    ours.addHandler(_CurrentStderr())
    ours.propagate = False


class _CurrentStderr(logging.Handler):
    """Writes to what sys.stderr is now: rich replaces it while a live line is on the screen."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)
