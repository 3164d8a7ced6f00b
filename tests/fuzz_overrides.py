"""Mistyped command lines: each one gives the config that was typed, or one sentence.

    python -m tests.fuzz_overrides --seed=0 --count=10000 --command=train

Each line is a valid one with up to three mistakes: in the names of flags and fields, in values, in
the config file. This process parses it as the command would, and builds its config. A line passes
if it gives a Config whose fields have the values that were typed (this file reads them itself), or
a UserError of one short sentence. Everything else is a failure, also a line that takes longer than
SECONDS. Exits with 1 after a failure. --set_up=20 also sets up the first 20 models that are
accepted, without an array. This must work too, or give a sentence.
"""

import argparse
import contextlib
import decimal
import importlib
import io
import random
import signal
import string
import sys
import tempfile
from pathlib import Path

import absl.logging
from absl import flags
from absl.testing import flagsaver

from experiments import cli
from yocou_jax.config import FIELDS, Config
from yocou_jax.errors import UserError, shown

SECONDS = 20  # limit for one line
LONGEST = 600  # limit for a sentence, in characters
# Words of a stack trace, or of modules that a user does not know.
FOREIGN = ("Traceback", "absl", "ml_collections", "site-packages", "dict_keys", 'File "')

FILES = {  # each config file has one mistake; good.py has none
    "good.py": "from configs.yocou_small import get_config",
    "syntax.py": "def get_config(:\n",
    "empty.py": "",
    "raises.py": "def get_config():\n    return 1 / 0\n",
    "imports.py": "import no_such_module\n",
    "none.py": "def get_config():\n    pass\n",
    "number.py": "def get_config():\n    return 3\n",
    "not_a_function.py": "get_config = 3\n",
    "attribute.py": "def get_config():\n    return None.model\n",
    "key.py": "def get_config():\n    return {}['model']\n",
    "wrong_type.py": "from configs import base\ndef get_config():\n    c = base.get_config()\n"
    "    c.run.steps = 'many'\n    return c\n",
    "new_field.py": "from configs import base\ndef get_config():\n    c = base.get_config()\n"
    "    c.run.stepz = 3\n    return c\n",
    "flat.py": "from ml_collections import ConfigDict\ndef get_config():\n"
    "    return ConfigDict({'model': 3})\n",
    "partial.py": "from configs import base\ndef get_config():\n    c = base.get_config()\n"
    "    del c.model\n    return c\n",
    "list.py": "from configs import base\ndef get_config():\n    c = base.get_config()\n"
    "    del c.run.steps\n    c.run.steps = [1]\n    return c\n",
    "required.py": "from configs import base\nfrom ml_collections.config_dict import placeholder\n"
    "def get_config():\n    c = base.get_config()\n    del c.run.steps\n"
    "    c.run.steps = placeholder(int, required=True)\n    return c\n",
    "huge.py": "from configs import base\ndef get_config():\n    c = base.get_config()\n"
    "    c.run.seed = 10**5000\n    return c\n",
    "latin.py": "# caf\\xe9\n",
    "value_error.py": "def get_config():\n    raise ValueError('a' * 3000 + '\\n' * 20)\n",
    "user_error.py": "from yocou_jax.errors import UserError\ndef get_config():\n"
    "    raise UserError('This config is for another machine.')\n",
    "name with spaces.py": "from configs.yocou_small import get_config",
}

ALPHABET = string.ascii_lowercase + string.digits + "._-=:[]{}()'\",@*|/\\ #\n\0é中🙂\udcff"


def write_files(folder: Path) -> list[str]:
    for name, text in FILES.items():
        (folder / name).write_bytes(text.encode().replace(b"\\xe9", b"\xe9"))
    (folder / "binary.py").write_bytes(bytes(range(256)))
    (folder / "folder.py").mkdir()
    return [str(folder / name) for name in (*FILES, "binary.py", "folder.py", "absent.py")]


# --- Valid lines and mistakes ---------------------------------------------------------------------

