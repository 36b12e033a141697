"""Verify shards completely: read each tar whole, decode each picture, compare each byte with the index."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gptface_dist.data import pictures, remote, tokens
from gptface_dist.data.folder import ShardFolder, Unreadable
from gptface_dist.data.indexing import find_shards, open_address
from gptface_dist.data.pool import ordered
from gptface_dist.data.shards import INDEX_NAME, SIDECAR_SUFFIX, Extent, ShardEntry, Sidecar
from gptface_dist.data.tar import Damage, Hashing, Sample, samples
from gptface_dist.errors import UserError
from gptface_dist.hashing import stable_hash
from gptface_dist.tokenizers.vocabulary import Vocabulary


@dataclass(frozen=True)
class Problem:
    """One fault of a shard or of a sample in it."""

    shard: str
    """Name of the shard."""
    key: str
    """The sample's key; empty for a fault of the whole shard."""
    what: str
    """What is wrong, in words."""

    def __str__(self) -> str:
        """One line, fields divided by tabs, a dash for no key."""
        return "\t".join(map(_printable, (self.shard, self.key or "-", self.what)))


@dataclass
class ShardReport:
    """Size, keys and problems of one shard."""

    name: str
    """Name of the shard."""
    samples: int = 0
    """Number of distinct keys."""
    size: int = 0
    """Size of the shard in bytes."""
    problems: list[Problem] = field(default_factory=list)
    """Faults of the shard and its samples, in reading order."""
    keys: list[str] = field(default_factory=list)
    """Keys of the samples, sorted, without repeats."""

    def add(self, key: str, what: str) -> None:
        """Append a problem; an empty ``key`` stands for the whole shard."""
        self.problems.append(Problem(self.name, key, what))


@dataclass(frozen=True)
class Task:
    """Input of :func:`check_shard`: one shard and its references."""

    name: str
    """Name of the shard in reports."""
    address: str
    """Path or URL of the tar."""
    sidecar: str
    """Path or URL of the sidecar."""
    entry: ShardEntry | None
    """The shard's line in the index; None if it has none."""
    listed: bool
    """Whether the folder has an index; a shard missing from it is then a problem."""
    decoder: tokens.TokenDecoder | None
    """Checks token samples; None checks only the form of samples that hold tokens."""


class Verification:
    """All shards of a location: a folder or URL with an index, or a folder or brace pattern of URLs without one.

    Args:
        location: folder, URL or brace pattern of the shards.
        vocabulary: for token shards: ids must lie in its ranges, and its tokenizers must be those of the index. Without it
            the ranges are those of the index, if it names them.
    """

    def __init__(self, location: str, vocabulary: Vocabulary | None = None):
        self.indexed = True
        """Whether the location has an index to compare with."""
        self.tasks: list[Task] = []
        """One task a shard, sorted by name."""
        if remote.is_url(location):
            self.indexed = not location.partition("?")[0].endswith(".tar")
        elif Path(location).is_dir():
            self.indexed = (Path(location) / INDEX_NAME).is_file()
        if self.indexed:
            self._from_index(ShardFolder.open(location), vocabulary)
        else:
            self._without_index(location, vocabulary)

    def _from_index(self, folder: ShardFolder, vocabulary: Vocabulary | None) -> None:
        decoder = None
        if folder.index.kind == tokens.KIND:
            if vocabulary is not None:
                tokens.check_made_with(folder.index, folder.location, vocabulary)
            vocabulary = vocabulary or tokens.recorded_vocabulary(folder.index.meta)
            decoder = tokens.TokenDecoder(vocabulary, tokens.read_grid(folder.index.meta, folder.location))
        elif vocabulary is not None:
            raise UserError(f"{folder.location} holds {folder.index.kind}, not tokens: tokenizers are of no use here")
        entries = {entry.name: entry for entry in folder.index.shards}
        names = set(entries)
        if not remote.is_url(folder.location):
            names |= {path.name for path in Path(folder.location).glob("*.tar") if not path.name.startswith(".")}
        for name in sorted(names):
            sidecar = _join(folder.location, remote.file_name(name) + SIDECAR_SUFFIX)
            self.tasks.append(Task(name, _join(folder.location, name), sidecar, entries.get(name), True, decoder))

    def _without_index(self, location: str, vocabulary: Vocabulary | None) -> None:
        decoder = tokens.TokenDecoder(vocabulary) if vocabulary else None
        shards = find_shards(location, Path() if remote.is_url(location) else None)
        names = set(shards.names)
        if shards.base:
            # A sidecar without its shard: the shard is missing.
            sidecars = (path.name for path in Path(shards.base).glob(f"*.tar{SIDECAR_SUFFIX}"))
            names |= {name.removesuffix(SIDECAR_SUFFIX) for name in sidecars if not name.startswith(".")}
        for name in sorted(names):
            sidecar = _join(shards.base, name + SIDECAR_SUFFIX) if shards.base else ""
            self.tasks.append(Task(name, shards.address(name), sidecar, None, False, decoder))

    def run(self, workers: int = 2) -> Iterator[ShardReport]:
        """Check every shard and yield the reports in order. A key of two shards is reported with the later shard."""
        seen = _Keys()
        for report in ordered(check_shard, self.tasks, workers):
            for key, name in seen.add(report.name, report.keys) if report.keys else ():
                report.add(key, f"duplicate key: it is in {name}, too")
            yield report


