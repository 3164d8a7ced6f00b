"""The one exception that a command line turns into a sentence instead of a stack trace."""


class UserError(ValueError):
    """Something the user asked for is impossible; the message is the full sentence to show.

    Raise it for bad input (a field, a file, a shape that does not divide), never for a bug:
    `experiments.cli` prints its message alone and exits with code 2.
    """


def shown(value) -> str:
    """A value as a sentence quotes it: as Python writes it, without the middle of a long one."""
    try:
        text = repr(value)
    except ValueError:  # Python does not write integers of more than 4,300 digits
        return f"<a number of {value.bit_length()} bits>"
    return text if len(text) <= 100 else f"{text[:60]} ... {text[-20:]}"
