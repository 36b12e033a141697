"""The ``gptface`` program in the process of a test: its libraries are there, and take seconds to import anew."""

import contextlib
import io
import sys
from pathlib import Path

from gptface_dist.tools import main


def gptface(*arguments: str | Path) -> tuple[int, str, str]:
    """Run the program with arguments: status, stdout, stderr."""
    out, error = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["gptface", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            main.run()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        sys.argv = before
    return status, out.getvalue(), error.getvalue()
