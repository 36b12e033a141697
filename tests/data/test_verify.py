"""Each fault that can be planted is found, under its shard and key, and nothing is found where there is none."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gptface_dist.data import remote, tokens
from gptface_dist.data.shards import ShardWriter, write_index
from gptface_dist.data.verify import Verification
from gptface_dist.errors import UserError
from gptface_dist.tokenizers.vocabulary import Vocabulary
from tests.corpus import GRID, VOCABULARY, write_tokens
from tests.picture_shards import png, sample, serve, write_pictures

Plant = Callable[[Path], None]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.0)


def problems(location: Path | str, vocabulary: Vocabulary | None = None, workers: int = 1) -> list[tuple[str, str, str]]:
    found = [problem for report in Verification(str(location), vocabulary).run(workers) for problem in report.problems]
    return [(problem.shard, problem.key, problem.what) for problem in found]


def write(folder: Path, samples: list[list[tuple[str, dict[str, bytes]]]], indexed: bool) -> None:
    """Shards of samples, keys repeated as they come; with their index or without."""
    for number, held in enumerate(samples):
        path = folder / f"{number:05d}.tar"
        if indexed:
            with ShardWriter(path) as writer:
                for key, members in held:
                    writer.write(key, members)
            continue
        with tarfile.open(path, "w") as tar:
            for key, members in held:
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    if indexed:
        write_index(folder, "pictures", {}, sorted(folder.glob("*.tar")))


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("workers", [1, 2])
def test_sound_shards(tmp_path: Path, indexed: bool, workers: int) -> None:
    write(tmp_path, [[sample(0), sample(1)], [sample(2)]], indexed)
    verification = Verification(str(tmp_path))
    reports = list(verification.run(workers))
    assert verification.indexed == indexed
    assert [(report.name, report.samples, report.problems) for report in reports] == [
        ("00000.tar", 2, []),
        ("00001.tar", 1, []),
    ]
    assert [report.size for report in reports] == [path.stat().st_size for path in sorted(tmp_path.glob("*.tar"))]


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize(
    ("members", "what"),
    [
        ({"png": png(1)[:200]}, "unreadable picture: "),
        ({"png": b""}, "unreadable picture: "),
        ({"png": None}, "no picture: none of .jpg, .jpeg, .png, .webp among txt, json"),
        ({"txt": None}, "no .txt member"),
        ({"txt": b""}, "the caption is empty"),
        ({"txt": b"  \n"}, "the caption is empty"),
        ({"txt": b"\xff"}, "the caption is not UTF-8: invalid start byte at byte 0"),
        ({"json": b"{"}, "the .json member is not JSON: "),
    ],
)
def test_bad_samples(tmp_path: Path, members: dict[str, bytes | None], what: str, indexed: bool) -> None:
    changed = {**sample(1)[1], **members}
    bad = {name: data for name, data in changed.items() if data is not None}
    write(tmp_path, [[sample(0), ("bad", bad), sample(2)]], indexed)
    ((shard, key, found),) = problems(tmp_path)
    assert (shard, key) == ("00000.tar", "bad")
    assert found.startswith(what)


def test_a_sample_with_three_faults_has_three_lines(tmp_path: Path) -> None:
    write(tmp_path, [[("bad", {"png": b"", "txt": b"", "json": b""})]], True)
    assert len(problems(tmp_path)) == 3


@pytest.mark.parametrize("workers", [1, 2])
def test_duplicate_keys(tmp_path: Path, workers: int) -> None:
    write(tmp_path, [[sample(0), sample(1), sample(0)], [sample(2)], [sample(3)], [sample(4), sample(2), sample(1)]], False)
    assert problems(tmp_path, workers=workers) == [
        ("00000.tar", "000000000", "duplicate key, again with png, txt, json: the first one counts"),
        ("00003.tar", "000000001", "duplicate key: it is in 00000.tar, too"),
        ("00003.tar", "000000002", "duplicate key: it is in 00001.tar, too"),
    ]


def test_duplicate_keys_among_many_shards(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    chosen = [[f"{number:03d}" for number in rng.choice(60, 4, replace=False)] for _ in range(40)]
    write(tmp_path, [[(key, sample(0)[1]) for key in keys] for keys in chosen], True)
    found = problems(tmp_path)
    expected = [(f"{n:05d}.tar", key) for n, keys in enumerate(chosen) for key in keys if any(key in k for k in chosen[:n])]
    assert sorted({(shard, key) for shard, key, _ in found}) == sorted(expected)
    for shard, key, what in found:
        other = int(what.split("it is in ")[1][:5])
        assert key in chosen[other]
        assert other < int(shard[:5])


def test_duplicate_members(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, data in (("a.png", png(0)), ("a.txt", b"x"), ("a.TXT", b"y")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert problems(tmp_path) == [("0.tar", "a", "member 'a.TXT' comes twice: the first one counts")]


def flip(path: Path, what: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(what)] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4000])


FAULTS: dict[str, tuple[Plant, list[tuple[str, str, str]]]] = {
    "a byte of a caption": (
        lambda folder: flip(folder / "00001.tar", b"face 3"),
        [("00001.tar", "000000003", ".txt has other bytes, or another place"), ("00001.tar", "", "sha256 is ")],
    ),
    "a byte of a header": (
        lambda folder: flip(folder / "00001.tar", b"000000003.txt"),
        [
            ("00001.tar", "", "bytes "),
            ("00001.tar", "000000003", "no .txt member"),
            ("00001.tar", "000000003", ".txt is in the index, but cannot be found"),
            ("00001.tar", "", "sha256 is "),
        ],
    ),
    "a cut end": (
        lambda folder: cut(folder / "00001.tar"),
        [
            ("00001.tar", "", "bytes "),
            ("00001.tar", "", ""),
            ("00001.tar", "", "sha256 is "),
            ("00001.tar", "000000004", "in the index, but cannot be found"),
        ],
    ),
    "a missing shard": (
        lambda folder: (folder / "00001.tar").unlink(),
        [("00001.tar", "", "the shard is missing or cannot be read")],
    ),
    "a missing sidecar": (
        lambda folder: (folder / "00001.tar.index.json").unlink(),
        [("00001.tar", "", "its sidecar is missing")],
    ),
    "a broken sidecar": (
        lambda folder: (folder / "00001.tar.index.json").write_text("{") and None,
        [("00001.tar", "", "its sidecar is not a shard index")],
    ),
    "another shard's sidecar": (
        lambda folder: (folder / "00000.tar.index.json").replace(folder / "00001.tar.index.json") and None,
        [("00000.tar", "", "its sidecar is missing"), ("00001.tar", "", "its sidecar and index.json disagree")],
    ),
    "a shard that is not listed": (
        lambda folder: write_index(folder, "pictures", {}, [folder / "00000.tar"]) and None,
        [("00001.tar", "", "on disk, but not listed in index.json")],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_differs_from_the_index(tmp_path: Path, fault: str) -> None:
    write_pictures(tmp_path, [2, 3])
    plant, expected = FAULTS[fault]
    plant(tmp_path)
    found = problems(tmp_path)
    assert [(shard, key) for shard, key, _ in found] == [(shard, key) for shard, key, _ in expected]
    for (_, _, what), (_, _, begin) in zip(found, expected, strict=True):
        assert what.startswith(begin)


def test_a_shard_that_was_exchanged(tmp_path: Path) -> None:
    write_pictures(tmp_path, [2])
    with ShardWriter(tmp_path / "other.tar") as writer:
        writer.write(*sample(0))
        writer.write("new", {**sample(1)[1]})
    (tmp_path / "other.tar").replace(tmp_path / "00000.tar")
    (tmp_path / "other.tar.index.json").unlink()
    keys = {key: what for _, key, what in problems(tmp_path)}
    assert keys["new"] == "not in the shard's index"
    assert keys["000000001"] == "in the index, but cannot be found in the shard any more"
    assert "000000000" not in keys


def test_without_an_index_a_lone_sidecar_tells_of_a_missing_shard(tmp_path: Path) -> None:
    write_pictures(tmp_path, [2, 1])
    (tmp_path / "index.json").unlink()
    (tmp_path / "00001.tar").unlink()
    assert [(shard, what.split(":")[0]) for shard, _, what in problems(tmp_path)] == [
        ("00001.tar", "the shard is missing or cannot be read")
    ]


def test_over_http(tmp_path: Path) -> None:
    write_pictures(tmp_path, [2, 3])
    with serve(tmp_path) as server:
        assert problems(server.url) == []
        assert problems(server.url + "/{00000..00001}.tar") == []
        flip(tmp_path / "00001.tar", b"face 3")
        assert {key for _, key, _ in problems(server.url)} == {"", "000000003"}
        server.answers["/00000.tar"] = [404]
        assert ("00000.tar", "") in {(shard, key) for shard, key, _ in problems(server.url)}
        with pytest.raises(UserError, match="cannot be read"):
            problems(server.url + "/none")


def token_problems(folder: Path, members: dict[str, bytes], vocabulary: Vocabulary | None = None) -> list[str]:
    with ShardWriter(folder / "00000.tar") as writer:
        writer.write("a", {**tokens.encode(np.zeros(GRID, int), [[1]]), **members})
    write_index(folder, tokens.KIND, tokens.index_meta(VOCABULARY, GRID), [folder / "00000.tar"])
    return [what for _, _, what in problems(folder, vocabulary)]


def test_token_shards(tmp_path: Path) -> None:
    write_tokens(tmp_path, [3, 2])
    assert problems(tmp_path) == problems(tmp_path, VOCABULARY) == []


@pytest.mark.parametrize(
    ("codes", "captions", "what"),
    [
        (np.zeros((2, 2), int), [[1]], ".codes.npy is 2x2, not 4x6"),
        (np.full(GRID, 64), [[1]], ".codes.npy is not uint16 [H, W] below 64"),
        (np.zeros(GRID, int), [[300]], ".captions.npy is not int32 [captions, longest] below 300"),
    ],
)
def test_tokens_out_of_range(tmp_path: Path, codes: np.ndarray, captions: list[list[int]], what: str) -> None:
    members = tokens.encode(codes, captions)
    assert token_problems(tmp_path, members) == [what]
    assert token_problems(tmp_path, members, VOCABULARY) == [what]


def test_token_members_that_are_no_arrays(tmp_path: Path) -> None:
    (found,) = token_problems(tmp_path, {tokens.CODES: b"no array"})
    assert found.startswith("not a readable array")


def test_tokenizers_that_did_not_make_the_tokens_are_refused(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens", [1])
    with pytest.raises(UserError, match="was made with text tokenizer aaaaaaaaaaaa"):
        problems(tmp_path / "tokens", Vocabulary(300, 64, "c" * 64, "b" * 64))
    write_pictures(tmp_path / "pictures", [1])
    with pytest.raises(UserError, match="holds pictures, not tokens"):
        problems(tmp_path / "pictures", VOCABULARY)


def test_a_problem_is_one_line_of_three_fields(tmp_path: Path) -> None:
    write(tmp_path, [[("a\tb\nc", {"png": png(0), "txt": b""}), ("d\udcff", {"png": png(0), "txt": b""})]], False)
    lines = [str(problem) for report in Verification(str(tmp_path)).run(1) for problem in report.problems]
    assert len(lines) == 2
    for line in lines:
        assert len(line.split("\t")) == 3
        assert line.replace("\t", "").isprintable()
        line.encode()
