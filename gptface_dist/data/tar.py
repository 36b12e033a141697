"""Scan tar files as a sequence of samples, member by member; damage is reported, and nothing is lost silently.

The layout is that of img2dataset, open_clip and webdataset: members ``key.ext`` that follow one another and share ``key``
are one sample. The standard library's reader ends without an error at a damaged header in the middle of a file
(CPython 3.11), which loses the rest of the shard unseen; this scanner looks for the next readable header, at any byte,
and reports the bytes between. A tar has no checksum of a member's data or of a long name, and a header's checksum is a plain
sum; the hashes of an index find changes there: :mod:`~.verify`.
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
"""Most zero bytes at the end of a valid tar: two blocks, and the padding of the last record."""

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
    """Start of the data, in bytes from the start of the shard."""
    size: int
    """Bytes of data."""
    crc32: int
    """CRC-32 of the data."""
    data: bytes
    """The member's content."""


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
    """All members of one key, by extension."""

    key: str
    """The members' common name up to the first dot of its last component, folders included."""
    members: dict[str, Member] = field(default_factory=dict)
    """Extension in lower case, without the leading dot -> member."""
    repeated: list[str] = field(default_factory=list)
    """Names of members that came twice; the first one counts."""


class Hashing:
    """A binary file that is read from front to back and hashed with SHA-256 on the way."""

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
        # In parts: a damaged header may give a size far beyond the end of the file, which must not be allocated.
        while missing > 0 and (part := self._file.read(min(missing, _CHUNK))):
            self._sha256.update(part)
            parts.append(part)
            missing -= len(part)
        data = b"".join(parts)
        self.position += len(data)
        return data

    def unread(self, data: bytes) -> None:
        """Push back the last bytes read; the next :meth:`read` returns them again."""
        self._unread = data + self._unread
        self.position -= len(data)

    def sha256(self) -> str:
        """Hex digest of everything read so far."""
        return self._sha256.hexdigest()


@dataclass
class _Extended:
    """Fields of an extended header (GNU long name, pax), which apply to the member after it."""

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
    """Yield every regular file of a tar in order, and every damaged range of bytes.

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
            has_next = _skip_to_header(file)
            yield Damage(first, file.position, "no readable tar header" + previous)
            if not has_next:
                return
            extended, previous = None, ""
            continue
        size = info.size if extended is None or extended.size is None else extended.size
        size = 0 if info.type in _WITHOUT_DATA else size
        offset = file.position
        data = file.read(size)
        padding = file.read(-size % BLOCK)
        if len(data) < size or _looks_cut(file):
            # Bytes are missing at this member's end: its data may include the headers that follow.
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
    """Whether the file has a valid header anywhere after its current position."""
    hashing = Hashing(file)
    block = hashing.read(BLOCK)
    hashing.unread(block)
    return _header(block) is not None or _skip_to_header(hashing)


def _header(block: bytes) -> tarfile.TarInfo | None:
    """Parse the header in a block; None if it is not valid."""
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return None
    return info if info.size >= 0 else None


def _end(start: int, stop: int, zeros_since: int | None, previous: str) -> Iterator[Damage]:
    """Yield the damage at the end of a file, if any."""
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
    """Offset in ``data`` of the first valid header with the magic word ``ustar``, at any byte; -1 for none."""
    at = data.find(_MAGIC)
    while at >= 0:
        begin = at - _MAGIC_AT
        if begin >= 0 and _header(data[begin : begin + BLOCK]) is not None:
            return begin
        at = data.find(_MAGIC, at + 1)
    return -1


def _skip_to_header(file: Hashing) -> bool:
    """Advance to the next valid header and return True; without one, advance to the end of the file and return False."""
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
    """Why a member with a valid header cannot be delivered; None if it can."""
    if info.islnk() or info.issym():
        return f"is a link to {info.linkname!r} and holds no data"
    if info.type == tarfile.GNUTYPE_SPARSE:
        return "is stored as a sparse file, which is not read"
    return None


def _long_name(data: bytes, start: int) -> _Extended:
    """Parse a GNU long name, for names of more than 100 bytes."""
    name = data.partition(b"\0")[0].decode("utf-8", "surrogateescape")
    return _Extended(start, name, trouble=None if name else "has an empty long name")


def _pax_header(data: bytes, start: int) -> _Extended:
    """Parse the ``length key=value`` records of a pax extended header."""
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

    Members that belong to no sample (:func:`is_sample`) are passed over. A key that returns later in the shard is a second
    sample: the caller handles the repetition.
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
