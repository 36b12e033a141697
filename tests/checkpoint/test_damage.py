"""Damage of any kind is found and named; a full disk loses nothing; what is kept is what was asked for."""

import errno
import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from gptface_dist.checkpoint import folder, storage
from gptface_dist.checkpoint.background import Background, staged
from gptface_dist.checkpoint.folder import FOLDER_NAME, name_of
from gptface_dist.checkpoint.load import damage, find, load_checkpoint
from gptface_dist.checkpoint.manifest import Manifest
from gptface_dist.checkpoint.record import RunRecord
from gptface_dist.checkpoint.tensor_shards import collect_shards
from gptface_dist.distributed.collectives import Failed, RankGroup
from gptface_dist.errors import UserError
from gptface_dist.model.parameters import ParameterSpec
from tests.checkpoint.fake_state import MATRIX, VECTOR, FakeState, read, tiny, write

ALONE = RankGroup()


def latest(checkpoints: Path) -> Path | None:
    """The latest checkpoint, where none is damaged."""
    path, damaged = find(checkpoints, ALONE, previous=False)
    assert damaged == []
    return path


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << (place % 8)
    path.write_bytes(data)


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    written = FakeState(3.5, ema=True)
    path = write(tmp_path, written, 7)
    assert path == tmp_path / FOLDER_NAME / "step-00000007" == latest(tmp_path / FOLDER_NAME)
    state = read(path, FakeState(-1.0, ema=True))
    assert state.equals(written)
    assert (state.updates, state.refreshed) == (7, 1)
    assert RunRecord.read(path).step == 7
    for meant in (path, path.parent, tmp_path):
        assert folder.resolve(meant) == path


def test_torchs_own_reader_reads_it(tmp_path: Path) -> None:
    path = write(tmp_path, FakeState(3.5), 7)
    found = {"weights/matrix": torch.zeros(MATRIX.shape), "exp_avg_sq/vector": torch.zeros(VECTOR.shape)}
    dcp.load(found, checkpoint_id=path / "state", no_dist=True)
    assert torch.equal(found["weights/matrix"].flatten(), torch.arange(91) + 3.5)
    assert torch.equal(found["exp_avg_sq/vector"], torch.arange(11) + 5.5)


def test_fingerprints_do_not_depend_on_the_pieces(tmp_path: Path) -> None:
    one = Manifest.read(write(tmp_path, FakeState(1.0), 1))
    # The same numbers as one local_shard each.
    whole = FakeState(1.0)
    whole.local_shards = lambda: (
        [local_shard for local_shard in FakeState.local_shards(whole) if local_shard.local_range.start == 0]
        + [  # type: ignore[method-assign]
            local_shard for local_shard in FakeState.local_shards(whole) if local_shard.local_range.start
        ][::-1]
    )
    two = Manifest.read(write(tmp_path, whole, 2))
    assert one.tensors == two.tensors
    assert one.tensors["weights/matrix"].shape == MATRIX.shape


