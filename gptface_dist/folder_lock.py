"""One writer at a time in a run's folder."""

import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path

from gptface_dist.errors import UserError, one_line

log = logging.getLogger(__name__)

NAME = ".lock"
"""File in the run's folder, which exists while a run writes there; one that a killed run left behind locks nothing."""


class FolderLock:
    """The right to write in a run's folder, held by rank 0's process until :meth:`release` or its end.

    The kernel holds the lock (flock(2), on NFS as a lock of the server), so it ends with its process, however that ends.
    """

    def __init__(self, folder: Path):
        """Make the folder if need be, and lock it. :class:`UserError`, which names the other run, where it is locked."""
        self._path = folder / NAME
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = self._locked()
            mine = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(mine).encode(), 0)
        except OSError as error:
            raise UserError(f"run.folder {folder} cannot be used: {one_line(error)}") from None

    def _locked(self) -> int:
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                other = _holder(os.pread(descriptor, 4096, 0))
                os.close(descriptor)
                raise UserError(
                    f"run.folder {self._path.parent} is in use by {other}: wait for that run, end it, or choose another folder"
                ) from None
            except OSError as error:
                log.warning("%s: %s: nothing keeps a second run out of this folder", self._path, error.strerror)
                return descriptor
            # Its holder may have removed the file between our open and our lock.
            if self._path.exists() and os.path.samestat(os.fstat(descriptor), self._path.stat()):
                return descriptor
            os.close(descriptor)

    def release(self) -> None:
        """Remove the lock file, and the folders that :meth:`__init__` made if they are still empty; once."""
        if self._descriptor < 0:
            return
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = -1
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:
                break


def _holder(text: bytes) -> str:
    try:
        other = json.loads(text)
        return f"process {other['pid']} on {other['host']} since {other['since']}"
    except (ValueError, KeyError, TypeError):
        # It has locked the file and not written yet.
        return "another run"
