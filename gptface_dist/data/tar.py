"""Tar files as a sequence of samples: scanned member by member, damage reported, nothing silently lost.

The layout is that of img2dataset, open_clip and webdataset: members ``key.ext`` that follow one another and share ``key``
are one sample. The standard library's reader ends without an error at a damaged header in the middle of a file
(CPython 3.11), which loses the rest of the shard unseen; this scanner looks for the next readable header, at any byte,
and reports the bytes between. What a tar does not protect cannot be seen here: the bytes of a member's data, of a long
name, and changes that keep a header's checksum (a plain sum). The hashes of an index see them: :mod:`~.verify`.
"""

import hashlib
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

BLOCK = tarfile.BLOCKSIZE
EMPTY_BLOCK = bytes(BLOCK)
LONGEST_END = 2 * BLOCK + tarfile.RECORDSIZE
"""Zeros that a tar can end with: two blocks, and what fills up its last record."""

_MAGIC, _MAGIC_AT = b"ustar", 257
_CHUNK = 1 << 24
_WITHOUT_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE)
_META = re.compile(r"__[^/]*__($|/)")


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
    """The members' common name up to the first dot of its last component, folders included."""
    members: dict[str, Member] = field(default_factory=dict)
    """Extension in lower case, without the leading dot -> member."""
    repeated: list[str] = field(default_factory=list)
    """Names of members that came twice; the first one counts."""


class Hashing:
    """A binary file read from front to back, hashed on the way."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._sha256 = hashlib.sha256()
        self._unread = b""
        self.position = 0

    def read(self, size: int) -> bytes:
        """Up to ``size`` bytes; fewer only at the end of the file."""
        data, self._unread = self._unread[:size], self._unread[size:]
        parts = [data]
        missing = size - len(data)
        # In pieces: a size that is far beyond the end of the file must not be allocated.
        while missing > 0 and (part := self._file.read(min(missing, _CHUNK))):
            self._sha256.update(part)
            parts.append(part)
            missing -= len(part)
        data = b"".join(parts)
        self.position += len(data)
        return data

    def unread(self, data: bytes) -> None:
        """Give back the last bytes read: they come again."""
        self._unread = data + self._unread
        self.position -= len(data)

    def sha256(self) -> str:
        """Hex digest of everything read so far."""
        return self._sha256.hexdigest()


@dataclass
class _Extended:
    """What an extended header (GNU long name, pax) says of the member after it."""

    start: int
    name: str | None = None
    size: int | None = None
    trouble: str | None = None


def split_name(name: str) -> tuple[str, str]:
    """Member name -> (key, extension in lower case), at the first dot of its last component, as webdataset does."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def is_sample(name: str) -> bool:
    """Whether a member belongs to a sample.

    Not one without an extension or whose file name begins with a dot (``.DS_Store``), nor webdataset's own (``__name__``).
    """
    key, extension = split_name(name)
    return bool(extension and key) and not key.endswith("/") and not _META.match(name)


def members(file: Hashing) -> Iterator[Member | Damage]:
    """Every regular file of a tar, in order, and every stretch of bytes that is not one.

    Reads to the end of the file, so that afterwards ``file.sha256()`` is the hash of the whole shard.
    """
    extended: _Extended | None = None
    zeros_since: int | None = None
    previous = ""
    while True:
        start = file.position
        block = file.read(BLOCK)
        if not block.strip(b"\0"):
            if extended is not None:
                yield Damage(extended.start, start, "an extended header without its member")
                extended = None
            if len(block) < BLOCK:
                yield from _end(start, file.position, zeros_since, previous)
                return
            zeros_since = start if zeros_since is None else zeros_since
            continue
        if zeros_since is not None:
            reason = "zeros inside the tar: an end mark with more behind it, or lost members"
            yield Damage(zeros_since, start, reason + previous)
            zeros_since = None
        first = extended.start if extended else start
        info = _header(block)
        if info is None:
            file.unread(block)
            found = _skip_to_header(file)
            yield Damage(first, file.position, "no readable tar header" + previous)
            if not found:
                return
            extended, previous = None, ""
            continue
        size = info.size if extended is None or extended.size is None else extended.size
        size = 0 if info.type in _WITHOUT_DATA else size
        offset = file.position
        data = file.read(size)
        padding = file.read(-size % BLOCK)
        if len(data) < size or _looks_cut(file):
            # Bytes are missing from this member's end on: it may have swallowed what follows it.
            inside = _find_header(data + padding)
            if inside >= 0:
                file.unread((data + padding)[inside:])
                yield Damage(first, file.position, f"member {info.name!r} is cut: the next one begins inside it")
                extended = None
                continue
            if len(data) < size:
                yield Damage(first, file.position, f"member {info.name!r} is cut short: {len(data)} of {size} bytes: truncated")
                return
        if info.type == tarfile.GNUTYPE_LONGNAME:
            extended = _long_name(data, first)
        elif info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            extended = _pax_header(data, first)
        elif info.type not in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            name = extended.name if extended and extended.name else info.name
            trouble = (extended and extended.trouble) or _trouble(info)
            if trouble:
                yield Damage(first, file.position, f"member {name!r} {trouble}")
            elif info.isreg():
                yield Member(name, offset, size, zlib.crc32(data), data)
            extended, previous = None, f" (the end of {name!r} before it may be damaged, too)"


