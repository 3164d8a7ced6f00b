"""What every command shares: a user's mistake is answered with one sentence and exit code 2.

CONFIG = cli.config_file("configs/yocou_small.py", "What to train.")

if __name__ == "__main__":
    cli.run(main)  # main(argv) returns its exit code, or None
"""

import contextlib
import ctypes
import errno
import functools
import importlib.machinery
import importlib.util
import inspect
import itertools
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

# C++ chatter of XLA below errors; before jax is imported, or it has no effect.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import absl.logging
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from yocou_jax import config as settings
from yocou_jax.errors import UserError, shown
from yocou_jax.files import resolve

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


# --- The command line -----------------------------------------------------------------------------


def config_file(
    default: str | ConfigDict | None, help_text: str, flag_values: flags.FlagValues = flags.FLAGS
) -> flags.FlagHolder:
    """Defines --config=FILE[:PRESET], and --config.group.field=value for every field.

    config_flags does the work. By itself it would read the default and sys.argv at once, before
    `run` can answer a mistake in them with a sentence; `parse` hands both over.
    """
    parser = _ConfigParser(default)
    holder = config_flags.DEFINE_config_file(
        "config", None, help_text, flag_values, sys_argv=parser.words
    )
    flag_values["config"].parser = parser
    return holder


def parse(
    argv: list[str], flag_values: flags.FlagValues = flags.FLAGS, arguments: int = 0
) -> list[str]:
    """Sets the flags from a command line; returns what is no flag: argv[0] and `arguments` at most.

    Every override is applied or refused. Raises UserError for every mistake in a command line or in
    the config file that it names.
    """
    try:
        words = flag_values.read_flags_from_files(argv[1:], force_gnu=False)
        _check_values(words, flag_values)
        if "config" in flag_values:
            _check_overrides(words, flag_values["config"])
        rest = flag_values([argv[0], *words])
    except flags.Error as error:
        raise UserError(_flag_sentence(error)) from error
    except UserError:
        raise
    except ValueError as error:  # a flag file that is no text, --nojson=3
        raise UserError(f"The command line cannot be read: {_one_line(error)}.") from error
    if len(rest) > 1 + arguments:
        raise UserError(
            f"The argument {shown(rest[1 + arguments])} means nothing here: every option is a "
            "--flag."
        )
    return rest


def _check_values(words: list[str], flag_values: flags.FlagValues) -> None:
    """Refuses `--workdir --json`: absl would take the second flag as the value of the first."""
    following_is_value = False
    for word, following in itertools.pairwise(words):
        if following_is_value or not word.startswith("-"):  # a value, whatever it looks like
            following_is_value = False
            continue
        name = re.sub("^--?", "", word)
        kinds = settings.FIELDS.get(name.removeprefix("config."), ())
        takes_value = (
            name in ("undefok", "flagfile")
            or (name in flag_values and not flag_values[name].boolean)
            or (name.startswith("config.") and kinds and kinds != (bool,))
        )
        if takes_value and following.startswith("--"):
            raise UserError(
                f"The flag {shown(word)} has no value: {shown(following)} follows it. Write "
                f"{word}=VALUE."
            )
        following_is_value = takes_value


def _check_overrides(words: list[str], flag: flags.Flag) -> None:
    """Each --config.group.field names a field, after the one --config; reads the default config."""
    flag.parser.words[:] = words
    files = [i for i, word in enumerate(words) if re.match(r"--?config(=|$)", word)]
    if len(files) > 1:
        raise UserError(
            f"The flag --config is given {len(files)} times; a run has one config file."
        )
    overrides = [
        (i, *match.groups())
        for i, word in enumerate(words)
        if (match := re.match(r"--?(no)?config\.([^=]*)", word, re.DOTALL))
    ]
    for i, negated, name in overrides:
        if name not in settings.FIELDS:
            raise settings.unknown_field(name)
        if negated and settings.FIELDS[name] != (bool,):
            raise UserError(f"--noconfig is for fields that are true or false; {name} is not one.")
        if files and i < files[0]:
            raise UserError(
                f"--config must come before {shown(words[i])}, which changes a field of it."
            )
    if not files and flag.parser.default is not None:
        flag.parse(flag.parser.default)
    elif not files and overrides:
        raise UserError("The flag --config is missing.")


