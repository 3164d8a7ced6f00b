"""The one exception that a command line turns into a sentence instead of a stack trace."""


class UserError(ValueError):
    """Something the user asked for is impossible; the message is the full sentence to show.

    Raise it for bad input (a field, a file, a shape that does not divide), never for a bug:
    `experiments.cli` prints its message alone and exits with code 2.
    """
