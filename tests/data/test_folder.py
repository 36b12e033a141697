"""Folders of shards, on disk and behind URLs: the same blocks, and every fault under its own name."""

from pathlib import Path

import pytest

from gptface_dist.data import remote
from gptface_dist.data.folder import ShardFolder, Unreadable
from gptface_dist.data.pictures import PictureDecoder, PictureSample
from gptface_dist.data.shards import Extent
from gptface_dist.data.stream import BlockReader, Source, StreamOptions
from gptface_dist.errors import UserError
from tests.picture_shards import serve, write_pictures

OPTIONS = StreamOptions(seed=1, block=2, streams=2, window=4)
BLOCKS = 9


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.0)


def reader(location: str | Path) -> BlockReader[PictureSample]:
    return BlockReader([Source(ShardFolder.open(location))], PictureDecoder(8), OPTIONS)


def content(location: str | Path) -> list[tuple[str, bytes, list[str]]]:
    found = reader(location)
    samples = [sample for number in range(BLOCKS) for sample in found.read(number).samples]
    found.close()
    return [(sample.origin.key, sample.value.pixels.tobytes(), sample.value.captions) for sample in samples]


def test_blocks_over_http_are_those_from_disk(tmp_path: Path) -> None:
    write_pictures(tmp_path, [5, 4, 6])
    with serve(tmp_path) as server:
        assert content(server.url) == content(tmp_path)
        assert content(server.url + "/") == content(tmp_path)


def test_a_server_that_stumbles_changes_nothing(tmp_path: Path) -> None:
    write_pictures(tmp_path, [5, 4, 6])
    with serve(tmp_path) as server:
        server.answers = {"/index.json": [503], "/00001.tar": [503, b"cut"], "/00002.tar.index.json": [429]}
        assert content(server.url) == content(tmp_path)


@pytest.mark.parametrize("path", ["/00001.tar", "/00001.tar.index.json"])
@pytest.mark.parametrize("answer", [503, b"cut"])
def test_an_outage_stops_the_run_instead_of_changing_its_order(tmp_path: Path, path: str, answer: int | bytes) -> None:
    write_pictures(tmp_path, [5, 4, 6])
    with serve(tmp_path) as server:
        server.answers = {path: [answer] * remote.ATTEMPTS}
        found = reader(server.url)
        with pytest.raises(UserError, match=r"00001\.tar.* after 4 attempts: .*nothing was skipped"):
            [found.read(number) for number in range(BLOCKS)]
        assert content(server.url) == content(tmp_path), "and it goes on when the server is back"


@pytest.mark.parametrize("path", ["/00001.tar", "/00001.tar.index.json"])
def test_a_shard_that_is_not_there_is_reported(tmp_path: Path, path: str) -> None:
    write_pictures(tmp_path, [5, 4, 6])
    with serve(tmp_path) as server:
        server.answers = {path: [404]}
        found = reader(server.url)
        blocks = [found.read(number) for number in range(BLOCKS)]
        found.close()
    replaced = [one for block in blocks for one in block.replaced]
    assert {one.origin.shard for one in replaced} == {"00001.tar"}
    assert "00001.tar" in replaced[0].reason
    assert all(sample.origin.shard != "00001.tar" for block in blocks for sample in block.samples)


def test_members_are_checked(tmp_path: Path) -> None:
    held = write_pictures(tmp_path, [2])
    folder = ShardFolder.open(tmp_path)
    key, extents = folder.sidecar(0).samples[1]
    shard = folder.open_shard(0)
    assert {name: shard.read(extent) for name, extent in extents.items()} == held[key]
    text = extents["txt"]
    with pytest.raises(Unreadable, match="changed since the shard was indexed"):
        shard.read(Extent(text.offset + 1, text.size, text.crc32))
    with pytest.raises(Unreadable, match="truncated"):
        shard.read(Extent(text.offset, 1 << 20, text.crc32))
    with pytest.raises(Unreadable, match="read error"):
        shard.read(Extent(-5, 3, 0))
    shard.close()


def test_a_sidecar_of_another_shard_is_unreadable(tmp_path: Path) -> None:
    write_pictures(tmp_path, [2, 3])
    (tmp_path / "00000.tar.index.json").write_bytes((tmp_path / "00001.tar.index.json").read_bytes())
    with pytest.raises(Unreadable, match="disagree"):
        ShardFolder.open(tmp_path).sidecar(0)
    (tmp_path / "00000.tar.index.json").write_text("{}")
    with pytest.raises(Unreadable, match="no usable shard index"):
        ShardFolder.open(tmp_path).sidecar(0)
    (tmp_path / "00000.tar").unlink()
    with pytest.raises(Unreadable, match="cannot be opened"):
        ShardFolder.open(tmp_path).open_shard(0)


def test_what_is_no_folder_of_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        ShardFolder.open(tmp_path / "none")
    with pytest.raises(UserError, match=r"has no index\.json: make it with"):
        ShardFolder.open(tmp_path)
    (tmp_path / "index.json").write_text("<html>")
    with pytest.raises(UserError, match="not a data index"):
        ShardFolder.open(tmp_path)
    with serve(tmp_path) as server, pytest.raises(UserError, match="not a data index"):
        ShardFolder.open(server.url)
    with pytest.raises(UserError, match="Connection refused"):
        ShardFolder.open("http://127.0.0.1:9")


def test_a_missing_index_behind_a_url_says_how_to_make_one(tmp_path: Path) -> None:
    with serve(tmp_path) as server, pytest.raises(UserError, match=r"404.*gptface data index"):
        ShardFolder.open(server.url)
