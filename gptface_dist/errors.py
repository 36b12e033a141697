"""The one exception for a user's mistake."""


class UserError(ValueError):
    """Input that cannot be worked with. The message is one line: what is wrong, where, and what to do.

    The ``gptface`` program prints it without a traceback and exits with status 2.
    """
