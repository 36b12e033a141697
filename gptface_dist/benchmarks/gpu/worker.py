"""The process of one task: ``python -m gptface_dist.benchmarks.gpu.worker ASSIGNMENT PARENT``."""

import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

from gptface_dist.benchmarks.gpu import context

POLL_S = 0.5


def end_with(parent: int) -> None:
    """Once the driver is gone, however it went, end this process and all that it started, and remove its working folder.

    They would use the GPU beside those of the next call.
    """

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_S)
        shutil.rmtree(Path.cwd(), ignore_errors=True)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=follow, daemon=True).start()


def main() -> None:
    """Do what the command line says; status 1 where the GPU became unusable, which is recorded."""
    assignment, parent = sys.argv[1:]
    end_with(int(parent))
    try:
        context.run(context.Assignment.loads(assignment))
    except context.Unusable:
        sys.exit(1)


if __name__ == "__main__":
    main()
