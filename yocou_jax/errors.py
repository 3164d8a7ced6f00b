"""The one exception for which a command shows a sentence, and no stack trace."""


class UserError(ValueError):
    """The user asked for something impossible. The message is the full sentence to show.

    Raise it for bad input (a field, a file, a shape that does not divide), never for a bug:
    `experiments.cli` prints only its message and exits with code 2.
    """


def shown(value) -> str:
    """A value to quote in a sentence: its repr, without the middle if it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python does not write integers of more than 4,300 digits
        return f"<a number of {value.bit_length()} bits>"
    return text if len(text) <= 100 else f"{text[:60]} ... {text[-20:]}"
