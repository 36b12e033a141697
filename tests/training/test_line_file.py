"""Lines reach the file whole and in order, however full its disk is in between."""

import errno
import json
import os
import random
from pathlib import Path

import pytest

from gptface_dist.training.callbacks import metrics_logger
from gptface_dist.training.callbacks.metrics_logger import LineFile
from gptface_dist.training.metrics import whole_lines


class Disk:
    """Writes fewer bytes than it is given, or none, as chance has it."""

    def __init__(self, patch: pytest.MonkeyPatch, seed: int):
        self.rng, self.pwrite, self.room = random.Random(seed), os.pwrite, True
        patch.setattr(metrics_logger.os, "pwrite", self.write)

    def write(self, descriptor: int, data: bytes, offset: int) -> int:
        """The file system call."""
        if not self.room or self.rng.random() < 0.4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.pwrite(descriptor, data[: self.rng.randint(1, len(data))], offset)


def line(step: int) -> str:
    return json.dumps({"step": step, "kind": "train"})


@pytest.mark.parametrize("seed", range(20))
def test_a_disk_that_is_full_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    path = tmp_path / "metrics.jsonl"
    disk = Disk(monkeypatch, seed)
    file = LineFile(path, 0)
    for step in range(1, 30):
        file.write(line(step))
        written = path.read_text().splitlines(keepends=True)
        assert written == whole_lines(path), "never a part of a line"
        assert [json.loads(text)["step"] for text in written] == list(range(1, len(written) + 1))
    monkeypatch.undo()
    del disk
    file.close()
    assert [json.loads(text)["step"] for text in whole_lines(path)] == list(range(1, 30))


def test_what_stays_unwritten_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Disk(monkeypatch, 0).room = False
    monkeypatch.setattr(metrics_logger, "MOST_WAITING", 5)
    file = LineFile(tmp_path / "metrics.jsonl", 0)
    for step in range(1, 9):
        file.write(line(step))
    file.close()
    assert caplog.text.count("cannot be written: No space left on device") == 1
    assert "lacks 8 lines" in caplog.text
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_lines_of_repeated_steps_and_a_torn_one_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(line(step) + "\n" for step in range(1, 6)) + '{"step": 6, "ki')
    file = LineFile(path, 3)
    file.write(line(4))
    file.close()
    assert [json.loads(text)["step"] for text in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_a_folder_that_is_gone_is_said_and_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = LineFile(tmp_path / "missing" / "metrics.jsonl", 0)
    file.write(line(1))
    assert "cannot be written: No such file or directory" in caplog.text
    (tmp_path / "missing").mkdir()
    file.write(line(2))
    file.close()
    assert len((tmp_path / "missing" / "metrics.jsonl").read_text().splitlines()) == 2
