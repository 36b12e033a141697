"""What the writer writes, others read; what others write, the scan indexes."""

import io
import json
import tarfile
from pathlib import Path

import pytest
import webdataset as wds
from hypothesis import given
from hypothesis import strategies as st

from gptface_dist.data.shards import Index, ShardEntry, ShardWriter, Sidecar, read_entry, scan, sidecar_path, write_index
from gptface_dist.errors import UserError
from gptface_dist.files import sha256
from tests.picture_shards import sample, write_pictures


def read_at(path: Path, sidecar: Sidecar) -> dict[str, dict[str, bytes]]:
    data = path.read_bytes()
    return {key: {ext: data[e.offset : e.offset + e.size] for ext, e in found.items()} for key, found in sidecar.samples}


def test_webdataset_reads_what_we_write(tmp_path: Path) -> None:
    held = write_pictures(tmp_path, [4])
    dataset = wds.WebDataset(str(tmp_path / "00000.tar"), shardshuffle=False)
    read = {found["__key__"]: {name: found[name] for name in ("png", "txt", "json")} for found in dataset}
    assert read == held


def test_we_index_what_webdataset_writes(tmp_path: Path) -> None:
    held = dict(sample(number) for number in range(10))
    with wds.ShardWriter(str(tmp_path / "%05d.tar"), maxcount=5, verbose=0) as writer:
        for key, members in held.items():
            writer.write({"__key__": key, **members})
    read = {}
    for path in sorted(tmp_path.glob("*.tar")):
        with path.open("rb") as file:
            sidecar = scan(file, path.name)
        assert sidecar.problems == []
        assert (sidecar.size, sidecar.sha256) == (path.stat().st_size, sha256(path))
        read |= read_at(path, sidecar)
    assert read == held


KEYS = st.from_regex(r"([a-zé_]{1,70}/){0,2}[a-z0-9é ]{1,12}", fullmatch=True)
MEMBERS = st.dictionaries(st.from_regex(r"[a-z]{1,4}(\.[a-z]{1,3})?", fullmatch=True), st.binary(max_size=1300), min_size=1)


@given(st.dictionaries(KEYS, MEMBERS, max_size=5))
def test_the_writers_sidecar_is_what_a_scan_finds(tmp_path_factory: pytest.TempPathFactory, held: dict) -> None:
    held = {key: members for key, members in held.items() if not key.startswith("__")}
    path = tmp_path_factory.mktemp("shards") / "00000.tar"
    with ShardWriter(path) as writer:
        for key, members in held.items():
            writer.write(key, members)
    written = Sidecar.from_json(sidecar_path(path).read_bytes(), "x")
    with path.open("rb") as file:
        assert scan(file, path.name) == written
    assert read_at(path, written) == held
    assert writer.entry == read_entry(path) == ShardEntry("00000.tar", len(held), path.stat().st_size, sha256(path))
    with tarfile.open(path) as tar:
        assert [info.name for info in tar] == [f"{key}.{ext}" for key, members in held.items() for ext in members]


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    write_pictures(tmp_path / "a", [3])
    write_pictures(tmp_path / "b", [3])
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("key", "members"),
    [
        ("", {"txt": b""}),
        ("a.b", {"txt": b""}),
        ("a/", {"txt": b""}),
        (".a", {"txt": b""}),
        ("a\0b", {"txt": b""}),
        ("__a__/b", {"txt": b""}),
        ("a", {"TXT": b""}),
        ("a", {".txt": b""}),
        ("a", {"": b""}),
        ("a", {"b/c": b""}),
        ("a", {}),
        ("twice", {"txt": b""}),
    ],
)
def test_names_that_would_be_read_as_others_are_refused(tmp_path: Path, key: str, members: dict[str, bytes]) -> None:
    with ShardWriter(tmp_path / "0.tar") as writer:
        writer.write("twice", {"txt": b"x"})
        with pytest.raises(ValueError, match=r"sample key|no name of"):
            writer.write(key, members)
    assert read_entry(tmp_path / "0.tar").samples == 1


def test_an_interrupted_shard_leaves_nothing(tmp_path: Path) -> None:
    def write_twice() -> None:
        with ShardWriter(tmp_path / "0.tar") as writer:
            writer.write("a", {"txt": b"x"})
            writer.write("a", {"txt": b"x"})

    with pytest.raises(ValueError, match="is already in"):
        write_twice()
    assert list(tmp_path.iterdir()) == []


def test_problems_name_the_shard(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("a.txt", "b.txt", "a.jpg", "b.txt"):
            tar.addfile(tarfile.TarInfo(name))
    buffer.seek(0)
    sidecar = scan(buffer, "7.tar")
    assert [key for key, _ in sidecar.samples] == ["a", "b"]
    assert sidecar.problems == [
        "7.tar: key 'a' comes again, with jpg: first one kept",
        "7.tar: key 'b' comes again, with txt: first one kept",
    ]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": "other"}', "\xff", '{"format": "gptface-shard-index-1", "samples": [["a", []]]}']
)
def test_what_is_no_sidecar_is_refused_by_name(text: str) -> None:
    with pytest.raises(UserError, match=r"here is not a shard index .* rebuild"):
        Sidecar.from_json(text.encode("latin-1"), "here")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "gptface-index-1", "shards": [3], "kind": "", "meta": {}}'])
def test_what_is_no_index_is_refused_by_name(text: str) -> None:
    with pytest.raises(UserError, match=r"here is not a data index .* rebuild"):
        Index.from_json(text, "here")


def test_an_index_lists_shards_by_name(tmp_path: Path) -> None:
    write_pictures(tmp_path, [2, 3])
    index = write_index(tmp_path, "pictures", {"a": 1}, [tmp_path / "00001.tar", tmp_path / "00000.tar"])
    assert [(entry.name, entry.samples) for entry in index.shards] == [("00000.tar", 2), ("00001.tar", 3)]
    assert Index.from_json((tmp_path / "index.json").read_bytes(), "x") == index
    assert json.loads((tmp_path / "index.json").read_bytes())["meta"] == {"a": 1}
    assert index.samples == 5
    assert not list(tmp_path.glob(".*"))
