"""Errors with one-line messages: mistakes of the user, damaged checkpoints, and any exception in one line."""

from collections.abc import Collection, Iterable


class UserError(ValueError):
    """Invalid input. The message is one line: what is wrong, where, and what to do.

    The ``gptface`` program prints it without a traceback and exits with status 2.
    """


class Damaged(Exception):
    """A folder is not, or no longer, the published checkpoint. The message is one line: what is wrong, and where."""


def not_one_of(name: str, value: object, legal: Iterable[str]) -> str:
    """The message for an option whose value is not a legal one; names the option, the legal values and the value."""
    return f"{name} must be one of {', '.join(legal)}, got {value!r}"


def check_one_of(name: str, value: object, legal: Collection[str]) -> None:
    """Raise :class:`UserError` unless ``value`` is a legal one."""
    if value not in legal:
        raise UserError(not_one_of(name, value, legal))


def one_line(error: BaseException) -> str:
    """Message of an exception, with each run of white space replaced by one blank."""
    return " ".join(str(error).split())


def first_line(error: BaseException, limit: int = 300) -> str:
    """Type of an exception and the first line of its message, cut to ``limit`` characters; for errors of many lines."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:limit]}" if lines else type(error).__name__
