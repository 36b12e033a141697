"""Progress bar of long commands."""

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def bar(unit: str = "", shown: bool = True) -> Progress:
    """A progress bar with description, count, elapsed and remaining time.

    It is on stderr if that is a terminal, and disappears at the end; to a file or pipe it writes nothing.

    Args:
        unit: what is counted; may name fields of the task, as rich's TextColumn does.
        shown: False for none, whatever stderr is.
    """
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *([TextColumn(unit)] if unit else [])]
    # Lines go through the bar's console where both are on a terminal, and untouched to a file or pipe.
    console, terminal = Console(stderr=True, soft_wrap=True), sys.stdout.isatty()
    return Progress(
        *columns,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        redirect_stdout=terminal,
        redirect_stderr=terminal,
        disable=not (shown and console.is_terminal),
    )
