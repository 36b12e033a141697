"""Tar files as a sequence of samples: scanned member by member, damage reported, nothing silently lost.

The layout is that of img2dataset, open_clip and webdataset: members ``key.ext`` that follow one another and share ``key``
are one sample. The standard library's reader ends without an error at a damaged header in the middle of a file
(CPython 3.11), which loses the rest of the shard unseen; this scanner looks for the next readable header and reports
the bytes between.
"""

import hashlib
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import BinaryIO

BLOCK = tarfile.BLOCKSIZE
EMPTY_BLOCK = bytes(BLOCK)


@dataclass(frozen=True)
class Member:
    """One file inside a shard."""

    name: str
    """Path inside the tar, as written there."""
    offset: int
    """Where its data begins, in bytes from the start of the shard."""
    size: int
    """Bytes of data."""
    crc32: int
    """CRC-32 of the data."""
    data: bytes
    """The data itself."""


@dataclass(frozen=True)
class Damage:
    """Bytes of a shard that could not be read as tar members."""

    start: int
    """First damaged byte."""
    stop: int
    """One past the last damaged byte."""
    reason: str
    """What is wrong, in words."""

    def __str__(self) -> str:
        return f"bytes {self.start}-{self.stop}: {self.reason}"


@dataclass
class Sample:
    """What one key holds: its members' bytes by extension."""

    key: str
    """The members' common name up to the first dot, folders included."""
    members: dict[str, Member] = field(default_factory=dict)
    """Extension in lower case, without the leading dot -> member."""
    repeated: list[str] = field(default_factory=list)
    """Names of members that came twice; the first one counts."""


class Hashing:
    """A binary file read from front to back, hashed on the way."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._sha256 = hashlib.sha256()
        self.position = 0

    def read(self, size: int) -> bytes:
        """Up to ``size`` bytes; fewer only at the end of the file."""
        parts = []
        while size > 0 and (part := self._file.read(size)):
            parts.append(part)
            size -= len(part)
        data = b"".join(parts)
        self._sha256.update(data)
        self.position += len(data)
        return data

    def sha256(self) -> str:
        """Hex digest of everything read so far."""
        return self._sha256.hexdigest()


def split_name(name: str) -> tuple[str, str]:
    """Member name -> (key, extension), at the first dot of its last component, as webdataset does."""
    path = PurePosixPath(name)
    stem, _, extension = path.name.partition(".")
    return str(path.with_name(stem)) if stem else name, extension.lower()


def members(file: Hashing) -> Iterator[Member | Damage]:
    """Every regular file of a tar, in order, and every stretch of bytes that is not one.

    Reads to the end of the file, so that afterwards ``file.sha256()`` is the hash of the whole shard.
    """
    long_name = pax_size = None
    bad_since: int | None = None
    ended = False
    while True:
        start = file.position
        header = file.read(BLOCK)
        if len(header) < BLOCK:
            if header or bad_since is not None:
                yield Damage(start if bad_since is None else bad_since, file.position, "no readable tar header")
            elif not ended:
                yield Damage(start, start, "the file ends without tar's end mark: truncated")
            return
        if header == EMPTY_BLOCK:
            if bad_since is not None:
                yield Damage(bad_since, start, "no readable tar header")
                bad_since = None
            ended = True
            continue
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError):
            bad_since = start if bad_since is None else bad_since
            continue
        if bad_since is not None:
            yield Damage(bad_since, start, "no readable tar header")
            bad_since = None
        ended = False
        size = info.size if pax_size is None else pax_size
        offset = file.position
        data = file.read(size) if size > 0 else b""
        if len(data) < size or size < 0:
            yield Damage(start, file.position, f"member {info.name!r} is cut short: {len(data)} of {size} bytes: truncated")
            return
        padding = -size % BLOCK
        if len(file.read(padding)) < padding:
            ended = False
        if info.type == tarfile.GNUTYPE_LONGNAME:
            long_name = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            fields = _pax_fields(data)
            long_name = fields.get("path", long_name)
            pax_size = int(fields["size"]) if fields.get("size", "").isdigit() else None
        else:
            if info.isreg():
                yield Member(long_name or info.name, offset, size, zlib.crc32(data), data)
            long_name = pax_size = None


def _pax_fields(data: bytes) -> dict[str, str]:
    """The ``length key=value`` records of a pax extended header."""
    fields = {}
    while data:
        length, _, rest = data.partition(b" ")
        if not length.isdigit() or int(length) <= len(length) + 1:
            break
        key, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
        fields[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        data = data[int(length) :]
    return fields


def samples(file: Hashing) -> Iterator[Sample | Damage]:
    """Members that follow one another under one key, as samples; damage passes through.

    Names that begin with a dot or lie in no key (``.DS_Store``, folders) are no samples and are passed over, as
    webdataset does. A key that comes back later in the shard is a second sample: the caller decides what that means.
    """
    sample: Sample | None = None
    for item in members(file):
        if isinstance(item, Damage):
            if sample is not None:
                yield sample
                sample = None
            yield item
            continue
        key, extension = split_name(item.name)
        if not extension or PurePosixPath(item.name).name.startswith("."):
            continue
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = Sample(key)
        if extension in sample.members:
            sample.repeated.append(item.name)
        else:
            sample.members[extension] = item
    if sample is not None:
        yield sample
