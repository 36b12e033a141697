"""Reading over http, with servers that fail."""

from pathlib import Path

import pytest

from gptface_dist.data import remote
from tests.picture_shards import serve


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.0)


def test_a_file_comes_whole(tmp_path: Path) -> None:
    content = bytes(range(256)) * 9000
    (tmp_path / "a b#ü?%.bin").write_bytes(content)
    with serve(tmp_path) as server:
        assert remote.read(remote.join(server.url, "a b#ü?%.bin")) == content
        assert remote.read(f"{server.url}/a b%23ü%3F%25.bin") == content


@pytest.mark.parametrize("answer", [500, 503, 429, 408, b"only a part"])
def test_a_passing_failure_is_retried(tmp_path: Path, answer: int | bytes) -> None:
    (tmp_path / "x").write_bytes(b"content")
    with serve(tmp_path) as server:
        server.answers["/x"] = [answer, answer]
        assert remote.read(f"{server.url}/x") == b"content"
        assert len(server.asked) == 3


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_refusal_is_final(tmp_path: Path, status: int) -> None:
    with serve(tmp_path) as server:
        server.answers["/x"] = [status]
        with pytest.raises(OSError, match=str(status)):
            remote.read(f"{server.url}/x")
        assert len(server.asked) == 1


def test_a_connection_that_is_always_cut_is_an_error_not_a_short_file(tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        server.answers["/x"] = [b"part"] * remote.ATTEMPTS
        with pytest.raises(OSError, match="4 of 104 bytes"):
            remote.download(f"{server.url}/x")
        assert len(server.asked) == remote.ATTEMPTS


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x", "http://127.0.0.1:port/x", "http://[::1/x"])
def test_what_cannot_be_reached_is_one_kind_of_error(url: str) -> None:
    with pytest.raises(OSError, match="cannot be read"):
        remote.read(url)


def test_size_and_time(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    with serve(tmp_path) as server:
        found = remote.size_and_time(f"{server.url}/x")
        assert found is not None
        assert found == (5, int((tmp_path / "x").stat().st_mtime))
        assert remote.size_and_time(f"{server.url}/y") is None
    assert remote.size_and_time("http://127.0.0.1:9/x") is None


def test_names() -> None:
    assert remote.file_name("http://host/a/b.tar?token=1/2") == "b.tar"
    assert remote.file_name("a/b.tar") == "a/b.tar"
    assert remote.join("http://host/a/", "b.tar") == "http://host/a/b.tar"
    assert remote.join("http://host", "https://other/b.tar") == "https://other/b.tar"
