"""Signals to ``gptface train`` that has started processes: all of them end, with one message and the status of the signal."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from gptface_dist.training.metrics import NAME
from tests.corpus import VOCABULARY, write_tokens
from tests.processes import interruptible
from tests.sockets import tree
from tests.training.test_train import config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that would go on for hours."""
    folder = tmp_path_factory.mktemp("signals")
    write_tokens(folder / "tokens", [60, 50])
    (folder / "tokenizers").mkdir()
    VOCABULARY.save(folder / "tokenizers" / "vocabulary.json")
    settings = config(folder) | {
        "layout": {"pp": 2, "zero": 0},
        "run": {"steps": 10**6},
        "tracking": {"mlflow": False},
        "evaluation": {},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder


def alive(pids: list[int]) -> list[int]:
    """Those that have not ended; who has ended and is not yet waited for counts as ended."""
    found = []
    for pid in pids:
        status = Path(f"/proc/{pid}/status")
        if status.exists() and "State:\tZ" not in status.read_text():
            found.append(pid)
    return found


def until(there: Callable[[], object]) -> None:
    """Wait for something that comes."""
    end = time.monotonic() + 120
    while not there():
        assert time.monotonic() < end
        time.sleep(0.02)


def start(folder: Path, run: Path, number: int, when: Callable[[list[int]], object]) -> tuple[int, str, list[int]]:
    """Send the launcher a signal as soon as ``when`` is true of all its processes; status, messages, and all processes."""
    command = [sys.executable, "-m", "gptface_dist.tools.main", "train", str(folder / "run.yaml"), f"run.folder={run}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with interruptible(command, stderr=subprocess.PIPE, text=True, env=environment) as launcher:
        until(lambda: launcher.poll() is not None or when(list(tree(launcher.pid))))
        pids = list(tree(launcher.pid))
        launcher.send_signal(number)
        _, errors = launcher.communicate(timeout=120)
        until(lambda: not alive(pids))
        return launcher.returncode, errors, pids


@pytest.mark.parametrize(("number", "message"), [(signal.SIGTERM, "ended by SIGTERM"), (signal.SIGINT, "interrupted")])
def test_a_signal_to_the_launcher_ends_all(folder: Path, tmp_path: Path, number: int, message: str) -> None:
    status, errors, pids = start(folder, tmp_path, number, lambda _: (tmp_path / NAME).exists())
    assert len(pids) >= 3
    assert status == 128 + number, errors
    assert [line for line in errors.splitlines() if line.startswith("gptface")] == [f"gptface: {message}"]
    assert "Traceback" not in errors
    assert "terminate called" not in errors
    assert not (tmp_path / ".lock").exists()


def test_a_signal_before_the_ranks_have_met_ends_all(folder: Path, tmp_path: Path) -> None:
    status, errors, pids = start(folder, tmp_path / "run", signal.SIGTERM, lambda pids: len(pids) >= 3)
    assert len(pids) >= 3
    assert status == 128 + signal.SIGTERM, errors
    assert "Traceback" not in errors
    assert not (tmp_path / "run").exists()


def test_a_launcher_that_is_killed_leaves_nobody_behind(folder: Path, tmp_path: Path) -> None:
    """Nor does the killing leave a lock: the next run may begin."""
    status, errors, pids = start(folder, tmp_path, signal.SIGKILL, lambda _: (tmp_path / NAME).exists())
    assert len(pids) >= 3
    assert status == -signal.SIGKILL
    assert "Traceback" not in errors
