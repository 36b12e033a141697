"""Programs that tests start and interrupt."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def interruptible(command: list[str], **options: Any) -> Iterator["subprocess.Popen[str]"]:
    """A program in a session of its own that heeds an interrupt, though the tests themselves were started in the background,
    where shells have it ignored. However the test ends, the program and its children are gone afterwards.
    """
    process = subprocess.Popen(command, start_new_session=True, preexec_fn=_heed, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _heed() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
