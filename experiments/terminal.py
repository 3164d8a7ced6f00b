"""Texts that a user types or names, and texts that a model writes, in a terminal."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from yocou_jax.errors import UserError
from yocou_jax.files import expand_path

if TYPE_CHECKING:  # it takes seconds to import
    from yocou_jax.inference.text import TextRow


def checked(name: str, text: str) -> str:
    """The text without a byte-order mark, if it is UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes of a terminal that are no UTF-8
        raise UserError(f"{name} is not UTF-8 text.") from error
    return text.removeprefix("\ufeff")


def read_prompt(name: str) -> str:
    """The text of a file, or of stdin for "-"; its line ends stay, as in training."""
    try:
        data = sys.stdin.buffer.read() if name == "-" else expand_path(name).read_bytes()
        return data.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"The prompt file {name} cannot be read: {reason}.") from error


def talk(write: Callable[[list[str]], None]) -> None:
    """Asks for prompts and continues them; Ctrl-C ends a text, or the command between texts."""
    sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text: `checked` says so
    while True:
        try:
            text = input("> ")
        except EOFError:
            return
        try:
            if text:
                write([checked("The prompt", text)])
        except UserError as error:
            note(str(error))
        except KeyboardInterrupt:
            note("\nInterrupted.")


def note(text: str) -> None:
    """A line on stderr, after what stdout has so far."""
    sys.stdout.flush()
    print(text, file=sys.stderr)


class Printer:
    """Writes rows of text to stdout: a single row as it comes, several when each of them ends.

    prompts: what the rows continue; each has the same number of rows, one after the other.
    """

    def __init__(self, prompts: list[str], rows: "list[TextRow]"):
        self.prompts, self.rows = prompts, rows
        self.begun = False

    def __call__(self, tokens: np.ndarray) -> list[bool]:
        """Takes a block of new tokens [rows, steps], -1 after the end of a row; which ended."""
        if len(self.rows) == 1:
            self._continue(self.rows[0], tokens[0])
        else:
            for i, row in enumerate(self.rows):
                before = row.ended
                row.add(tokens[i])
                if row.ended and not before:
                    _print_now(self._whole(i))
        return [row.ended for row in self.rows]

    def _continue(self, row: "TextRow", tokens: np.ndarray) -> None:
        """Prints what the tokens add to the only row."""
        start, shown = "" if self.begun else self.prompts[0], len(row.text)
        row.add(tokens)
        end = "\n" if row.ended else ""
        _print_now(start + row.text[shown:] + end)
        self.begun = True

    def _whole(self, i: int) -> str:
        """A row of several with its title and its prompt."""
        num_samples = len(self.rows) // len(self.prompts)
        prompt, sample = divmod(i, num_samples)
        title = f"prompt {prompt}" + (f", sample {sample}" if num_samples > 1 else "")
        return f"--- {title} ---\n{self.prompts[prompt]}{self.rows[i].text}\n"


def _print_now(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