SHORT = {"int": "1 2 3 4 7 8 10 16 64 128 512 600 1000", "float": "0 0.1 0.5 0.9 1 1e-3 2e-2 3"}
TEXTS = {
    "model.architecture": ["yoco_u", "rins", "transformer", "full*4", "window*2@3 | cross*2"],
    "model.num_loops": ["1", "3", "none", "1,2,3", "poisson(3)", "poisson(16)"],
    "optimizer.loop_loss": ["", "1", "0,1", "0.1,0.2,1"],
    "compute.dtype": ["auto", "float32", "bfloat16"],
    "compute.attention": ["auto", "xla", "reference", "pallas_tpu"],
    "compute.remat": ["none", "attention", "full"],
    "optimizer.name": ["adamw", "muon"],
    "optimizer.schedule": ["cosine", "wsd", "constant"],
    "data.bad_rows": ["refuse", "skip"],
}
ODD = (
    "", " ", "-1", "0", "1", "+3", " 3 ", "1e3", "1_000", "0x10", "007", "3.0", "1e400", "-1e400",
    "inf", "-inf", "nan", "NaN", "none", "None", "NONE", "null", "true", "False", "yes", "[1]",
    "(1,2)", "{}", "{'a': 1}", "'3'", '"3"', "2147483647", "2147483648", "4294967295", "4294967296",
    "-2147483649", "9" * 30, "9" * 5000, "1e-50", "1e-320", "0.9999999999", "1.0000001", "٣", "½",
    "é", "🙂", "\udcff", "a" * 5000, "\0", "a\nb", "$(ls)", "--config.run.steps=3", "=", "~",
    "full*0", "full*9999999999", "cross*2", "full*2, streams=0", "full*2, streams=99999",
    "1,2", "1,1", "poisson(2)", "poisson(99)", "1,2," * 900,
    "window*1@0 | cross*1", "a*b|c*d", "full*1|" * 900 + "full*1", "full*" + "9" * 4000,
)  # fmt: skip


def valid_value(name: str, rng: random.Random) -> str:
    kind = FIELDS[name][0]
    if kind is str or name in TEXTS:
        return rng.choice(TEXTS.get(name, ["python", "bytes", "text", "a b", "x/y*.txt"]))
    return rng.choice(["true", "false"] if kind is bool else SHORT[kind.__name__].split())


def valid_line(rng: random.Random) -> list[str]:
    file = rng.choice(["configs/yocou_small.py", "configs/base.py", "configs/yocou_1b.py:yoco"])
    words = [f"--config={file}"]
    for name in rng.sample(list(FIELDS), rng.randint(0, 3)):
        value = valid_value(name, rng)
        words += rng.choice([[f"--config.{name}={value}"], [f"--config.{name}", value]])
    return words


def mistyped(text: str, rng: random.Random) -> str:
    """The text with one character dropped, doubled, swapped, inserted or replaced."""
    i, c = rng.randrange(len(text) + 1), rng.choice(ALPHABET)
    return rng.choice(
        [
            text[:i] + text[i + 1 :],
            text[:i] + text[max(i - 1, 0) :],
            text[: max(i - 1, 0)] + text[i : i + 1] + text[max(i - 1, 0) : i] + text[i + 1 :],
            text[:i] + c + text[i:],
            text[:i] + c + text[i + 1 :],
        ]
    )


def mutate(words: list[str], files: list[str], rng: random.Random) -> list[str]:
    """Makes one mistake in a command line."""
    words = list(words)
    i = rng.randrange(len(words) + 1)
    word = words[i] if i < len(words) else f"--config.{rng.choice(list(FIELDS))}=1"
    name, _, value = word.partition("=")
    group, _, field = name.rpartition(".")
    other = rng.choice(list(FIELDS))
    changed = rng.choice(
        [
            [mistyped(word, rng)],
            [mistyped(name, rng) + "=" + value],
            [f"{name}={mistyped(value, rng)}"],
            [f"{name}={rng.choice(ODD)}"],
            [f"{name}={rng.choice(ODD)}"],
            [f"--config.{other}={rng.choice(ODD)}"],
            [f"--config.{other}={rng.choice(ODD)}"],
            [f"--config.{other}", rng.choice(ODD)],
            [f"--noconfig.{other}"],
            [f"--config.{other}"],
            [f"--config.{field}={value}"],
            [f"{group}={value}"],
            [f"{name}.{rng.choice(['keys', 'upper', 'real', '__class__', 'x'])}={value}"],
            [f"{name}[{rng.choice(['0', ':', 'x', '', '(', '-1'])}]={value}"],
            [name.replace("_", "-") + "=" + value],
            [name.upper() + "=" + value],
            [word, word],
            [word, f"--config.{other}={valid_value(other, rng)}"],
            [name],
            [],
            [
                rng.choice(
                    ["--", "-", "---", "x", "--no", "--undefok=x", "--flagfile=/dev/null", ""]
                )
            ],
            [
                rng.choice(
                    ["--flagfile=configs", "--flagfile=", "--flagfile", "--nojson", "--workdir"]
                )
            ],
        ]
    )
    words[i : i + 1] = changed
    if rng.random() < 0.15:  # the config file
        preset = rng.choice(["", "", "", ":", ":rins", ":nonsense", ":a:b"])
        file = rng.choice([*files, "~/c.py", "", "configs", "configs/base", "a\0b", "é" * 300])
        words = [w if not w.startswith("--config=") else f"--config={file}{preset}" for w in words]
    if rng.random() < 0.05:
        rng.shuffle(words)
    return words