@pytest.mark.parametrize(
    "name", ["manifest.json", "run.json", "reference.safetensors", "state/.metadata", "state/__0_0.distcp"]
)
def test_any_flipped_bit_of_any_file_is_found(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, tiny(1.0), 1)
    file = path / name
    whole = file.read_bytes()
    every = max(1, len(whole) // 300)
    for place in {*range(0, len(whole), every), *range(min(64, len(whole))), len(whole) - 1}:
        flip(file, place)
        assert str(file) in damage(path, ALONE), place
        file.write_bytes(whole)
    for shorter in (whole[:-1], b""):
        file.write_bytes(shorter)
        assert str(file) in damage(path, ALONE)
    file.unlink()
    assert f"{file} is missing" in damage(path, ALONE)
    file.write_bytes(whole)
    assert damage(path, ALONE) == ""


def test_any_flipped_bit_of_the_pointer_is_found(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, tiny(step), step)
    checkpoints = tmp_path / FOLDER_NAME
    pointer = checkpoints / "latest"
    whole = pointer.read_bytes()
    for place in range(8 * len(whole)):
        data = bytearray(whole)
        data[place // 8] ^= 1 << (place % 8)
        pointer.write_bytes(data)
        with pytest.raises(UserError, match=r"latest|step-"):
            find(checkpoints, ALONE, previous=False)
    assert find(checkpoints, ALONE, previous=True) == (checkpoints / name_of(3), [])


def test_damaged_ones_are_named_and_passed_over_if_wanted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, tiny(step), step)
    checkpoints = tmp_path / FOLDER_NAME
    flip(checkpoints / name_of(4) / "state" / "__0_0.distcp", 100)
    (checkpoints / name_of(3) / "run.json").unlink()
    with pytest.raises(UserError, match=r"step-00000004/state/__0_0.distcp has the SHA-256 .*checkpoint.damaged=previous"):
        find(checkpoints, ALONE, previous=False)
    damaged = [checkpoints / name_of(4), checkpoints / name_of(3)]
    assert find(checkpoints, ALONE, previous=True) == (checkpoints / name_of(2), damaged)
    folder.set_aside(damaged)
    assert "step-00000004" in caplog.text
    assert "step-00000003/run.json is missing" in caplog.text
    assert [path.name for path in folder.published(checkpoints)] == [name_of(2), name_of(1)]
    assert (checkpoints / "damaged-step-00000004").is_dir()
    # The pointer still names the damaged one, until the next is saved.
    with pytest.raises(UserError, match="step-00000004 is missing"):
        find(checkpoints, ALONE, previous=False)
    write(tmp_path, tiny(9.0), 3)
    assert latest(checkpoints) == checkpoints / name_of(3)
    for step in (1, 2, 3):
        (checkpoints / name_of(step) / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"no checkpoint of .* is undamaged: .*step-00000003.*step-00000002.*step-00000001"):
        find(checkpoints, ALONE, previous=True)


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert latest(tmp_path / "missing") is None
    (tmp_path / FOLDER_NAME).mkdir()
    assert latest(tmp_path / FOLDER_NAME) is None
    with pytest.raises(UserError, match="holds no checkpoint"):
        folder.resolve(tmp_path)


def test_another_model_is_refused_in_one_line(tmp_path: Path) -> None:
    path = write(tmp_path, FakeState(), 1)
    wide = ParameterSpec("matrix", (13, 8), None, None, None, 0.0, True, False)
    other = ParameterSpec("other", (2,), None, None, None, 0.0, False, False)
    with pytest.raises(UserError, match=r"exp_avg/matrix has the shape \[13, 7\], the model's is \[13, 8\]") as error:
        load_checkpoint(path, FakeState(parameters=(wide, VECTOR)), ALONE)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="exp_avg/other is missing"):
        load_checkpoint(path, FakeState(parameters=(MATRIX, VECTOR, other)), ALONE)
    with pytest.raises(UserError, match="exp_avg/vector is not of this model"):
        load_checkpoint(path, FakeState(parameters=(MATRIX,)), ALONE)


def test_the_average_may_begin_or_end_with_a_checkpoint(tmp_path: Path) -> None:
    without, averaged = write(tmp_path, FakeState(1.0), 1), write(tmp_path, FakeState(2.0, ema=True), 2)
    begun = read(without, FakeState(-1.0, ema=True))
    assert torch.equal(begun.held["ema"]["matrix"], begun.held["weights"]["matrix"])
    ended = read(averaged, FakeState(-1.0))
    assert ended.equals(FakeState(2.0))


def test_metadata_may_not_run_code(tmp_path: Path) -> None:
    path = write(tmp_path, tiny(1.0), 1) / "state" / ".metadata"

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("echo",)

    for bad in (pickle.dumps(Evil()), b"\x80\x04\x8c\x1ctorch.distributed.checkpoint\x8c\x02os\x93."):
        path.write_bytes(bad)
        with pytest.raises(pickle.UnpicklingError, match="has no place"):
            storage.read_metadata(path)


