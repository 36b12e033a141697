"""Damaged shards: nothing crashes, and no sample is lost or changed unseen.

With an index made before the damage, every byte counts. Without one, what a tar itself protects is seen; the tests named
``unseen`` show exactly what is not: bytes of data and of long names, and zeros that look like the end of the archive.
"""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from gptface_dist.data.folder import ShardFolder
from gptface_dist.data.shards import ShardWriter, scan
from gptface_dist.data.stream import BlockReader, RawSample, Source, StreamOptions
from gptface_dist.data.tar import BLOCK, LONGEST_END, Damage, Hashing, samples
from gptface_dist.data.verify import Verification
from gptface_dist.errors import UserError
from tests.picture_shards import sample, write_pictures

Held = dict[str, dict[str, bytes]]
LONG = "a/" * 60


def by_us(path: Path, held: Held) -> None:
    with ShardWriter(path) as writer:
        for key, members in held.items():
            writer.write(key, members)


def by_webdataset(path: Path, held: Held) -> None:
    with wds.TarWriter(str(path)) as writer:
        for key, members in held.items():
            writer.write({"__key__": key, **members})


def by_tarfile(tar_format: int) -> Callable[[Path, Held], None]:
    def write(path: Path, held: Held) -> None:
        with tarfile.open(path, "w", format=tar_format) as tar:
            for key, members in held.items():
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"{LONG}{key}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))

    return write


WRITERS = {
    "us": by_us,
    "webdataset": by_webdataset,
    "gnu": by_tarfile(tarfile.GNU_FORMAT),
    "pax": by_tarfile(tarfile.PAX_FORMAT),
}


@pytest.fixture(params=list(WRITERS))
def shard(request: pytest.FixtureRequest, tmp_path: Path) -> bytes:
    held = dict(sample(number) for number in range(6))
    for number in (1, 4):  # members that can swallow others
        held[f"{number:09d}"]["bin"] = np.random.default_rng(number).bytes(5000 + number)
    WRITERS[request.param](tmp_path / "00000.tar", held)
    return (tmp_path / "00000.tar").read_bytes()


class Scan:
    """What a scan without an index delivers and reports."""

    def __init__(self, data: bytes):
        found = list(samples(Hashing(io.BytesIO(data))))
        self.damage = [item for item in found if isinstance(item, Damage)]
        self.samples: Held = {}
        self.offsets = [m.offset - BLOCK for item in found if not isinstance(item, Damage) for m in item.members.values()]
        for item in found:
            if not isinstance(item, Damage):
                # As `shards.scan`: the first one counts, the second is a problem.
                self.samples.setdefault(item.key, {ext: member.data for ext, member in item.members.items()})

    def covers(self, key: str, start: int, stop: int) -> bool:
        """Whether a sample at these bytes is reported: damage touches it, or the member before, said to be damaged, too."""
        return any(self.reach(d) <= stop and start <= d.stop for d in self.damage)

    def reach(self, damage: Damage) -> int:
        """Where damage begins, with the member before where it is named."""
        if "before it may be damaged" not in damage.reason:
            return damage.start
        return max((offset for offset in self.offsets if offset <= damage.start), default=damage.start)


