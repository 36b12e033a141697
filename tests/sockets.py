"""What a program and its children listen on, as the kernel tells it."""

import contextlib
import ipaddress
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

LISTEN = "0A"


def run_and_watch(
    command: list[str], every_s: float = 0.02, **options: object
) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """Run a program to its end; also the addresses at which it or a child of it was seen listening by TCP."""
    seen: set[str] = set()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(every_s):
            seen.update(listening(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        out, error = process.communicate(timeout=300)
    finally:
        process.kill()
        ended.set()
        watcher.join()
    return subprocess.CompletedProcess(command, process.returncode, out, error), seen


def listening(pid: int) -> set[str]:
    """Addresses at which a process or a descendant listens now."""
    sockets = {inode for process in tree(pid) for inode in _sockets(process)}
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN and fields[9] in sockets:
                found.add(_address(fields[1].split(":")[0]))
    return found


def _address(text: str) -> str:
    """The kernel writes words of 32 bits in the machine's order."""
    words = [bytes.fromhex(text[start : start + 8])[::-1] for start in range(0, len(text), 8)]
    return str(ipaddress.ip_address(b"".join(words)))


def tree(pid: int) -> Iterator[int]:
    """The process and its descendants, as far as they are there now."""
    yield pid
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from tree(int(child))


def _sockets(pid: int) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if name := re.fullmatch(r"socket:\[(\d+)\]", str(descriptor.readlink())):
                    yield name[1]