class FullDisk:
    """Lets some acts through, then says that no space is left."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int):
        self.left = after
        fsync, put = os.fsync, storage.HashedFile.write
        monkeypatch.setattr(os, "fsync", lambda handle: (self.act(), fsync(handle)))
        monkeypatch.setattr(storage.HashedFile, "write", lambda file, data: (self.act(), put(file, data)))

    def act(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """At every act of saving in turn: one line of error, nothing half written, and the next save works."""
    with pytest.MonkeyPatch.context() as patch:
        enough = FullDisk(patch, 1000)
        write(tmp_path, tiny(1.0), 1)
        acts = 1000 - enough.left
    checkpoints = tmp_path / FOLDER_NAME
    for after in range(acts):
        with pytest.MonkeyPatch.context() as patch:
            FullDisk(patch, after)
            with pytest.raises(Failed, match=r"^No space left on device: somewhere$"):
                write(tmp_path, tiny(2.0), 2)
        assert not list(checkpoints.glob(".*.new"))
        newest = latest(checkpoints)
        # Only the last two acts, the flushing of the pointer and of its folder, come after publication.
        assert newest == checkpoints / name_of(2 if after == acts - 1 else 1)
        assert read(newest, tiny(0.0)).equals(tiny(2.0 if after == acts - 1 else 1.0))
    write(tmp_path, tiny(3.0), 2)
    assert read(checkpoints / name_of(2), tiny(0.0)).equals(tiny(3.0))


def test_a_file_system_that_takes_less_than_given(tmp_path: Path) -> None:
    class Slow(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(memoryview(data)[:3])

    file = storage.HashedFile(tmp_path / "a")
    file._file = Slow(tmp_path / "b", "xb")  # type: ignore[assignment]
    file.write(memoryview(b"0123456789"))
    size, digest = file.finish()
    assert (tmp_path / "b").read_bytes() == b"0123456789"
    assert (size, digest) == (10, "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882")


@pytest.mark.parametrize(
    ("last", "interval", "kept"),
    [
        (0, 0, [1, 2, 3, 4, 5, 6, 9]),
        (2, 0, [5, 6, 9]),
        (1, 3, [3, 6, 9]),
        (3, 2, [2, 4, 5, 6, 9]),
        (10, 0, [1, 2, 3, 4, 5, 6, 9]),
    ],
)
def test_what_is_kept(tmp_path: Path, last: int, interval: int, kept: list[int]) -> None:
    """The run is at step 6; 9 is of an earlier attempt that got further."""
    for step in (9, 1, 2, 3, 4, 5, 6):
        write(tmp_path, tiny(step), step)
    checkpoints = tmp_path / FOLDER_NAME
    deleted = folder.prune(checkpoints, 6, last, interval)
    assert sorted(folder.step_of(path) or 0 for path in folder.published(checkpoints)) == kept
    assert sorted({1, 2, 3, 4, 5, 6, 9} - set(kept)) == sorted(folder.step_of(path) or 0 for path in deleted)
    assert latest(checkpoints) == checkpoints / name_of(6)
    assert not list(checkpoints.glob(".*"))


def test_a_step_that_is_reached_again_replaces_its_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, tiny(1.0), 1)
    path = write(tmp_path, tiny(2.0), 1)
    assert read(path, tiny(0.0)).equals(tiny(2.0))
    assert not list(path.parent.glob(".*"))


def test_the_background_writes_what_the_state_was(tmp_path: Path) -> None:
    background, state = Background(ALONE), FakeState(1.0)
    copy = staged(collect_shards(state.local_shards(), written=True))
    for tensors in state.held.values():
        for tensor in tensors.values():
            tensor.zero_()
    fresh = collect_shards(FakeState(1.0).local_shards(), written=True)
    assert all(
        torch.equal(a.memory, b.memory) for key in fresh for a, b in zip(copy[key].pieces, fresh[key].pieces, strict=True)
    )
    assert background.done()
    assert not background.busy
    background.begin(lambda: tmp_path.joinpath("written").touch())
    assert background.busy
    background.wait()
    assert tmp_path.joinpath("written").exists()

    def fail() -> None:
        raise Failed("No space left on device")

    background.begin(fail)
    with pytest.raises(AssertionError):
        background.begin(fail)
    with pytest.raises(Failed, match="No space"):
        background.wait()
    assert not background.busy
    background.wait()