# --- What was typed, read independently -----------------------------------------------------------


def typed(words: list[str]) -> dict[str, str]:
    """For every field that the line names (in either notation), the last text."""
    values, rest = {}, iter(words)
    for word in rest:
        if word == "--":
            break
        name, equals, value = word.removeprefix("-").removeprefix("-").partition("=")
        if name.startswith("noconfig."):
            values[name[9:]] = "false"
        elif name.startswith("config."):
            plain = FIELDS.get(name[7:]) == (bool,)
            values[name[7:]] = value if equals else "true" if plain else next(rest, "")
        elif not equals and name in ("config", "workdir", "init_from", "coordinator"):
            next(rest, "")
    return values


def means(text: str, value) -> bool:
    """Whether the text means this value of a field. The rules are those of this file only."""
    if isinstance(value, str):
        return value == text
    text = text.strip()
    if value is None:
        return text.lower() == "none"
    if isinstance(value, bool):
        return text.lower() in (("true", "1") if value else ("false", "0"))
    with contextlib.suppress(decimal.InvalidOperation):
        return type(value)(decimal.Decimal(text)) == value
    return False


def answer(words: list[str], config_flag: flags.FlagHolder) -> tuple[Config | None, str | None]:
    """The config of a line, and a description of what is wrong. Each may be None."""
    try:
        signal.alarm(SECONDS)
        with flagsaver.flagsaver(), contextlib.redirect_stderr(io.StringIO()):
            cli.parse(["command", *words])
            config = Config.from_dict(config_flag.value)
    except UserError as error:
        return None, _not_a_sentence(str(error))
    except TooLong:
        return None, f"no answer in {SECONDS} s"
    except BaseException as error:
        return None, f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    for name, text in typed(words).items():
        group, _, field = name.partition(".")
        value = getattr(getattr(config, group), field)
        if not means(text, value):
            return config, f"{name} is {value!r}, but {text!r} was typed"
    return config, None


def set_up_failure(config: Config) -> str | None:
    """What goes wrong when an accepted config is set up on one device. None: nothing, or the model
    is too deep to try."""
    import jax

    from yocou_jax.training.step import set_up

    program = config.model.program
    if len(program.stages) > 10 or (
        program.depth > 20 and (config.compute.unroll > 20 or not config.compute.scan)
    ):
        return None  # it takes minutes to trace
    try:
        jax.eval_shape(set_up(config, jax.devices()[:1]).init)
    except UserError as error:
        return _not_a_sentence(str(error))
    except Exception as error:
        return f"{type(error).__name__} in set_up: {error}"
    return None


def _not_a_sentence(text: str) -> str | None:
    found = [word for word in FOREIGN if word in text]
    if found or len(text) > LONGEST or "\n" in text or not text.endswith((".", "?")):
        return f"no short, plain sentence ({len(text)} characters, {found}): {text}"
    return None


class TooLong(BaseException):
    """A line took too long. It is a BaseException, so that no other code catches it."""


def _too_long(*_):
    raise TooLong


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--command", default="train", help="of experiments/, one with --config")
    parser.add_argument("--set_up", type=int, default=0)
    options = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")
    absl.logging.set_verbosity(absl.logging.ERROR)
    config_flag = importlib.import_module(f"experiments.{options.command}").CONFIG
    signal.signal(signal.SIGALRM, _too_long)
    rng, accepted, failures = random.Random(options.seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(Path(folder))
        for number in range(options.count):
            words = valid_line(rng)
            for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
                words = mutate(words, files, rng)
            config, wrong = answer(words, config_flag)
            if config is not None and wrong is None and accepted < options.set_up:
                wrong = set_up_failure(config)
            accepted += config is not None
            failures += wrong is not None
            if wrong:
                print(f"line {number}: {' '.join(map(shown, words))}\n    {wrong[:1000]}")
    print(
        f"{options.count} command lines of {options.command}, seed {options.seed}: {accepted} give "
        f"the config that was typed, {options.count - accepted - failures} a sentence, "
        f"{failures} fail."
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
