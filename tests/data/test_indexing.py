"""Indexing foreign shards: what is found is what webdataset wrote; what is wrong is said, and the rest indexed."""

import gzip
import os
import tarfile
from pathlib import Path

import pytest
import webdataset as wds

from gptface_dist.data import remote
from gptface_dist.data.folder import ShardFolder
from gptface_dist.data.indexing import Indexed, expand_braces, find_shards, index
from gptface_dist.data.shards import Index, Sidecar
from gptface_dist.errors import UserError
from tests.corpus import VOCABULARY, write_tokens
from tests.picture_shards import sample, serve, write_pictures

Held = dict[str, dict[str, bytes]]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.0)


def write_foreign(folder: Path, counts: list[int]) -> Held:
    held: Held = {}
    for shard, count in enumerate(counts):
        with wds.TarWriter(str(folder / f"{shard:05d}.tar")) as writer:
            for number in range(len(held), len(held) + count):
                key, members = sample(number)
                writer.write({"__key__": key, **members})
                held[key] = members
    return held


def run(folder: Path | str, out: Path | None = None, workers: int = 1, force: bool = False) -> list[Indexed]:
    return list(index(find_shards(str(folder), out), workers, force))


def content(location: Path) -> Held:
    folder = ShardFolder.open(location)
    held = {}
    for number in range(len(folder.index.shards)):
        shard = folder.open_shard(number)
        for key, extents in folder.sidecar(number).samples:
            held[key] = {name: shard.read(extent) for name, extent in extents.items()}
        shard.close()
    return held


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar.index.json")}


def test_foreign_shards(tmp_path: Path) -> None:
    held = write_foreign(tmp_path, [4, 3, 5])
    found = run(tmp_path)
    assert [(done.entry.name, done.entry.samples, done.problems, done.kept) for done in found] == [
        ("00000.tar", 4, [], False),
        ("00001.tar", 3, [], False),
        ("00002.tar", 5, [], False),
    ]
    assert content(tmp_path) == held
    assert ShardFolder.open(tmp_path).index.kind == "pictures"


