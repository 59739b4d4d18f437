"""The two errors a user can meet.

Both carry one line that says what was given, what was expected and what to do; the command line
prints that line and exits with the error's code. Nothing in Lathe prints a traceback at a person.
"""


class LatheError(Exception):
    """Something failed while the request was sound (a full disk, a damaged file). Exit code 1."""

    exit_code = 1


class RequestError(LatheError, ValueError):
    """The request itself was wrong (an unknown field, a size that cannot be). Exit code 2."""

    exit_code = 2


class ExistsError(RequestError):
    """What is to be written is there already.

    Args:
        what: is there, and what to do about it, without an end.
        option: what may be passed in Python to write over it; the command line says what may be done there.
    """

    def __init__(self, what: str, option: str) -> None:
        super().__init__(f"{what}, or {option}")
        self.what = what
