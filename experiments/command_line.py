"""Parses a command line. Each mistake in it is one sentence."""

import itertools
import re

from absl import flags

from experiments.config_flag import one_line
from yocou_jax import config as settings
from yocou_jax import foreign
from yocou_jax.errors import UserError, shown


def parse(
    argv: list[str], flag_values: flags.FlagValues = flags.FLAGS, arguments: int = 0
) -> list[str]:
    """Sets the flags from a command line. Returns argv[0] and the words that are not flags, at most
    `arguments` of them.

    Every override is applied or refused. Raises UserError for every mistake in the command line or
    in its config file.
    """
    try:
        words = flag_values.read_flags_from_files(argv[1:], force_gnu=False)
        _check_values(words, flag_values)
        if "config" in flag_values:
            _check_overrides(words, flag_values["config"])
        rest = flag_values([argv[0], *words])
    except flags.Error as error:
        raise UserError(_sentence(error, flag_values)) from error
    except UserError:
        raise
    except ValueError as error:  # a flag file that is not text, --nojson=3
        raise UserError(f"The command line cannot be read: {one_line(error)}.") from error
    if len(rest) > 1 + arguments:
        raise UserError(
            f"The argument {shown(rest[1 + arguments])} is not possible here: every option is a "
            "--flag."
        )
    return rest


def _check_values(words: list[str], flag_values: flags.FlagValues) -> None:
    """Raises UserError for `--workdir --json`: absl would take the second flag as the value of the
    first."""
    following_is_value = False
    for word, following in itertools.pairwise(words):
        if following_is_value or not word.startswith("-"):  # a value, even if it begins with --
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
    """Checks that each --config.group.field is a field, and comes after the only --config. Reads
    the default config if there is no --config."""
    flag.parser.words[:] = words
    files = [i for i, word in enumerate(words) if re.match(r"--?config(=|$)", word)]
    if len(files) > 1:
        raise UserError(
            f"The flag --config is given {len(files)} times, but there can be one config file."
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


def _field_flag(name: str) -> str | None:
    """The flag of the config field that `name` may mean: --window is --config.model.window."""
    fields = [f for f in settings.FIELDS if f.rpartition(".")[2] == name.rpartition(".")[2]]
    return f"config.{fields[0]}" if fields else None


def _sentence(error: flags.Error, flag_values: flags.FlagValues) -> str:
    """An error of absl as a sentence. An error of ConfigParser is a sentence already."""
    text, cause = str(error), error.__context__
    if isinstance(cause, UserError):
        return str(cause)
    if isinstance(error, flags.UnrecognizedFlagError):
        nearest = foreign.NEAREST_FLAG.search(text)
        field = _field_flag(error.flagname) if "config" in flag_values else None
        name = nearest[1] if nearest else field
        hint = f" Did you mean --{name}?" if name else ""
        return f"There is no flag {shown('--' + error.flagname)}.{hint}"
    if required := foreign.REQUIRED_FLAG.match(text):
        return f"The flag --{required[1]} is missing."
    if isinstance(error, flags.IllegalFlagValueError) and cause is not None:
        given = foreign.refused_flag(text, cause)
        return f"The value of {shown(given)} is not possible: {one_line(cause)}."
    return f"{one_line(error)}."
