"""Programs that tests start and interrupt, and where they meet."""

import contextlib
import os
import random
import signal
import socket
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


def free_port() -> int:
    """A TCP port on which rank 0 will listen itself, as under Slurm (else: ``rendezvous_store``).

    None of those that Linux gives to any connection (32768 and up): it could be taken by then.
    """
    for port in random.sample(range(20000, 32000), 1000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise OSError("no port is free between 20000 and 32000")


def _heed() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
