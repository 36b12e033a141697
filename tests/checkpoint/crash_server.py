"""A server of trials: each forks a process that saves a checkpoint and is killed in the middle. Run as a script.

It imports torch once, starts no threads and computes nothing itself, so its children may be forked from it; a fresh process
for each trial would take seconds.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

EVENTS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "open")


class Countdown:
    """Kills this process just before the n-th thing it does to the file system."""

    def __init__(self, left: int):
        self.left = left
        self.seen = 0

    def tick(self) -> None:
        """One thing more."""
        self.seen += 1
        if self.seen == self.left:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(self, event: str, arguments: tuple[object, ...]) -> None:
        """For sys.addaudithook."""
        if event not in EVENTS:
            return
        if event == "open" and not (isinstance(arguments[1], str) and set(arguments[1]) & set("wxa")):
            return
        # Folders are emptied by names relative to them.
        if event in ("os.remove", "os.rmdir") or any(name in f"{arguments[0]} {arguments[1]}" for name in ("step-", "latest")):
            self.tick()


def child(run: Path, step: int, value: float, left: int) -> int:
    """Save, prune; returns the number of things done to the file system."""
    from gptface_dist.checkpoint import folder, storage
    from tests.checkpoint.fake_state import tiny, write

    countdown = Countdown(left)
    sys.addaudithook(countdown.hook)
    sync, put = os.fsync, storage.HashedFile.write

    def counted_sync(handle: int) -> None:
        countdown.tick()
        sync(handle)

    def counted_put(file: storage.HashedFile, data: memoryview) -> None:
        countdown.tick()
        put(file, data)

    os.fsync, storage.HashedFile.write = counted_sync, counted_put  # type: ignore[method-assign]
    write(run, tiny(value), step)
    folder.prune(run / folder.FOLDER_NAME, step, keep_last=1, keep_interval=0)
    return countdown.seen


def trial(run: Path, step: int, value: float, left: int, delay: float) -> dict[str, object]:
    """One process: killed at its ``left``-th act, or after ``delay`` seconds if that is above 0."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            done = child(run, step, value, left)
            os.write(writing, str(done).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    if delay:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(reading, "rb") as answer:
        acts = answer.read()
    return {"killed": os.WIFSIGNALED(status), "status": status, "acts": int(acts or 0)}


def serve() -> None:
    """Trials from standard input, one JSON list of :func:`trial`'s arguments a line."""
    import warnings

    warnings.filterwarnings("ignore")
    # What the children need is imported here, once.
    from tests.checkpoint.fake_state import tiny, write

    warm = Path(sys.argv[1])
    write(warm, tiny(0.0), 1)
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a process with threads must not fork"

    def stuck(signal_number: int, frame: FrameType | None) -> None:
        raise TimeoutError("a trial did not end")

    signal.signal(signal.SIGALRM, stuck)
    print("ready", flush=True)
    for line in sys.stdin:
        signal.alarm(60)
        run, *rest = json.loads(line)
        print(json.dumps(trial(Path(run), *rest)), flush=True)
        signal.alarm(0)


if __name__ == "__main__":
    serve()
