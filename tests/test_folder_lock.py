"""One writer at a time in a run's folder, and no lock that outlives it."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gptface_dist.errors import UserError
from gptface_dist.folder_lock import NAME, FolderLock

HOLD = "import sys, time; from pathlib import Path; from gptface_dist.folder_lock import FolderLock\n"
HOLD += "lock = FolderLock(Path(sys.argv[1]), 'run.folder'); print('held', flush=True); time.sleep(600)"


def held(folder: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_one_is_told_who_holds_it(tmp_path: Path) -> None:
    other = held(tmp_path / "run")
    try:
        with pytest.raises(UserError, match=re.escape(f"process {other.pid} on {socket.gethostname()} since 20")):
            FolderLock(tmp_path / "run", "run.folder")
        assert str(other.pid) in (tmp_path / "run" / NAME).read_text(), "what it says of itself stays"
    finally:
        other.kill()
        other.wait()


def test_a_killed_run_leaves_no_lock(tmp_path: Path) -> None:
    other = held(tmp_path / "run")
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / "run" / NAME).exists()
    lock = FolderLock(tmp_path / "run", "run.folder")
    assert f'"pid": {os.getpid()}' in (tmp_path / "run" / NAME).read_text()
    lock.release()


def test_released_it_leaves_what_was_there(tmp_path: Path) -> None:
    FolderLock(tmp_path / "new" / "deep", "run.folder").release()
    assert list(tmp_path.iterdir()) == []
    lock = FolderLock(tmp_path / "run", "run.folder")
    (tmp_path / "run" / "metrics.jsonl").touch()
    lock.release()
    lock.release()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]
    FolderLock(tmp_path / "run", "run.folder").release()


def test_children_do_not_hold_it(tmp_path: Path) -> None:
    """Workers of data loading may outlive a killed run by seconds."""
    lock = FolderLock(tmp_path, "run.folder")
    child = subprocess.Popen(["sleep", "600"], close_fds=False)
    lock.release()
    with FolderLock(tmp_path, "run.folder") as again:
        assert again.locked
        assert child.poll() is None
    child.kill()
    child.wait()


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"pid": 1}', b"\xff"])
def test_a_holder_that_has_not_said_who_it_is(tmp_path: Path, text: bytes) -> None:
    lock = FolderLock(tmp_path, "run.folder")
    (tmp_path / NAME).write_bytes(text)
    with pytest.raises(UserError, match="is in use by another process"):
        FolderLock(tmp_path, "run.folder")
    lock.release()


def test_a_folder_that_cannot_be_made_is_an_error_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        FolderLock(tmp_path / "file" / "run", "run.folder")
