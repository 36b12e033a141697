"""A user's mistake, damaged files, and any error in one line."""

from collections.abc import Collection, Iterable


class UserError(ValueError):
    """Input that cannot be worked with. The message is one line: what is wrong, where, and what to do.

    The ``gptface`` program prints it without a traceback and exits with status 2.
    """


class Damaged(Exception):
    """A folder is not, or no longer, the checkpoint that was published. The message is one line: what, and where."""


def not_one_of(name: str, value: object, legal: Iterable[str]) -> str:
    """What is wrong with an option whose value is none of the legal ones."""
    return f"{name} must be one of {', '.join(legal)}, got {value!r}"


def check_one_of(name: str, value: object, legal: Collection[str]) -> None:
    """:class:`UserError` where ``value`` is none of the legal ones."""
    if value not in legal:
        raise UserError(not_one_of(name, value, legal))


def one_line(error: BaseException) -> str:
    """Message of an exception, its line breaks and runs of blanks as one blank each."""
    return " ".join(str(error).split())


def first_line(error: BaseException, limit: int = 300) -> str:
    """Type of an exception and the first line of its message, cut to ``limit`` characters; for errors of many lines."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:limit]}" if lines else type(error).__name__
