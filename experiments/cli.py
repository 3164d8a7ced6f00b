"""What all commands share. A mistake of the user ends in one sentence and exit code 2.

CONFIG = cli.config_file("configs/yocou_small.py", "What to train.")
STEPS = flags.DEFINE_integer("steps", 4, "Updates of one measurement.")

if __name__ == "__main__":
    cli.run(main)  # main(argv) returns its exit code, or None

A process can define a flag only once. So a test can import two commands only if their flags have
different names.
"""

import contextlib
import errno
import functools
import logging
import os
import shlex
import sys
from collections.abc import Callable
from typing import Any

# XLA's C++ code logs errors only. This has an effect only before jax is imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import absl.logging
from absl import app, flags

from experiments.command_line import parse
from experiments.config_flag import config_file
from yocou_jax.errors import UserError
from yocou_jax.files import to_json

__all__ = ["EXIT_USER_ERROR", "command", "config_file", "explained", "parse", "print_json"]
__all__ += ["refuse_empty", "run"]

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE
# They come from the state of the machine and not from a bug, so they need no stack trace.
MACHINE_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES),
    *(errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENOMEM),
}


def command() -> str:
    """The command that runs, as one types it."""
    name = os.path.splitext(os.path.basename(sys.argv[0]))[0]
    return shlex.join(["python", "-m", f"experiments.{name}", *sys.argv[1:]])


def print_json(report: dict[str, Any]) -> None:
    """Prints one JSON object, with the command that gives it."""
    print(to_json({"command": command()} | report), flush=True)


def refuse_empty(*folders: flags.FlagHolder) -> None:
    """An empty path would be the current folder. Raises UserError."""
    for flag in folders:
        if flag.value is not None and not flag.value.strip():
            raise UserError(f"The flag --{flag.name} is empty. Name a folder, or omit the flag.")


def run(main: Callable[[list[str]], int | None], arguments: int = 0) -> None:
    """Parses the flags, runs `main` and exits with its code. Unexpected errors keep their trace.

    main gets argv[0] and the words that are not flags. More than `arguments` of them are an error.
    """
    try:
        app.run(main, flags_parser=functools.partial(_prepare, arguments=arguments))
    except KeyboardInterrupt:
        _stop("Interrupted.", EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader of stdout has ended (`| head`, for example)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_BROKEN_PIPE)
    except (UserError, OSError) as error:
        if (sentence := explained(error)) is None:
            raise
        _stop(sentence, EXIT_USER_ERROR)


def explained(error: BaseException) -> str | None:
    """The sentence about an error that is no bug: of the user, or of the state of the machine."""
    if isinstance(error, UserError):
        return str(error)
    if not isinstance(error, OSError) or error.errno not in MACHINE_ERRORS:
        return None
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror}{where}. What was saved before is intact."


def _stop(sentence: str, code: int) -> None:
    # Both streams may be closed, or their reader may have ended.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        print(sentence, file=sys.stderr)
    sys.exit(code)


def _prepare(argv: list[str], arguments: int) -> list[str]:
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the parent process has closed it
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    # A character that the terminal cannot show does not end a command.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    _quiet()
    return parse(argv, arguments=arguments)


# --- Logging --------------------------------------------------------------------------------------


def _quiet() -> None:
    """Shows our log as plain sentences, and of other packages only warnings, with their origin.

    Orbax logs the stack traces of errors that it also raises, and asyncio those of reads that Orbax
    has canceled. They are not shown, because yocou_jax.checkpoint raises one sentence instead.
    """
    absl.logging.set_verbosity(absl.logging.WARNING)
    absl.logging.get_absl_handler().addFilter(lambda record: "/orbax/" not in record.pathname)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    for name in ("yocou_jax", "pallas_kernels.verdicts"):
        ours = logging.getLogger(name)
        ours.setLevel(logging.INFO)
        ours.addHandler(_CurrentStderr())
        ours.propagate = False


class _CurrentStderr(logging.Handler):
    """Writes to the current sys.stderr, because rich replaces it while it shows a live line."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, ValueError):  # the stream may be closed
            print(self.format(record), file=sys.stderr)
