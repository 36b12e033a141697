"""What tokenizers are trained on: every picture in its turn but those held out, the same for any number of processes."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptface_dist.data.folder import ShardFolder
from gptface_dist.data.pictures import decode_pixels
from gptface_dist.data.shards import Index, ShardEntry, ShardWriter, write_index
from gptface_dist.data.tokenizer_corpus import TrainingPictures, captions, open_pictures, pictures_at, spread
from gptface_dist.errors import UserError
from gptface_dist.tokenizers.processes import Processes
from tests.picture_shards import png, write_pictures

SIZE = 8
CPU = torch.device("cpu")


def pixels(data: bytes) -> Tensor:
    """The test's own way from a PNG to float32 [3, S, S]."""
    return (torch.from_numpy(decode_pixels(data, SIZE).copy()).float() * 2 / 255 - 1).permute(2, 0, 1)


def keys(batch: Tensor, held: dict[str, dict[str, bytes]]) -> list[str]:
    """Which pictures these are."""
    known = {key: pixels(members["png"]) for key, members in held.items()}
    return [next(key for key, one in known.items() if torch.allclose(one, picture, atol=1e-5)) for picture in batch]


def steps(
    pictures: TrainingPictures, count: int, batch: int = 4, first: int = 0, rank: int = 0, ranks: int = 1
) -> list[Tensor]:
    stream = pictures.batches(batch, Processes(rank, ranks, CPU), workers=0, first_step=first)
    return list(itertools.islice(stream, count))


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.data())
def test_spread_pictures_are_at_even_distances(counts: list[int], data: st.DataObject) -> None:
    total = sum(counts)
    folder = ShardFolder("here", Index([ShardEntry(str(n), count, 0, "") for n, count in enumerate(counts)]))
    every = [(shard, sample) for shard, count in enumerate(counts) for sample in range(count)]
    count = data.draw(st.integers(0, total + 1))
    if not 0 < count <= total:
        with pytest.raises(UserError, match=f"here holds {total} pictures"):
            spread(folder, count)
        return
    assert spread(folder, count) == [every[n * total // count] for n in range(count)]


def test_an_epoch_has_every_picture_but_those_held_out(tmp_path: Path) -> None:
    held = write_pictures(tmp_path, [5, 0, 12, 3])
    pictures = TrainingPictures(open_pictures(str(tmp_path)), SIZE, seed=0, held_out=4)
    out = keys(torch.cat(list(pictures.held_out_batches())), held)
    assert out == [f"{n:09d}" for n in (0, 5, 10, 15)]
    seen = keys(torch.cat(steps(pictures, 20)), held)
    assert set(seen) == set(held) - set(out)
    assert TrainingPictures(pictures.folder, SIZE, 1, 4).order_id != pictures.order_id


def test_the_global_batch_is_the_same_for_any_processes_and_resumes(tmp_path: Path) -> None:
    write_pictures(tmp_path, [9, 12])
    pictures = TrainingPictures(open_pictures(str(tmp_path)), SIZE, seed=3, held_out=2)
    whole = steps(pictures, 6)
    assert all(tuple(batch.shape) == (4, 3, SIZE, SIZE) and batch.dtype == torch.float32 for batch in whole)
    for ranks in (2, 4):
        parts = [steps(pictures, 6, rank=rank, ranks=ranks) for rank in range(ranks)]
        for step, batch in enumerate(whole):
            assert torch.equal(torch.cat([part[step] for part in parts]), batch)
    assert all(map(torch.equal, steps(pictures, 2, first=4), whole[4:]))


@pytest.mark.parametrize("held_out", [1, 5, 10])
def test_however_many_are_held_out_the_rest_is_trained_on(tmp_path: Path, held_out: int) -> None:
    held = write_pictures(tmp_path, [21])
    pictures = TrainingPictures(open_pictures(str(tmp_path)), SIZE, seed=0, held_out=held_out)
    seen = set(keys(torch.cat(steps(pictures, 12)), held))
    assert seen.isdisjoint(keys(torch.cat(list(pictures.held_out_batches())), held))
    assert seen


@pytest.mark.parametrize("held_out", [0, 2, 3, 4])
def test_nothing_or_half_cannot_be_held_out(tmp_path: Path, held_out: int) -> None:
    write_pictures(tmp_path, [4])
    with pytest.raises(UserError, match=f"holds 4 pictures, {held_out} cannot be held out: hold out at least one and less"):
        TrainingPictures(open_pictures(str(tmp_path)), SIZE, 0, held_out)


def write(folder: Path, samples: list[dict[str, bytes]], kind: str = "pictures") -> ShardFolder:
    with ShardWriter(folder / "00000.tar") as writer:
        for number, members in enumerate(samples):
            writer.write(str(number), members)
    write_index(folder, kind, {}, [folder / "00000.tar"])
    return ShardFolder.open(folder)


def test_captions_come_in_order_and_broken_ones_are_counted(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        [
            {"txt": b"a face", "json": b'{"captions": ["one more", "a face"]}'},
            {"png": png(0)},
            {"txt": b"\xff"},
            {"txt": "ein Gesicht, süß".encode()},
            {"txt": b"fine", "json": b"{"},
        ],
    )
    readable: list[bool] = []
    assert list(captions(folder, readable.append)) == ["a face", "one more", "ein Gesicht, süß"]
    assert readable == [True, False, False, True, False]


def test_unreadable_pictures_are_passed_over(tmp_path: Path) -> None:
    folder = write(tmp_path, [{"png": png(0)}, {"png": b"no picture"}, {"txt": b"none"}, {"png": png(3)}])
    (batch,) = pictures_at(folder, spread(folder, 4), SIZE)
    assert torch.allclose(batch, torch.stack([pixels(png(0)), pixels(png(3))]), atol=1e-6)


def test_tokens_are_no_pictures(tmp_path: Path) -> None:
    write(tmp_path, [{"npy": b""}], "tokens")
    with pytest.raises(UserError, match="holds tokens, not pictures"):
        open_pictures(str(tmp_path))


@pytest.mark.parametrize("name", ["00000.tar", "00000.tar.index.json"])
def test_a_missing_shard_is_named(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, [{"png": png(0), "txt": b"a"}, {"png": png(1), "txt": b"b"}])
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=r"shard 00000.tar: "):
        list(pictures_at(folder, [(0, 0)], SIZE))
    with pytest.raises(UserError, match=r"shard 00000.tar: "):
        list(captions(folder, lambda _: None))
