"""Write shards with their sidecars and index; parse both.

A folder of shards holds ``00000.tar``, its sidecar ``00000.tar.index.json`` (every sample's key, and offset, size and
CRC-32 of each member) and one ``index.json`` that lists the shards (samples, bytes, sha256) and names their kind.
"""

import json
import os
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from gptface_dist.data.tar import Damage, Hashing, Sample, is_sample, samples, split_name
from gptface_dist.errors import UserError
from gptface_dist.files import write_atomically

INDEX_NAME = "index.json"
INDEX_FORMAT = "gptface-index-1"
SIDECAR_SUFFIX = ".index.json"
SIDECAR_FORMAT = "gptface-shard-index-1"


@dataclass(frozen=True, slots=True)
class Extent:
    """Byte range and checksum of one member in its shard."""

    offset: int
    """First byte of the data."""
    size: int
    """Bytes of data."""
    crc32: int
    """CRC-32 of the data."""


@dataclass
class Sidecar:
    """The index of one shard, as in its sidecar file."""

    size: int
    """Bytes of the shard file."""
    sha256: str
    """Hash of the shard file."""
    samples: list[tuple[str, dict[str, Extent]]]
    """Key and members (extension -> extent) of every sample, in the shard's order."""
    problems: list[str] = field(default_factory=list)
    """Damage and repeated names seen while indexing, one line each."""

    def to_json(self) -> str:
        """Compact JSON, one sample a line."""
        head = {"format": SIDECAR_FORMAT, "size": self.size, "sha256": self.sha256, "problems": self.problems}
        rows = [
            json.dumps([key, {ext: [e.offset, e.size, e.crc32] for ext, e in members.items()}], separators=(",", ":"))
            for key, members in self.samples
        ]
        return json.dumps(head)[:-1] + ', "samples": [\n' + ",\n".join(rows) + "\n]}\n"

    @classmethod
    def from_json(cls, text: str | bytes, origin: str) -> "Sidecar":
        """Parse the file's JSON; :class:`UserError` names ``origin`` where it is not of this format."""
        try:
            raw = json.loads(text)
            if raw["format"] != SIDECAR_FORMAT:
                raise KeyError(raw["format"])
            rows = [(key, {ext: Extent(*extent) for ext, extent in members.items()}) for key, members in raw["samples"]]
            return cls(raw["size"], raw["sha256"], rows, raw["problems"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{origin} is not a shard index ({error}): rebuild it with `gptface data index`") from None


@dataclass(frozen=True)
class ShardEntry:
    """One shard in a folder's ``index.json``."""

    name: str
    """File name inside the folder, or a whole URL."""
    samples: int
    """Number of samples."""
    size: int
    """Bytes of the file."""
    sha256: str
    """Hash of the file."""


@dataclass
class Index:
    """The content of a folder's ``index.json``."""

    shards: list[ShardEntry]
    """The shards, sorted by name."""
    kind: str = "pictures"
    """``pictures`` (``key.jpg|png|webp``, ``key.txt``, ``key.json``) or ``tokens``."""
    meta: dict[str, Any] = field(default_factory=dict)
    """How the shards were made; for tokens: the tokenizers' hashes and the grid of codes."""

    @property
    def samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    def save(self, folder: Path) -> None:
        """Write ``folder/index.json``, whole or not at all."""
        raw = {"format": INDEX_FORMAT, "kind": self.kind, "meta": self.meta, "shards": [asdict(s) for s in self.shards]}
        write_atomically(folder / INDEX_NAME, json.dumps(raw, indent=1) + "\n")

    @classmethod
    def from_json(cls, text: str | bytes, origin: str) -> "Index":
        """Parse the file's JSON; :class:`UserError` names ``origin`` where it is not of this format."""
        try:
            raw = json.loads(text)
            if raw["format"] != INDEX_FORMAT:
                raise KeyError(raw["format"])
            return cls([ShardEntry(**shard) for shard in raw["shards"]], raw["kind"], raw["meta"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{origin} is not a data index ({error}): rebuild it with `gptface data index`") from None


class ShardWriter:
    """Writes one shard and its sidecar; both appear under their names only when complete.

    The bytes depend on the samples alone (fixed times, owners and modes), so that equal input gives equal hashes::

        with ShardWriter(folder / "00000.tar") as shard:
            shard.write("000000000", {"png": png_bytes, "txt": b"a smiling woman"})
        entry = shard.entry
    """

    def __init__(self, path: Path):
        self.path = path
        self.entry: ShardEntry | None = None
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._file = self._temporary.open("w+b")
        self._position = 0
        self._rows: list[tuple[str, dict[str, Extent]]] = []
        self._keys: set[str] = set()

    def write(self, key: str, members: dict[str, bytes]) -> None:
        """Append one sample: ``members`` maps an extension (no leading dot) to its bytes."""
        if key in self._keys or not members:
            raise ValueError(f"sample key {key!r} {'is already in' if members else 'has no members, in'} {self.path}")
        for extension in members:
            name = f"{key}.{extension}"
            # Refuse names that a reader would split into another key or extension, or pass over.
            fine = split_name(name) == (key, extension) and is_sample(name) and extension[0] != "." and "\0" not in name
            if not fine:
                raise ValueError(f"{name!r} is no name of a sample's member: key {key!r}, extension {extension!r}")
        self._keys.add(key)
        extents = {}
        for extension, data in members.items():
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size = len(data)
            header = info.tobuf(tarfile.GNU_FORMAT)
            extents[extension] = Extent(self._position + len(header), len(data), zlib.crc32(data))
            self._append(header + data + bytes(-len(data) % tarfile.BLOCKSIZE))
        self._rows.append((key, extents))

    def _append(self, data: bytes) -> None:
        self._file.write(data)
        self._position += len(data)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            try:
                # Closing writes what is buffered, which fails again on a full disk.
                self._file.close()
            finally:
                self._temporary.unlink(missing_ok=True)

    def _publish(self) -> None:
        self._append(bytes(2 * tarfile.BLOCKSIZE))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.seek(0)
        hashing = Hashing(self._file)
        while hashing.read(1 << 20):
            pass
        sidecar = Sidecar(self._position, hashing.sha256(), self._rows)
        # The sidecar first: a shard that has its name also has its index, so "the tar exists" means "done".
        write_atomically(sidecar_path(self.path), sidecar.to_json())
        self._temporary.replace(self.path)
        self.entry = ShardEntry(self.path.name, len(self._rows), sidecar.size, sidecar.sha256)


def sidecar_path(shard: Path) -> Path:
    """Path of the sidecar of a local shard."""
    return shard.with_name(shard.name + SIDECAR_SUFFIX)


def read_entry(shard: Path) -> ShardEntry:
    """The index line of a finished local shard, from its sidecar."""
    path = sidecar_path(shard)
    sidecar = Sidecar.from_json(path.read_bytes(), str(path))
    return ShardEntry(shard.name, len(sidecar.samples), sidecar.size, sidecar.sha256)


def scan(file: BinaryIO, name: str) -> Sidecar:
    """Read a tar from front to back and index it. Damage and repeated names go into ``problems``."""
    hashing = Hashing(file)
    rows: list[tuple[str, dict[str, Extent]]] = []
    problems: list[str] = []
    seen: set[str] = set()
    for item in samples(hashing):
        if isinstance(item, Damage):
            problems.append(f"{name}: {item}")
            continue
        problems += [f"{name}: member {repeated!r} comes twice in one sample: first one kept" for repeated in item.repeated]
        if item.key in seen:
            members = ", ".join(item.members)
            problems.append(f"{name}: key {item.key!r} comes again, with {members}: first one kept")
            continue
        seen.add(item.key)
        rows.append((item.key, extents(item)))
    return Sidecar(hashing.position, hashing.sha256(), rows, problems)


def extents(sample: Sample) -> dict[str, Extent]:
    """Extension -> extent of each member of a scanned sample."""
    return {ext: Extent(m.offset, m.size, m.crc32) for ext, m in sample.members.items()}


def write_index(folder: Path, kind: str, meta: dict[str, Any], shards: Iterable[Path]) -> Index:
    """Write ``index.json`` over finished shards of ``folder``."""
    index = Index(sorted((read_entry(shard) for shard in shards), key=lambda entry: entry.name), kind, meta)
    index.save(folder)
    return index
