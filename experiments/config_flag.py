"""The flag --config=FILE[:PRESET], and --config.group.field=value for every field."""

import importlib.machinery
import importlib.util
import inspect
import os
import traceback
from collections.abc import Callable
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from yocou_jax import config as settings
from yocou_jax.errors import UserError, shown
from yocou_jax.files import expand_path


def config_file(
    default: str | ConfigDict | None, help_text: str, flag_values: flags.FlagValues = flags.FLAGS
) -> flags.FlagHolder:
    """Defines --config=FILE[:PRESET], and --config.group.field=value for every field.

    This uses ml_collections.config_flags, which would read the default and sys.argv immediately. A
    mistake in them could then not become a sentence of `cli.run`. So `command_line.parse` gives
    both to the parser later.
    """
    parser = ConfigParser(default)
    holder = config_flags.DEFINE_config_file(
        "config", None, help_text, flag_values, sys_argv=parser.words
    )
    flag_values["config"].parser = parser
    return holder


class ConfigParser(flags.ArgumentParser):
    """Reads the value of --config. Each mistake in the file is a UserError."""

    def __init__(self, default: str | ConfigDict | None):
        self.default = default
        self.words: list[str] = []  # the command line, in which config_flags finds the overrides

    def parse(self, argument: str | ConfigDict) -> ConfigDict:
        config = argument if isinstance(argument, ConfigDict) else _load_config(argument)
        settings.check_names(config)
        for name, kinds in settings.FIELDS.items():
            group, field = name.split(".")
            found = config[group].get_type(field)
            if found == kinds[:-1]:  # several types and none
                continue
            if found not in kinds and not (found is int and float in kinds):
                raise UserError(
                    f"In the config file {name} is of type {found.__name__}; it must be of type "
                    f"{kinds[0].__name__}."
                )
        return config.lock()


def _load_config(argument: str) -> ConfigDict:
    """The result of get_config() in FILE. For FILE:PRESET it is that of get_config(PRESET)."""
    name, colon, preset = argument.partition(":")
    path = os.path.abspath(expand_path(name))
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
    """A sentence about an error in a config file, with its line."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        lines.append(error.lineno)
    where = f" in line {lines[-1]}" if lines else ""
    what = f"{type(error).__name__}: {one_line(error)}"
    return f"The config file {shown(name)} fails{where}: {what}."


def one_line(error: Exception) -> str:
    """The text of an error, as the end of a sentence."""
    text = " ".join(str(error).split()).rstrip(".")
    return text if len(text) <= 300 else f"{text[:300]} ..."


# --- The values of fields -------------------------------------------------------------------------


class _ValueParser(flags.ArgumentParser):
    """Reads the text of an override. `Config` checks the range of the value."""

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


def _number_or_text(text: str) -> int | str | None:
    try:
        return _whole_number(text)
    except ValueError:
        return text


def _truth(text: str) -> bool:
    return {"true": True, "1": True, "false": False, "0": False}[text.strip().lower()]


for kind, parser in {
    int: _ValueParser(
        _whole_number, "a whole number such as 1000, or none where there may be none"
    ),
    float: _ValueParser(float, "a number such as 0.1 or 1e-3"),
    bool: _ValueParser(_truth, "true or false"),
    (int, str): _ValueParser(_number_or_text, "a whole number, a text or none"),
}.items():
    config_flags.register_flag_parser_for_type(kind, parser)