def places(data: bytes) -> dict[str, tuple[int, int]]:
    """Key -> the bytes of a sample, from its first header (extended ones included) to its last padding."""
    found: dict[str, tuple[int, int]] = {}
    end = 0
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for info in tar:
            key = info.name.rpartition(".")[0]
            stop = info.offset_data + -(-info.size // BLOCK) * BLOCK
            found[key] = found.get(key, (end, 0))[0], stop
            end = stop
    return found


def headers(data: bytes) -> list[int]:
    """Where every header begins, extended ones included."""
    found, at = [], 0
    while data[at : at + BLOCK].strip(b"\0"):
        found.append(at)
        info = tarfile.TarInfo.frombuf(data[at : at + BLOCK], "utf-8", "surrogateescape")
        at += BLOCK + -(-info.size // BLOCK) * BLOCK
    return found


def well_formed(data: bytes) -> bool:
    """Whether a shard is a tar without fault: headers where the one before says, zeros at its end, whole blocks."""
    try:
        last = headers(data)[-1]
    except (tarfile.HeaderError, IndexError):
        return False
    info = tarfile.TarInfo.frombuf(data[last : last + BLOCK], "utf-8", "surrogateescape")
    end = data[last + BLOCK + -(-info.size // BLOCK) * BLOCK :]
    return len(end) >= BLOCK and len(end) % BLOCK == 0 and not end.strip(b"\0")


def assert_delivered_or_reported(original: bytes, damaged: bytes, moved: Callable[[int], int] = lambda at: at) -> None:
    """``moved`` says where a byte of the original lies in the damaged shard."""
    before, after = Scan(original), Scan(damaged)
    for key, (start, stop) in places(original).items():
        if after.samples.get(key) != before.samples[key]:
            assert after.covers(key, moved(start), moved(stop)), (key, after.damage)
    assert after.samples.keys() <= before.samples.keys()


def test_every_flipped_byte_of_a_header_is_seen_and_costs_its_sample_alone(shard: bytes) -> None:
    before = Scan(shard).samples
    where = places(shard)
    rng = np.random.default_rng(0)
    begins = headers(shard)
    for header in {begins[0], begins[1], begins[len(begins) // 2], begins[-1]}:
        (hit,) = (key for key, (start, stop) in where.items() if start <= header < stop)
        for at in range(header, header + BLOCK, 3):
            damaged = bytearray(shard)
            damaged[at] ^= int(rng.integers(1, 256))
            after = Scan(bytes(damaged))
            assert {key: after.samples.get(key) for key in before if key != hit} == {
                k: v for k, v in before.items() if k != hit
            }
            assert after.samples.get(hit) == before[hit] or after.covers(hit, *where[hit])


def test_a_cut_end(shard: bytes) -> None:
    for length in [*range(0, 3 * BLOCK, 97), *range(0, len(shard), 211), *range(len(shard) - 2 * BLOCK, len(shard), 130)]:
        assert_delivered_or_reported(shard, shard[:length], lambda at, n=length: min(at, n))


def test_a_cut_end_is_reported_even_where_all_samples_are_there(shard: bytes) -> None:
    last = max(stop for _, stop in places(shard).values())
    after = Scan(shard[:last])
    assert len(after.samples) == 6
    assert "truncated" in after.damage[0].reason


@pytest.mark.parametrize("unit", [1, BLOCK])
def test_bytes_lost_in_the_middle(shard: bytes, unit: int) -> None:
    rng = np.random.default_rng(unit)
    end = max(stop for _, stop in places(shard).values())
    unseen = 0
    for _ in range(150):
        start = int(rng.integers(end // unit)) * unit
        length = int(rng.integers(1, 8 * BLOCK // unit)) * unit
        damaged = shard[:start] + shard[start + length :]
        if well_formed(damaged):
            unseen += 1  # whole members are gone, header and data, or lengths fit by chance: no scan can know
        else:
            assert_delivered_or_reported(shard, damaged, lambda at, s=start, n=length: at if at < s else max(s, at - n))
    assert unseen == 0 if unit == 1 else unseen < 100


def test_samples_after_lost_bytes_are_found_again() -> None:
    held = dict(sample(number) for number in range(20))
    buffer = io.BytesIO()
    with wds.TarWriter(buffer) as writer:
        for key, members in held.items():
            writer.write({"__key__": key, **members})
    data = buffer.getvalue()
    start, stop = places(data)["000000003"]
    after = Scan(data[: start + 700] + data[stop + 300 :])
    assert {key: after.samples.get(key) for key in held if key > "000000005"} == {
        k: v for k, v in held.items() if k > "000000005"
    }


@pytest.mark.parametrize("fill", [b"\0", b"\xff", b"random"])
def test_overwritten_stretches(shard: bytes, fill: bytes) -> None:
    rng = np.random.default_rng(1)
    begins = np.array(headers(shard))
    end = max(stop for _, stop in places(shard).values())
    for _ in range(150):
        # Around a header: a stretch inside one member's data is not the tar's to see.
        header = int(rng.choice(begins))
        start = max(0, header - int(rng.integers(0, 2 * BLOCK)))
        stop = min(end, header + int(rng.integers(1, 4 * BLOCK)))
        content = rng.bytes(stop - start) if fill == b"random" else fill * (stop - start)
        damaged = shard[:start] + content + shard[stop:]
        zeros_at_the_end = fill == b"\0" and damaged.rstrip(b"\0")[start:] == b""
        if not zeros_at_the_end:
            assert_delivered_or_reported(shard, damaged)


def test_any_garbage_is_survived(shard: bytes) -> None:
    rng = np.random.default_rng(2)
    for _ in range(60):
        damaged = np.frombuffer(shard, np.uint8).copy()
        for _ in range(int(rng.integers(1, 30))):
            at = int(rng.integers(len(damaged)))
            damaged[at : at + int(rng.integers(1, 300))] = rng.integers(256)
        scanned = scan(io.BytesIO(damaged.tobytes()), "x.tar")
        for _, found in scanned.samples:
            assert all(extent.offset + extent.size <= len(damaged) for extent in found.values())


def test_unseen_without_an_index_is_a_changed_byte_of_data(tmp_path: Path) -> None:
    write_pictures(tmp_path, [3])
    path = tmp_path / "00000.tar"
    data = bytearray(path.read_bytes())
    data[data.index(b"face 1")] ^= 1
    assert Scan(bytes(data)).damage == []
    assert Scan(bytes(data)).samples["000000001"]["txt"] == b"gace 1"
    path.write_bytes(data)
    assert len(problems(tmp_path)) == 2  # the sample's CRC-32, and the shard's SHA-256


def test_unseen_without_an_index_are_zeros_as_long_as_an_end_mark(tmp_path: Path) -> None:
    write_pictures(tmp_path, [12])
    path = tmp_path / "00000.tar"
    data = path.read_bytes()
    zeroed = data[:-LONGEST_END] + bytes(LONGEST_END)
    start = headers(data)[-6]  # a whole number of samples
    short, long = data[:start] + bytes(len(data) - start), data[: headers(data)[3]] + bytes(len(data) - headers(data)[3])
    assert len(data) - start <= LONGEST_END < len(data) - headers(data)[3]
    assert Scan(short).damage == []
    assert [d.reason.split(":")[0] for d in Scan(long).damage] == ["more zeros than a tar ends with"]
    for damaged in (short, long, zeroed):
        path.write_bytes(damaged)
        assert problems(tmp_path)


def test_unseen_without_an_index_is_a_changed_letter_of_a_long_name(tmp_path: Path) -> None:
    WRITERS["gnu"](tmp_path / "00000.tar", dict(sample(number) for number in range(2)))
    data = (tmp_path / "00000.tar").read_bytes()
    at = data.index(b"000000001.txt")
    after = Scan(data[:at] + b"9" + data[at + 1 :])
    assert after.damage == []
    assert after.samples[f"{LONG}900000001"].keys() == {"txt"}, "an incomplete sample, which `verify` and training report"


def problems(folder: Path) -> list[str]:
    return [str(problem) for report in Verification(str(folder)).run(workers=1) for problem in report.problems]


def test_an_index_sees_every_flipped_byte(tmp_path: Path) -> None:
    write_pictures(tmp_path, [3])
    path = tmp_path / "00000.tar"
    whole = path.read_bytes()
    assert problems(tmp_path) == []
    rng = np.random.default_rng(3)
    for at in [*range(0, len(whole), 67), len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        assert any("sha256" in line for line in problems(tmp_path)), at


def test_blocks_of_damaged_shards_are_exact_or_reported(tmp_path: Path) -> None:
    held = write_pictures(tmp_path, [7, 5, 9])
    originals = {path: path.read_bytes() for path in tmp_path.glob("*.tar")}
    rng = np.random.default_rng(4)
    reported = 0
    for case in range(150):
        for path, data in originals.items():
            path.write_bytes(data)
        for path in rng.choice(sorted(originals), int(rng.integers(1, 3)), replace=False):
            damaged = bytearray(originals[path])
            at, length = int(rng.integers(len(damaged))), int(rng.integers(1, 3000))
            match ["flip", "zero", "cut", "remove", "insert", "missing"][case % 6]:
                case "flip":
                    damaged[at] ^= int(rng.integers(1, 256))
                case "zero":
                    damaged[at : at + length] = bytes(len(damaged[at : at + length]))
                case "cut":
                    del damaged[at:]
                case "remove":
                    del damaged[at : at + length]
                case "insert":
                    damaged[at:at] = rng.bytes(length)
                case "missing":
                    path.unlink()
                    continue
            path.write_bytes(damaged)
        reported += check_epoch(tmp_path, held)
    assert reported > 150, "the damage was to be felt"


def check_epoch(folder: Path, held: Held) -> int:
    """Read an epoch; every sample comes bit-exactly or is reported. Returns how many were reported."""

    def decode(raw: RawSample) -> dict[str, bytes]:
        return {extension: raw.read(extension) for extension in raw.extents}

    options = StreamOptions(seed=1, block=2, streams=3, window=4)
    reader = BlockReader([Source(ShardFolder.open(folder))], decode, options)
    shard_of = {key: entry.name for entry, keys in keys_by_shard(folder) for key in keys}
    missing, reported = set(held), 0
    try:
        for number in range(-(-len(held) // (options.block * options.streams)) * options.streams + options.streams):
            block = reader.read(number)
            for delivered in block.samples:
                assert delivered.value == held[delivered.origin.key]
                if delivered.origin.epoch == 0:
                    missing.discard(delivered.origin.key)
            for replaced in block.replaced:
                reported += 1
                shard, key = replaced.origin.shard, replaced.origin.key
                missing -= {key} if key else {key for key in missing if shard_of[key] == shard}
    except UserError:  # a stream without a single readable sample: loud enough
        return reported + 1
    finally:
        reader.close()
    assert not missing
    return reported


def keys_by_shard(folder: Path) -> list[tuple[object, list[str]]]:
    opened = ShardFolder.open(folder)
    return [(entry, [key for key, _ in opened.sidecar(number).samples]) for number, entry in enumerate(opened.index.shards)]