def test_our_own_index_is_found_again_byte_by_byte(tmp_path: Path) -> None:
    write_pictures(tmp_path, [4, 3])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    run(tmp_path, force=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_several_workers_make_the_same_index(tmp_path: Path) -> None:
    write_foreign(tmp_path, [4, 3, 5])
    run(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert [done.entry.name for done in run(tmp_path, workers=2, force=True)] == ["00000.tar", "00001.tar", "00002.tar"]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_fits_is_kept_and_what_changed_is_read_again(tmp_path: Path) -> None:
    write_foreign(tmp_path, [4, 3, 5, 2])
    run(tmp_path)
    before = stamps(tmp_path)
    # 0 is as it was, 1 is newer, 2 has another size, 3 has no sidecar that can be read
    later = before["00001.tar.index.json"] + 10_000_000_000
    os.utime(tmp_path / "00001.tar", ns=(later, later))
    with (tmp_path / "00002.tar").open("ab") as file:
        file.write(bytes(512))
    os.utime(tmp_path / "00002.tar", ns=(0, 0))
    (tmp_path / "00003.tar.index.json").write_text("{")
    assert [done.kept for done in run(tmp_path)] == [True, False, False, False]
    assert stamps(tmp_path)["00000.tar.index.json"] == before["00000.tar.index.json"]
    assert [done.kept for done in run(tmp_path, force=True)] == [False] * 4


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    held = write_foreign(tmp_path, [4, 3, 5])
    running = index(find_shards(str(tmp_path), None), workers=1)
    next(running)
    running.close()
    assert not (tmp_path / "index.json").exists()
    assert [done.kept for done in run(tmp_path)] == [True, False, False]
    assert content(tmp_path) == held


def test_kind_and_meta_are_kept(tmp_path: Path) -> None:
    folder = write_tokens(tmp_path, [3])
    run(tmp_path, force=True)
    assert ShardFolder.open(tmp_path) == folder
    (tmp_path / "index.json").unlink()
    run(tmp_path)
    found = ShardFolder.open(tmp_path).index
    assert (found.kind, found.meta) == ("tokens", {})
    assert folder.index.meta["text_sha256"] == VOCABULARY.text_sha256


def test_damage_is_listed_and_the_rest_indexed(tmp_path: Path) -> None:
    held = write_foreign(tmp_path, [4, 3])
    path = tmp_path / "00001.tar"
    data = bytearray(path.read_bytes())
    data[data.index(b"000000005.txt")] = 0
    path.write_bytes(data)
    first, second = run(tmp_path)
    assert first.problems == []
    assert len(second.problems) == 1
    assert second.problems[0].startswith("00001.tar: bytes ")
    del held["000000005"]["txt"]
    assert content(tmp_path) == held
    assert run(tmp_path)[1].problems == second.problems, "what is kept keeps its problems"


def test_an_empty_file_and_an_empty_tar_are_problems(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(b"")
    tarfile.open(tmp_path / "1.tar", "w").close()
    empty, without = run(tmp_path)
    assert ["truncated" in line or "no samples" in line for line in empty.problems] == [True, True]
    assert without.problems == ["1.tar: no samples in it"]


def refuse(source: Path | str, message: str, out: Path | None = None) -> None:
    with pytest.raises(UserError, match=message) as error:
        run(source, out)
    assert "\n" not in str(error.value)


def test_what_cannot_be_indexed_is_refused(tmp_path: Path) -> None:
    refuse(tmp_path / "none", "no folder")
    refuse(tmp_path, "holds no .tar files")
    (tmp_path / "a").mkdir()
    write_foreign(tmp_path / "a", [2])
    refuse(tmp_path, "they lie in .*a, perhaps")
    refuse(tmp_path / "a", "the index of a folder lies in it", tmp_path)
    packed = gzip.compress((tmp_path / "a" / "00000.tar").read_bytes())
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "0.tar.gz").write_bytes(packed)
    refuse(tmp_path / "b", r"compressed tars \(0.tar.gz\): unpack")
    (tmp_path / "b" / "0.tar").write_bytes(packed)
    refuse(tmp_path / "b", r"compressed \(gzip\): unpack")
    (tmp_path / "b" / "0.tar").write_bytes(b"<html>not found</html>" * 100)
    refuse(tmp_path / "b", "is not a tar")
    with pytest.raises(UserError, match="at least 1 worker"):
        run(tmp_path / "a", workers=0)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refuse("http://127.0.0.1:9/0.tar", "cannot be written to", tmp_path / "file" / "out")


def test_shards_behind_urls(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    held = write_foreign(source, [4, 3, 5])
    with serve(source) as server:
        pattern = server.url + "/{00000..00002}.tar"
        found = run(pattern, out)
        assert [done.entry.name for done in found] == [f"{server.url}/{name}.tar" for name in ("00000", "00001", "00002")]
        assert content(out) == held
        server.asked.clear()
        assert [done.kept for done in run(pattern, out)] == [True] * 3
        assert len(server.asked) == 0, "a look at sizes alone"
        with (source / "00001.tar").open("ab") as file:
            file.write(bytes(512))
        assert [done.kept for done in run(pattern, out)] == [True, False, True]
        refuse(server.url + "/{00002..00004}.tar", "00003.tar cannot be read: .*404", tmp_path / "other")
        assert Sidecar.from_json((tmp_path / "other" / "00002.tar.index.json").read_bytes(), "x").samples
    assert {path.name for path in source.iterdir()} == {"00000.tar", "00001.tar", "00002.tar"}
    assert [entry.samples for entry in Index.from_json((out / "index.json").read_bytes(), "x").shards] == [4, 3, 5]


def test_urls_that_cannot_be_indexed_are_refused(tmp_path: Path) -> None:
    refuse("http://127.0.0.1:9/0.tar", "name a folder for its index")
    refuse("http://127.0.0.1:9/{0..3}.tar", "0.tar cannot be read: .*refused", tmp_path)
    refuse("http://127.0.0.1:9/data/", "is not a .tar: give a pattern", tmp_path)
    refuse("http://127.0.0.1:9/{a,b}/0.tar", "two shards with one file name", tmp_path)


def test_patterns() -> None:
    assert expand_braces("a{008..011}.tar") == ["a008.tar", "a009.tar", "a010.tar", "a011.tar"]
    assert expand_braces("{9..11}") == ["9", "10", "11"]
    assert expand_braces("{a,b}/{0..1}") == ["a/0", "a/1", "b/0", "b/1"]
    assert expand_braces("plain.tar") == ["plain.tar"]
    for wrong in ("{3..1}", "{0..99999999}", "{a}", "a{0..1", "0..1}"):
        with pytest.raises(UserError):
            expand_braces(wrong)
