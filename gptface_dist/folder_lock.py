"""One writer at a time in a folder: of a run, of shards, of a tokenizer."""

import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path

from gptface_dist.errors import UserError

log = logging.getLogger(__name__)

NAME = ".lock"
"""File in the folder, which exists while a process writes there; one that a killed process left behind locks nothing."""


class FolderLock:
    """The right to write in a folder, held until :meth:`release`, the end of a ``with`` block, or that of this process.

    The kernel holds the lock (flock(2), on NFS as a lock of the server), so it ends with its process, however that ends.
    """

    def __init__(self, folder: Path, name: str):
        """Make the folder if need be, and lock it. :class:`UserError`, which names the other process, where it is locked;
        :class:`OSError` where the folder cannot be made or written.

        ``name``: what the folder is called by users, for messages.
        """
        self._name = name
        self.locked = True
        """False where the file system knows no locks; a warning says so."""
        self._path = folder / NAME
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self._descriptor = self._locked()
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(holder).encode(), 0)

    def _locked(self) -> int:
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                other = _holder(os.pread(descriptor, 4096, 0))
                os.close(descriptor)
                raise UserError(
                    f"{self._name} {self._path.parent} is in use by {other}: wait for it, end it, or choose another folder"
                ) from None
            except OSError as error:
                log.warning("%s: %s: nothing keeps a second process out of this folder", self._path, error.strerror)
                self.locked = False
                return descriptor
            # Its holder may have removed the file between our open and our lock.
            if self._path.exists() and os.path.samestat(os.fstat(descriptor), self._path.stat()):
                return descriptor
            os.close(descriptor)

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

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
        return "another process"
