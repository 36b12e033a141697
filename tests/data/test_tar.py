"""The scanner against Python's tarfile and webdataset, on whatever they can write."""

import hashlib
import io
import tarfile
import zlib

import pytest
import webdataset as wds
from hypothesis import given
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_iterator

from gptface_dist.data.tar import Damage, Hashing, Member, Sample, members, samples, split_name

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
PARTS = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda part: part not in (".", "..")
)
NAMES = st.builds(
    lambda folders, stem, extension: "/".join([*folders, f"{stem}.{extension}"]),
    st.lists(st.one_of(PARTS, st.just("folder" * 12)), max_size=3),
    st.sampled_from(["000", "001", "Ä", "x y"]),
    st.sampled_from(["jpg", "JPG", "seg.png", "txt", "json", "Ünï"]),
)
FILES = st.lists(st.tuples(NAMES, st.binary(max_size=1500), st.sampled_from("fffffd")), max_size=8)


def tar_of(files: list[tuple[str, bytes, str]], tar_format: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, data, kind in files:
            info = tarfile.TarInfo(name)
            if kind == "d":
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
            else:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def scanned(data: bytes) -> list[Member | Damage]:
    return list(members(Hashing(io.BytesIO(data))))


@given(FILES, st.sampled_from(["gnu", "pax"]))
def test_members_are_those_of_tarfile(files: list[tuple[str, bytes, str]], form: str) -> None:
    data = tar_of(files, FORMATS[form])
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = []
        for info in tar:
            if info.isreg():
                content = tar.extractfile(info)
                assert content is not None
                held = content.read()
                expected.append(Member(info.name, info.offset_data, info.size, zlib.crc32(held), held))
    assert scanned(data) == expected


def test_members_of_a_plain_ustar_with_a_prefix() -> None:
    name = "a" * 90 + "/" + "b" * 90 + ".txt"
    (member,) = scanned(tar_of([(name, b"x", "f")], tarfile.USTAR_FORMAT))
    assert isinstance(member, Member)
    assert (member.name, member.data) == (name, b"x")


@given(FILES, st.sampled_from(["gnu", "pax"]))
def test_samples_are_those_of_webdataset(files: list[tuple[str, bytes, str]], form: str) -> None:
    # webdataset stops at a repeated member, and does not see names with a line break in a folder.
    unique = {name.lower(): (name, data, kind) for name, data, kind in files if "\n" not in name}
    data = tar_of(list(unique.values()), FORMATS[form])
    stream = ({**found, "__url__": "x"} for found in tar_file_iterator(io.BytesIO(data)))
    expected = [
        (found["__key__"], {name: value for name, value in found.items() if not name.startswith("__")})
        for found in group_by_keys(stream)
    ]
    ours = []
    for sample in samples(Hashing(io.BytesIO(data))):
        assert isinstance(sample, Sample)
        ours.append((sample.key, {extension: member.data for extension, member in sample.members.items()}))
    assert ours == expected


@pytest.mark.parametrize(
    ("name", "key", "extension"),
    [
        ("000.jpg", "000", "jpg"),
        ("a/b/000.seg.PNG", "a/b/000", "seg.png"),
        ("./000.jpg", "./000", "jpg"),
        ("a.b/c//000.txt", "a.b/c//000", "txt"),
        ("a/README", "a/README", ""),
    ],
)
def test_split_name_as_webdataset_does(name: str, key: str, extension: str) -> None:
    assert split_name(name) == (key, extension)
    if extension:
        assert wds.tariterators.base_plus_ext(name) == (key, name[len(key) + 1 :])


def test_what_belongs_to_no_sample_is_passed_over() -> None:
    names = ["README", ".DS_Store", "a/.000.jpg", "__meta__/x.json", "a/._000.jpg", "000.", "000.txt"]
    (sample,) = samples(Hashing(io.BytesIO(tar_of([(name, b"", "f") for name in names], tarfile.GNU_FORMAT))))
    assert isinstance(sample, Sample)
    assert (sample.key, list(sample.members)) == ("000", ["txt"])


def test_a_repeated_member_is_named_and_the_first_one_counts() -> None:
    data = tar_of([("0.txt", b"first", "f"), ("0.TXT", b"second", "f")], tarfile.GNU_FORMAT)
    (sample,) = samples(Hashing(io.BytesIO(data)))
    assert isinstance(sample, Sample)
    assert (sample.members["txt"].data, sample.repeated) == (b"first", ["0.TXT"])


def test_the_hash_is_that_of_the_whole_file_even_where_it_is_damaged() -> None:
    data = bytearray(tar_of([(f"{number}.txt", b"x" * 600, "f") for number in range(5)], tarfile.GNU_FORMAT))
    data[1600] ^= 255
    for content in (bytes(data), bytes(data[:4000]), b"", b"no tar" * 300):
        file = Hashing(io.BytesIO(content))
        list(members(file))
        assert file.sha256() == hashlib.sha256(content).hexdigest()
        assert file.position == len(content)


def damage(data: bytes) -> list[str]:
    return [item.reason for item in scanned(data) if isinstance(item, Damage)]


def header(name: str, kind: bytes, size: int = 0, link: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, link
    return info.tobuf(tarfile.GNU_FORMAT)


END = bytes(1024)
FILE = tar_of([("1.txt", b"hello", "f")], tarfile.GNU_FORMAT)[:1024]


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_links_are_reported_since_they_hold_no_data(kind: bytes) -> None:
    data = header("0.jpg", kind, link="other.jpg") + FILE + END
    assert damage(data) == ["member '0.jpg' is a link to 'other.jpg' and holds no data"]
    assert [item.name for item in scanned(data) if isinstance(item, Member)] == ["1.txt"]


def test_a_folder_with_a_size_swallows_nothing() -> None:
    data = header("folder", tarfile.DIRTYPE, size=700) + FILE + END
    assert [item.name for item in scanned(data) if isinstance(item, Member)] == ["1.txt"]


def test_a_sparse_file_is_reported() -> None:
    assert damage(header("0.jpg", tarfile.GNUTYPE_SPARSE) + FILE + END) == [
        "member '0.jpg' is stored as a sparse file, which is not read"
    ]


def test_a_long_name_does_not_outlive_the_damaged_header_of_its_member() -> None:
    data = bytearray(tar_of([("a" * 120 + ".txt", b"x", "f"), ("1.txt", b"hello", "f")], tarfile.GNU_FORMAT))
    data[1024 + 20] ^= 1  # the member's header, after the long name's header and data
    found = scanned(bytes(data))
    assert [item.name for item in found if isinstance(item, Member)] == ["1.txt"]
    assert [(item.start, item.stop) for item in found if isinstance(item, Damage)] == [(0, 2048)]


@pytest.mark.parametrize("record", [b"12 path=", b"99 path=x\n", b"x path=1.txt\n", b"11 pathXab\n", b"12 size=no\n"])
def test_an_unreadable_pax_header_takes_its_member_with_it(record: bytes) -> None:
    pax = header("pax", tarfile.XHDTYPE, len(record)) + record + bytes(-len(record) % 512)
    assert damage(pax + FILE + END) == ["member '1.txt' has an unreadable pax header"]


def test_concatenated_tars_are_read_on_and_reported() -> None:
    data = FILE + END + FILE + END
    assert len([item for item in scanned(data) if isinstance(item, Member)]) == 2
    assert damage(data)[0].startswith("zeros inside the tar")


def test_a_size_beyond_all_memory_is_not_allocated() -> None:
    assert "cut short" in damage(header("0.jpg", tarfile.REGTYPE, 1 << 60) + b"data")[0]


def test_a_member_that_swallowed_others_is_reported_and_they_are_found() -> None:
    data = header("0.jpg", tarfile.REGTYPE, 3000) + b"cut here" + FILE + FILE.replace(b"hello", b"HELLO") + END
    found = scanned(data)
    assert [item.data for item in found if isinstance(item, Member)] == [b"hello", b"HELLO"]
    assert damage(data) == ["member '0.jpg' is cut: the next one begins inside it"]
