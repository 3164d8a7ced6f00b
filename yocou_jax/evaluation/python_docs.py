"""Questions about Python's own documentation: which sentence describes this function?

An example of a task for lm-evaluation-harness that needs no network. A model that was trained on
the standard library has seen the answers. The questions depend on the version of Python.
"""

import importlib
import inspect
import random

from yocou_jax.errors import UserError

MODULES = (
    *("ast", "base64", "bisect", "calendar", "colorsys", "contextlib", "copy", "csv", "difflib"),
    *("dis", "email.utils", "fileinput", "fnmatch", "functools", "getopt", "getpass", "gettext"),
    *("glob", "heapq", "html", "inspect", "json", "keyword", "linecache", "locale", "mimetypes"),
    *("operator", "pickletools", "platform", "posixpath", "pprint", "random", "shlex", "shutil"),
    *("statistics", "string", "struct", "tarfile", "tempfile", "textwrap", "timeit", "tokenize"),
    *("traceback", "types", "urllib.parse", "uuid", "warnings", "weakref", "zipfile"),
)
CHOICES = 4


def described() -> dict[str, str]:
    """The first line of the documentation of every public function of MODULES, by its first line of
    code. Functions with the same documentation are left out."""
    found: dict[str, str] = {}
    for name in MODULES:
        module = importlib.import_module(name)
        for function, value in inspect.getmembers(module, inspect.isfunction):
            line = (inspect.getdoc(value) or "").partition("\n")[0]
            if not function.startswith("_") and value.__module__ == name and len(line) > 20:
                found[f"def {function}{inspect.signature(value)}:"] = line
    lines = list(found.values())
    return {code: line for code, line in found.items() if lines.count(line) == 1}


def questions(seed: int) -> list[dict]:
    """Every function once, in a drawn order: {"question", "choices", "answer"}. The choices are the
    right line and those of other functions; `answer` is the index of the right one.

    Raises UserError if Python was started without documentation (-OO).
    """
    rng, lines = random.Random(seed), described()
    if len(lines) < CHOICES:
        raise UserError("Python was started with -OO, so its functions have no documentation.")
    asked = []
    for code, line in rng.sample(sorted(lines.items()), len(lines)):
        others = sorted(set(lines.values()) - {line})
        choices, answer = rng.sample(others, CHOICES - 1), rng.randrange(CHOICES)
        choices.insert(answer, line)
        asked.append({"question": f'{code}\n    """', "choices": choices, "answer": answer})
    return asked
