"""Read members of indexed shards, in a folder or behind a URL, by shard number and extent."""

import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gptface_dist.data import remote
from gptface_dist.data.shards import INDEX_NAME, SIDECAR_SUFFIX, Extent, Index, Sidecar
from gptface_dist.errors import UserError


class Unreadable(Exception):
    """A sample or shard that cannot be delivered; the message says why."""


class ShardFile:
    """One shard, open for reading at offsets. A remote shard is first copied whole into a temporary file."""

    def __init__(self, file: BinaryIO):
        self._file = file

    def read(self, extent: Extent) -> bytes:
        """A member's bytes, checked against its CRC-32; :class:`Unreadable` when they are not what was indexed."""
        try:
            data = os.pread(self._file.fileno(), extent.size, extent.offset)
        except OSError as error:
            raise Unreadable(f"read error at byte {extent.offset}: {error}") from None
        if len(data) < extent.size:
            raise Unreadable(f"the shard ends at byte {extent.offset + len(data)}, inside this sample: truncated")
        if zlib.crc32(data) != extent.crc32:
            raise Unreadable(f"bytes {extent.offset}-{extent.offset + extent.size} changed since the shard was indexed")
        return data

    def close(self) -> None:
        """Close the file; a temporary copy of a remote shard is deleted."""
        self._file.close()


@dataclass(frozen=True)
class ShardFolder:
    """Indexed shards under one location."""

    location: str
    """Folder, or URL of a folder, that holds ``index.json`` and the sidecars."""
    index: Index
    """The content of ``index.json``."""

    @classmethod
    def open(cls, location: str | Path) -> "ShardFolder":
        """Read ``index.json`` at a folder or URL."""
        location = str(location).rstrip("/")
        if remote.is_url(location):
            url = remote.join(location, INDEX_NAME)
            try:
                raw = remote.read(url)
            except OSError as error:
                raise UserError(
                    f"{error}: check the URL, or index it: `gptface data index 'URL/{{0..9}}.tar' FOLDER`"
                ) from None
            return cls(location, Index.from_json(raw, url))
        path = Path(location) / INDEX_NAME
        if not Path(location).is_dir():
            raise UserError(f"no folder {location}: give a folder of shards")
        if not path.is_file():
            raise UserError(f"{location} has no {INDEX_NAME}: make it with `gptface data index {location}`")
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        return cls(location, Index.from_json(raw, str(path)))

    @property
    def counts(self) -> list[int]:
        """Samples in each shard."""
        return [shard.samples for shard in self.index.shards]

    def sidecar(self, shard: int) -> Sidecar:
        """The sidecar of shard number ``shard``; :class:`Unreadable` when it is missing or does not fit the index.

        :class:`UserError` as for :meth:`open_shard`.
        """
        entry = self.index.shards[shard]
        name = remote.file_name(entry.name) + SIDECAR_SUFFIX
        try:
            if remote.is_url(self.location):
                raw = remote.read(remote.join(self.location, name))
            else:
                raw = (Path(self.location) / name).read_bytes()
            sidecar = Sidecar.from_json(raw, name)
        except OSError as error:
            raise _judged(error, "no usable shard index") from None
        except UserError as error:
            raise Unreadable(f"no usable shard index: {error}") from None
        if sidecar.sha256 != entry.sha256 or len(sidecar.samples) != entry.samples:
            raise Unreadable(f"{name} and {INDEX_NAME} disagree: rebuild both with `gptface data index`")
        return sidecar

    def open_shard(self, shard: int) -> ShardFile:
        """Open shard number ``shard``; :class:`Unreadable` when it is missing.

        :class:`UserError` when the network, the server or this process fails: such a failure says nothing about the data,
        and replacing samples because of it would make the order depend on it.
        """
        name = self.index.shards[shard].name
        try:
            if remote.is_url(name) or remote.is_url(self.location):
                return ShardFile(remote.download(remote.join(self.location, name)))
            return ShardFile((Path(self.location) / name).open("rb"))
        except OSError as error:
            raise _judged(error, "the shard cannot be opened") from None


def _judged(error: OSError, what: str) -> Unreadable | UserError:
    """:class:`Unreadable` for a lasting fault of the data, :class:`UserError` for a failure that may pass."""
    if isinstance(error, remote.Refused | FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return Unreadable(f"{what}: {error}")
    return UserError(f"{what}: {error}: nothing was skipped; go on from the last checkpoint when it can be read again")