def holds_header(file: BinaryIO) -> bool:
    """Whether a valid header can be found anywhere in a file, read from its present position on."""
    hashing = Hashing(file)
    block = hashing.read(BLOCK)
    hashing.unread(block)
    return _header(block) is not None or _skip_to_header(hashing)


def _header(block: bytes) -> tarfile.TarInfo | None:
    """The header in a block, None where there is no valid one."""
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return None
    return info if info.size >= 0 else None


def _end(start: int, stop: int, zeros_since: int | None, previous: str) -> Iterator[Damage]:
    """What is wrong with the end of a file."""
    if zeros_since is None:
        yield Damage(start, stop, "the file ends without tar's end mark: truncated" + previous)
    elif stop - zeros_since > LONGEST_END:
        yield Damage(zeros_since, stop, "more zeros than a tar ends with: lost members, or cut and filled up" + previous)
    elif stop > start:
        yield Damage(start, stop, "the file ends inside a block: bytes are missing, or too many" + previous)


def _looks_cut(file: Hashing) -> bool:
    """Whether what follows a member is neither a header (perhaps a damaged one) nor the end mark."""
    block = file.read(BLOCK)
    file.unread(block)
    fine = block == EMPTY_BLOCK or block.startswith(_MAGIC, _MAGIC_AT) or _header(block) is not None
    return not fine


def _find_header(data: bytes) -> int:
    """Where in ``data`` the first valid header with the magic word ``ustar`` begins, at any byte; -1 for none."""
    at = data.find(_MAGIC)
    while at >= 0:
        begin = at - _MAGIC_AT
        if begin >= 0 and _header(data[begin : begin + BLOCK]) is not None:
            return begin
        at = data.find(_MAGIC, at + 1)
    return -1


def _skip_to_header(file: Hashing) -> bool:
    """Move on to the next valid header; to the end of the file, and False, where there is none."""
    while True:
        data = file.read(1 << 16)
        begin = _find_header(data)
        if begin >= 0:
            file.unread(data[begin:])
            return True
        if len(data) < BLOCK:
            return False
        # A header may begin in the last bytes.
        file.unread(data[1 - BLOCK :])


def _trouble(info: tarfile.TarInfo) -> str | None:
    """Why a member with a valid header holds no file that can be delivered."""
    if info.islnk() or info.issym():
        return f"is a link to {info.linkname!r} and holds no data"
    if info.type == tarfile.GNUTYPE_SPARSE:
        return "is stored as a sparse file, which is not read"
    return None


def _long_name(data: bytes, start: int) -> _Extended:
    """GNU's way to write names of more than 100 bytes."""
    name = data.partition(b"\0")[0].decode("utf-8", "surrogateescape")
    return _Extended(start, name, trouble=None if name else "has an empty long name")


def _pax_header(data: bytes, start: int) -> _Extended:
    """The ``length key=value`` records of a pax extended header."""
    extended = _Extended(start)
    rest = data.rstrip(b"\0")
    while rest:
        digits = rest.partition(b" ")[0]
        length = int(digits) if digits.isdigit() and len(digits) < 20 else 0
        record, rest = rest[:length], rest[length:]
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if len(record) < max(length, 1) or not equals or record[-1:] != b"\n" or (key == b"size" and not value.isdigit()):
            extended.trouble = "has an unreadable pax header"
            break
        if key == b"path":
            extended.name = value.decode("utf-8", "surrogateescape")
        elif key == b"size":
            extended.size = int(value)
        elif key.startswith(b"GNU.sparse."):
            extended.trouble = "is stored as a sparse file, which is not read"
    return extended


def samples(file: Hashing) -> Iterator[Sample | Damage]:
    """Members that follow one another under one key, as samples; damage passes through.

    Members that are none of a sample (:func:`is_sample`) are passed over. A key that comes back later in the shard is a
    second sample: the caller decides what that means.
    """
    sample: Sample | None = None
    for item in members(file):
        if isinstance(item, Damage):
            yield item
            continue
        key, extension = split_name(item.name)
        if not is_sample(item.name):
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