class _Keys:
    """The keys of all shards so far, 12 bytes each: their 64-bit hashes and shards' numbers, in a few sorted runs."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, name: str, keys: list[str]) -> Iterator[tuple[str, str]]:
        """Add a shard; yields each of its keys that came before, with a shard it came in."""
        hashes = np.fromiter(map(stable_hash, keys), np.uint64, len(keys))
        for known, shards in self._runs:
            places = np.searchsorted(known, hashes).clip(max=len(known) - 1)
            for number in np.flatnonzero(known[places] == hashes):
                yield keys[number], self._names[shards[places[number]]]
        self._runs.append((np.sort(hashes), np.full(len(keys), len(self._names), np.uint32)))
        self._names.append(name)
        # Runs of about equal length become one, so that there are few, and each key is merged few times.
        while len(self._runs) > 1 and len(self._runs[-2][0]) <= 2 * len(self._runs[-1][0]):
            hashes, shards = map(np.concatenate, zip(*self._runs[-2:], strict=True))
            order = np.argsort(hashes, kind="stable")
            self._runs[-2:] = [(hashes[order], shards[order])]


def check_shard(task: Task) -> ShardReport:
    """Read one shard from end to end and report its faults; an unreadable shard is a fault, not an error."""
    report = ShardReport(task.name)
    sidecar = _read_sidecar(task, report)
    if task.entry is None and task.listed:
        report.add("", f"on disk, but not listed in {INDEX_NAME}")
    expected = dict(sidecar.samples) if sidecar else None
    seen: set[str] = set()
    try:
        with open_address(task.address) as file:
            hashing = Hashing(file)
            for item in samples(hashing):
                if isinstance(item, Damage):
                    report.add("", str(item))
                elif item.key in seen:
                    report.add(item.key, f"duplicate key, again with {', '.join(item.members)}: the first one counts")
                else:
                    seen.add(item.key)
                    _check_sample(item, task.decoder, report)
                    if expected is not None:
                        _compare(item, expected.get(item.key), report)
    except OSError as error:
        report.add("", f"the shard is missing or cannot be read: {error}")
        return report
    report.size, report.samples, report.keys = hashing.position, len(seen), sorted(seen)
    if not seen:
        report.add("", "no samples in it")
    wanted = task.entry or sidecar
    if wanted is not None and wanted.size != report.size:
        report.add("", f"{report.size} bytes long, {wanted.size} in the index")
    if wanted is not None and wanted.sha256 != hashing.sha256():
        report.add("", f"sha256 is {hashing.sha256()}, {wanted.sha256} in the index")
    for key in expected or ():
        if key not in seen:
            report.add(key, "in the index, but cannot be found in the shard any more")
    return report


def _read_sidecar(task: Task, report: ShardReport) -> Sidecar | None:
    """The shard's sidecar; None, with the problem reported, if it is missing or disagrees with the index."""
    if not task.sidecar:
        return None
    try:
        raw = remote.read(task.sidecar) if remote.is_url(task.sidecar) else Path(task.sidecar).read_bytes()
        sidecar = Sidecar.from_json(raw, "its sidecar")
    except OSError:
        if task.entry is not None:
            report.add("", "its sidecar is missing: make it with `gptface data index`")
        return None
    except UserError as error:
        report.add("", str(error))
        return None
    entry = task.entry
    if entry is not None and (sidecar.sha256, len(sidecar.samples)) != (entry.sha256, entry.samples):
        report.add("", f"its sidecar and {INDEX_NAME} disagree: rebuild both with `gptface data index`")
        return None
    return sidecar


def _check_sample(sample: Sample, decoder: tokens.TokenDecoder | None, report: ShardReport) -> None:
    """What is wrong with a sample in itself."""
    for name in sample.repeated:
        report.add(sample.key, f"member {name!r} comes twice: the first one counts")
    members = {extension: member.data for extension, member in sample.members.items()}
    checks = _token_checks if decoder is not None or tokens.CODES in members else _picture_checks
    for check in checks(members, decoder):
        try:
            check()
        except Unreadable as error:
            report.add(sample.key, str(error))


def _picture_checks(members: dict[str, bytes], _: tokens.TokenDecoder | None) -> Iterator[Callable[[], object]]:
    yield lambda: pictures.decode_pixels(members[pictures.picture_extension(list(members))], None)
    yield lambda: pictures.decode_captions(_member(members, "txt"), None)
    if "json" in members:
        yield lambda: pictures.further_captions(members["json"])


def _token_checks(members: dict[str, bytes], decoder: tokens.TokenDecoder | None) -> Iterator[Callable[[], object]]:
    decoder = decoder or tokens.TokenDecoder(None)
    yield lambda: decoder.decode(_member(members, tokens.CODES), _member(members, tokens.CAPTIONS))


def _member(members: dict[str, bytes], extension: str) -> bytes:
    if extension not in members:
        raise Unreadable(f"no .{extension} member")
    return members[extension]


def _compare(sample: Sample, indexed: dict[str, Extent] | None, report: ShardReport) -> None:
    """Report the differences between a sample and its entry in the sidecar."""
    if indexed is None:
        report.add(sample.key, "not in the shard's index")
        return
    for extension in dict.fromkeys([*indexed, *sample.members]):
        member = sample.members.get(extension)
        if member is None:
            report.add(sample.key, f".{extension} is in the index, but cannot be found in the shard any more")
        elif extension not in indexed:
            report.add(sample.key, f".{extension} is not in the shard's index")
        elif indexed[extension] != Extent(member.offset, member.size, member.crc32):
            report.add(sample.key, f".{extension} has other bytes, or another place, than in the index")


def _join(base: str, name: str) -> str:
    """Path or URL of a file at a location."""
    return remote.join(base, name) if remote.is_url(base) or remote.is_url(name) else str(Path(base) / name)


def _printable(text: str) -> str:
    """The text, escaped if it is not one printable line of UTF-8."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()