class _ConfigParser(flags.ArgumentParser):
    """Reads the value of --config; whatever is wrong with the file is said in one sentence."""

    def __init__(self, default: str | ConfigDict | None):
        self.default = default
        self.words: list[str] = []  # the command line, where config_flags looks for overrides

    def parse(self, argument: str | ConfigDict) -> ConfigDict:
        config = argument if isinstance(argument, ConfigDict) else _load(argument)
        settings.check_names(config)
        for name, kinds in settings.FIELDS.items():
            group, field = name.split(".")
            found = config[group].get_type(field)
            if found not in kinds and not (found is int and float in kinds):
                raise UserError(
                    f"In the config file {name} is of type {found.__name__}; it must be of type "
                    f"{kinds[0].__name__}."
                )
        return config.lock()


def _load(argument: str) -> ConfigDict:
    """What get_config() of a file returns, given what follows the colon of FILE:PRESET."""
    name, colon, preset = argument.partition(":")
    path = os.path.abspath(resolve(name))
    if not os.path.isfile(path):
        raise UserError(f"The config file {shown(name)} does not exist.")
    loader = importlib.machinery.SourceFileLoader("config_file", path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("config_file", loader))
    try:
        loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            raise UserError(f"The config file {shown(name)} has no function get_config().")
        presets = [preset] if colon else []
        try:
            inspect.signature(get_config).bind(*presets)
        except TypeError:
            wanted = "takes no preset" if presets else "needs a preset"
            raise UserError(f"The config file {shown(name)} {wanted} after a colon.") from None
        config = get_config(*presets)
    except UserError:
        raise
    except Exception as error:
        raise UserError(_failure(name, path, error)) from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config() of {shown(name)} returns {shown(config)}, not a ConfigDict.")
    return config


def _failure(name: str, path: str, error: Exception) -> str:
    """What went wrong in a config file, and in which of its lines."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        lines.append(error.lineno)
    where = f" in line {lines[-1]}" if lines else ""
    what = f"{type(error).__name__}: {_one_line(error)}"
    return f"The config file {shown(name)} fails{where}: {what}."


class _ValueParser(flags.ArgumentParser):
    """Reads the text of an override. What the field may be is checked by Config."""

    def __init__(self, read: Callable[[str], Any], wanted: str):
        self.read, self.wanted = read, wanted

    def parse(self, argument: Any) -> Any:
        if not isinstance(argument, str):
            return argument  # the value in the config file, which config_flags parses too
        try:
            return self.read(argument)
        except (ValueError, KeyError):
            raise ValueError(f"it must be {self.wanted}") from None


def _whole_number(text: str) -> int | None:
    return None if text.strip().lower() == "none" else int(text)


def _truth(text: str) -> bool:
    return {"true": True, "1": True, "false": False, "0": False}[text.strip().lower()]


for kind, parser in {
    int: _ValueParser(
        _whole_number, "a whole number such as 1000, or none where there may be none"
    ),
    float: _ValueParser(float, "a number such as 0.1 or 1e-3"),
    bool: _ValueParser(_truth, "true or false"),
}.items():
    config_flags.register_flag_parser_for_type(kind, parser)


def _flag_sentence(error: flags.Error) -> str:
    """absl's text as a sentence; what _ConfigParser raised is one already."""
    text, cause = str(error), error.__context__
    if isinstance(cause, UserError):
        return str(cause)
    if isinstance(error, flags.UnrecognizedFlagError):
        hint = re.search(r"Did you mean: ([\w-]+)", text)
        known = f"There is no flag {shown('--' + error.flagname)}."
        return known + (f" Did you mean --{hint[1]}?" if hint else "")
    if required := re.match(r"flag --(\w+)=None: .*must have a value", text):
        return f"The flag --{required[1]} is missing."
    if isinstance(error, flags.IllegalFlagValueError) and cause is not None:
        given = text.removeprefix("flag ").removesuffix(f": {cause}")
        return f"The value of {shown(given)} is not possible: {_one_line(cause)}."
    return f"{_one_line(error)}."


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return text if len(text) <= 300 else f"{text[:300]} ..."


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
