"""Reads prompts from a terminal or a file, and prints the texts of a model."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from yocou_jax.errors import UserError
from yocou_jax.files import expand_path

if TYPE_CHECKING:  # the import takes seconds
    from yocou_jax.inference.text import TextRow


def checked(name: str, text: str) -> str:
    """The text without a byte-order mark. Raises UserError if it is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes from a terminal that are not UTF-8
        raise UserError(f"{name} is not UTF-8 text.") from error
    return text.removeprefix("\ufeff")


def read_prompt(name: str) -> str:
    """The text of a file, or of stdin for "-". Line ends are not changed, as in training."""
    try:
        data = sys.stdin.buffer.read() if name == "-" else expand_path(name).read_bytes()
        return data.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"The prompt file {name} cannot be read: {reason}.") from error


def talk(write: Callable[[list[str]], None]) -> None:
    """Reads prompts and continues them. Ctrl-C ends a text. At the prompt, it ends the command."""
    sys.stdin.reconfigure(errors="surrogateescape")  # `checked` then finds bytes that are not UTF-8
    while True:
        try:
            text = input("> ")
        except EOFError:
            print()
            return
        try:
            if text:
                write([checked("The prompt", text)])
        except UserError as error:
            note(str(error))
        except KeyboardInterrupt:
            note("\nInterrupted.")


def note(text: str) -> None:
    """Prints a line on stderr, after all that was written to stdout so far."""
    sys.stdout.flush()
    print(text, file=sys.stderr)


class Printer:
    """Writes rows of text to stdout. A single row is written while it is generated, and one of
    several rows when it ends.

    prompts: each of them has the same number of rows, one after the other.
    """

    def __init__(self, prompts: list[str], rows: "list[TextRow]"):
        self.prompts, self.rows = prompts, rows
        self.begun = False

    def __call__(self, tokens: np.ndarray) -> list[bool]:
        """Takes a block of new tokens [rows, steps], -1 after the end of a row. Returns which rows
        have ended."""
        if len(self.rows) == 1:
            self._continue(self.rows[0], tokens[0])
        else:
            for i, row in enumerate(self.rows):
                before = row.ended
                row.add(tokens[i])
                if row.ended and not before:
                    _print_now(self._titled(i))
        return [row.ended for row in self.rows]

    def _continue(self, row: "TextRow", tokens: np.ndarray) -> None:
        """Prints the new text of the only row."""
        start, shown = "" if self.begun else self.prompts[0], len(row.text)
        row.add(tokens)
        end = "\n" if row.ended else ""
        _print_now(start + row.text[shown:] + end)
        self.begun = True

    def _titled(self, i: int) -> str:
        """The text of one of several rows, with a title and its prompt."""
        num_samples = len(self.rows) // len(self.prompts)
        prompt, sample = divmod(i, num_samples)
        title = f"prompt {prompt}" + (f", sample {sample}" if num_samples > 1 else "")
        return f"--- {title} ---\n{self.prompts[prompt]}{self.rows[i].text}\n"


def _print_now(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
