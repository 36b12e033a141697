"""Index shards of any origin: read every tar once and write its sidecar and ``index.json``."""

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO

from gptface_dist.data import remote, tokens
from gptface_dist.data.pool import ordered
from gptface_dist.data.shards import INDEX_NAME, SIDECAR_SUFFIX, Index, ShardEntry, Sidecar, scan
from gptface_dist.data.tar import holds_header
from gptface_dist.errors import UserError
from gptface_dist.files import write_atomically

MOST_SHARDS = 1_000_000
"""A pattern of more names than this is taken for a mistake."""

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}


@dataclass(frozen=True)
class Shards:
    """The tars that :func:`index` reads, and the folder it writes to."""

    base: str
    """Folder that holds the tars; empty where ``names`` are whole URLs."""
    names: list[str]
    """File names, or URLs, sorted."""
    out: Path
    """Folder for the sidecars and ``index.json``."""

    def address(self, name: str) -> str:
        """Path or URL of the tar ``name``."""
        return str(Path(self.base) / name) if self.base else name


@dataclass(frozen=True)
class Indexed:
    """Result of indexing one shard."""

    entry: ShardEntry
    """The shard's line in ``index.json``."""
    problems: list[str]
    """Damage and repeated names, one line each."""
    kept: bool
    """Whether a fitting sidecar of an earlier run was kept, so that the tar was not read."""
    kind: str
    """``tokens`` where the first sample has image codes, else ``pictures``."""


def find_shards(source: str, out: Path | None) -> Shards:
    """The tars of a folder, or those that a brace pattern of URLs names; :class:`UserError` where there are none."""
    if remote.is_url(source):
        if out is None:
            raise UserError(f"{source} is a URL: name a folder for its index as second argument")
        names = sorted(expand_braces(source))
        if strange := [name for name in names if not name.partition("?")[0].endswith(".tar")]:
            raise UserError(
                f"{strange[0]} is not a .tar: give a pattern of URLs such as 'http://host/data/{{00000..00012}}.tar'"
            )
        files = [remote.file_name(name) for name in names]
        if len(set(files)) < len(files):
            raise UserError(f"{source} names two shards with one file name: their indices cannot lie in one folder")
        return Shards("", names, out)
    folder = Path(source)
    if not folder.is_dir():
        raise UserError(f"no folder {source}: give a folder of .tar files, or a pattern of URLs")
    if out is not None:
        raise UserError(f"the index of a folder lies in it: leave out {out} (a second folder is for shards behind URLs)")
    files = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    names = [name for name in files if name.endswith(".tar")]
    if not names:
        if packed := [name for name in files if re.search(r"\.(tar\.(gz|bz2|xz|zst|lz4)|tgz|tbz2?|txz)$", name)]:
            raise UserError(f"{folder} holds compressed tars ({packed[0]}): unpack them to .tar first, offsets need it")
        deeper = next((path.parent for path in folder.glob("*/*.tar")), None)
        hint = f"they lie in {deeper}, perhaps" if deeper else "give a folder of .tar files"
        raise UserError(f"{folder} holds no .tar files: {hint}")
    return Shards(str(folder), names, folder)


def expand_braces(pattern: str) -> list[str]:
    """All names of a pattern: ``{000..012}`` counts with leading zeros, ``{a,b}`` lists; several multiply."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices: list[list[str]] = []
    for number, part in enumerate(parts):
        if number % 2 == 0:
            if "{" in part or "}" in part:
                raise UserError(f"{pattern!r} has a brace without its partner")
            choices.append([part])
        elif counted := re.fullmatch(r"(\d+)\.\.(\d+)", part):
            first, last = int(counted[1]), int(counted[2])
            if not 0 <= last - first < MOST_SHARDS:
                raise UserError(f"{{{part}}} in {pattern!r} must count upwards, to fewer than {MOST_SHARDS} shards")
            width = len(counted[1]) if len(counted[1]) == len(counted[2]) or counted[1].startswith("0") else 0
            choices.append([f"{value:0{width}d}" for value in range(first, last + 1)])
        elif "," in part:
            choices.append(part.split(","))
        else:
            raise UserError(f"{{{part}}} in {pattern!r} is neither a range {{000..012}} nor a list {{a,b}}")
    return ["".join(chosen) for chosen in product(*choices)]


def index(shards: Shards, workers: int = 2, force: bool = False) -> Iterator[Indexed]:
    """Index all shards, in order, and write ``index.json`` after the last.

    A sidecar that fits its tar (same size, not older) is kept unless ``force``, so that an interrupted run resumes at the
    first shard without one. ``kind`` and ``meta`` of an existing ``index.json`` are kept.
    """
    _check_writable(shards.out)
    kind, meta = _previous(shards.out)
    jobs = [_Job(shards.address(name), name, shards.out, force) for name in shards.names]
    entries = []
    for done in ordered(_index_shard, jobs, workers):
        entries.append(done.entry)
        kind = kind or done.kind
        yield done
    Index(entries, kind or "pictures", meta).save(shards.out)


@dataclass(frozen=True)
class _Job:
    address: str
    name: str
    out: Path
    force: bool


def open_address(address: str) -> BinaryIO:
    """Open a tar on disk, or a temporary copy of one behind a URL; :class:`OSError` when it cannot be read."""
    return remote.download(address) if remote.is_url(address) else Path(address).open("rb")


def _index_shard(job: _Job) -> Indexed:
    path = job.out / (remote.file_name(job.name) + SIDECAR_SUFFIX)
    sidecar = None if job.force else _fitting_sidecar(path, job.address)
    kept = sidecar is not None
    if sidecar is None:
        try:
            with open_address(job.address) as file:
                _refuse_foreign(file, job.address)
                sidecar = scan(file, job.name)
                file.seek(0)
                if not sidecar.samples and sidecar.problems and sidecar.size and not holds_header(file):
                    raise UserError(f"{job.address} is not a tar: remove it, or fetch it again")
        except OSError as error:
            raise UserError(f"{job.address} cannot be read: {error}") from None
        if not sidecar.samples:
            sidecar.problems.append(f"{job.name}: no samples in it")
        write_atomically(path, sidecar.to_json())
    entry = ShardEntry(job.name, len(sidecar.samples), sidecar.size, sidecar.sha256)
    first = sidecar.samples[0][1] if sidecar.samples else {}
    return Indexed(entry, sidecar.problems, kept, tokens.KIND if tokens.CODES in first else "pictures")


def _fitting_sidecar(path: Path, address: str) -> Sidecar | None:
    """The sidecar at ``path`` if size and time of the tar agree with it, else None."""
    try:
        made = path.stat().st_mtime
        if remote.is_url(address):
            current = remote.size_and_time(address)
        else:
            status = Path(address).stat()
            current = status.st_size, status.st_mtime
        sidecar = Sidecar.from_json(path.read_bytes(), str(path))
    except (OSError, UserError):
        return None
    return sidecar if current is not None and current[0] == sidecar.size and current[1] <= made else None


def _refuse_foreign(file: BinaryIO, address: str) -> None:
    """:class:`UserError` for a compressed file."""
    start = file.read(8)
    file.seek(0)
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(f"{address} is compressed ({name}): unpack it first, members are read by their offset")


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder} cannot be written to ({error.strerror}): the index lies there") from None


def _previous(folder: Path) -> tuple[str | None, dict[str, Any]]:
    """Kind and meta of an existing index; (None, {}) where it is missing or unreadable."""
    path = folder / INDEX_NAME
    try:
        previous = Index.from_json(path.read_bytes(), str(path))
    except (OSError, UserError):
        return None, {}
    return previous.kind, previous.meta
