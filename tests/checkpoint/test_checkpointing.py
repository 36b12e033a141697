"""The hook: when it saves, what a run goes on from, and what happens when saving fails. Engine and model are stand-ins."""

import dataclasses
import errno
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gptface_dist.checkpoint import folder, storage
from gptface_dist.checkpoint.folder import FOLDER_NAME, name_of, published
from gptface_dist.checkpoint.options import CheckpointOptions
from gptface_dist.checkpoint.record import RunRecord
from gptface_dist.data.loader import Position
from gptface_dist.data.options import DataConfig
from gptface_dist.engine.parity_case import GRID, MODEL, VOCABULARY
from gptface_dist.errors import UserError
from gptface_dist.model.reference_batch import reference_batch
from gptface_dist.objectives.reference_outputs import REFERENCE_NAME, ReferenceOutputs
from gptface_dist.training.callbacks import checkpointing
from gptface_dist.training.callbacks.callback import Callback
from gptface_dist.training.callbacks.checkpointing import Checkpointing
from gptface_dist.training.callbacks.ema import EMA
from gptface_dist.training.config import Config
from gptface_dist.training.options import RunOptions
from gptface_dist.training.state import TrainState
from tests.checkpoint.fake_state import FakeState, read

REFERENCE = reference_batch(VOCABULARY, GRID, 20)
OUTPUTS = {"itm": torch.zeros(4, 2)}


class StandIn(FakeState):
    """The state of an engine: its numbers are the step's."""

    def update_ema(self, decay: float) -> None:
        """Of the weights."""
        for name, tensor in self.held["ema"].items():
            tensor.lerp_(self.held["weights"][name], 1 - decay)


class Counter(Callback):
    """Has a state."""

    def __init__(self) -> None:
        self.count = 0

    def after_step(self, run: Any, record: dict[str, float]) -> None:
        """Count, and write it down."""
        self.count += 1
        record["counted"] = self.count

    def state(self) -> dict[str, Any]:
        """The count."""
        return {"count": self.count}

    def restore(self, state: dict[str, Any]) -> None:
        """The count."""
        self.count = state["count"]


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointing, "_reference_batch", lambda run: REFERENCE)


def make(path: Path, model: Any = MODEL, vocabulary: Any = VOCABULARY, ema_decay: float = 0.0, **options: Any) -> Any:
    """A run with the callback."""
    config = Config(
        data=DataConfig(tokenizers="", sources=[]),
        model=model,
        run=RunOptions(folder=str(path)),
        checkpoint=CheckpointOptions(**options),
    )
    callbacks: list[Callback] = [EMA(ema_decay), Checkpointing(config.checkpoint, timeout_s=60), Counter()]
    rank_info = SimpleNamespace(rank=0)
    engine = SimpleNamespace(state=StandIn(), reference_outputs=lambda batch: OUTPUTS)
    return SimpleNamespace(
        config=config,
        folder=path,
        state=TrainState(),
        vocabulary=vocabulary,
        engine=engine,
        rank_info=rank_info,
        callbacks=callbacks,
        update_factor=1.0,
    )


def begin(run: Any) -> None:
    """As the trainer does."""
    for callback in run.callbacks:
        callback.start(run)
    for callback in run.callbacks:
        callback.begin(run)


def go(run: Any, last: int, request_after: int = -1) -> Any:
    """The trainer's loop up to step ``last``."""
    begin(run)
    while run.state.step < last:
        for callback in run.callbacks:
            callback.before_step(run)
        step = run.state.step + 1
        for kind, tensors in run.engine.state.held.items():
            for tensor in tensors.values():
                if kind != "ema":
                    tensor.fill_(step)
        run.engine.state.updates += 1
        run.state = dataclasses.replace(run.state, step=step, position=Position(10 * step, "order"), samples=4 * step)
        record = {"loss": 1.0 / step}
        for callback in run.callbacks:
            callback.after_step(run, record)
        if step == request_after:
            run.callbacks[1].request()
    for callback in run.callbacks:
        callback.stop(run)
    return run


def steps(path: Path) -> list[int]:
    """The published ones."""
    return [folder.step_of(found) or 0 for found in reversed(published(path / FOLDER_NAME))]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_saves_every_so_many_steps_and_at_the_end(tmp_path: Path, asynchronous: bool) -> None:
    go(make(tmp_path, interval=3, keep_last=0, asynchronous=asynchronous), 7)
    assert steps(tmp_path) == [3, 6, 7]
    for step in (3, 6, 7):
        path = tmp_path / FOLDER_NAME / name_of(step)
        state = read(path, FakeState(-1.0))
        assert all(bool((tensor == step).all()) for tensors in state.held.values() for tensor in tensors.values())
        record = RunRecord.read(path)
        assert (record.step, record.updates) == (step, step)
        assert record.state["position"] == {"block": 10 * step, "order_id": "order"}
        waited = record.metrics.pop("checkpoint_s", 0.0)
        assert (waited > 0) == (step == 7)
        assert record.metrics == {"loss": 1.0 / step, "counted": step}
        assert record.config["model"]["hidden"] == MODEL.hidden
        assert record.versions["torch"] == torch.__version__.split("+")[0] or record.versions["torch"] == torch.__version__
        assert ReferenceOutputs.load(path / REFERENCE_NAME).outputs["itm"].shape == (4, 2)


def test_saves_when_asked_and_never_twice(tmp_path: Path) -> None:
    go(make(tmp_path, interval=2, keep_last=0), 6, request_after=3)
    assert steps(tmp_path) == [2, 3, 4, 6]


def test_none_but_the_last(tmp_path: Path) -> None:
    go(make(tmp_path, interval=0), 3)
    assert steps(tmp_path) == [3]


def test_keeps_what_was_asked_for(tmp_path: Path) -> None:
    go(make(tmp_path, interval=1, keep_last=2, keep_interval=4), 9)
    assert steps(tmp_path) == [4, 8, 9]


def test_goes_on_where_it_stopped(tmp_path: Path) -> None:
    go(make(tmp_path, interval=2), 5)
    run = make(tmp_path, interval=2)
    begin(run)
    assert run.state == TrainState(
        5, Position(50, "order"), 20, callbacks={"EMA": {}, "Checkpointing": {}, "Counter": {"count": 5}}
    )
    assert run.callbacks[2].count == 5
    assert run.engine.state.updates == 5
    assert run.engine.state.refreshed == 1
    go(make(tmp_path, interval=2, keep_last=0), 7)
    assert steps(tmp_path) == [2, 4, 5, 6, 7]


def test_what_to_go_on_from_is_as_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoint\.resume is must"):
        go(make(tmp_path, resume="must"), 1)
    go(make(tmp_path, resume="never"), 1)
    with pytest.raises(UserError, match=r"choose another run\.folder"):
        go(make(tmp_path, resume="never"), 2)
    go(make(tmp_path, resume="must"), 2)
    assert steps(tmp_path) == [1, 2]


def test_another_model_or_vocabulary_is_refused_with_both_values(tmp_path: Path) -> None:
    go(make(tmp_path), 1)
    other = dataclasses.replace(MODEL, layers=5)
    with pytest.raises(UserError, match=r"another model: model.layers is 5, the checkpoint's is 4$"):
        go(make(tmp_path, model=other), 2)
    words = dataclasses.replace(VOCABULARY, text_sha256="c" * 64)
    with pytest.raises(UserError, match=f"vocabulary.text_sha256 is '{'c' * 64}', the checkpoint's is '{'a' * 64}'"):
        go(make(tmp_path, vocabulary=words), 2)


def test_a_named_checkpoint_is_gone_on_from_once(tmp_path: Path) -> None:
    """Of another run, then of the run itself; after a restart with the same configuration, the run's own progress counts."""
    go(make(tmp_path / "a", interval=1, keep_last=0), 4)
    named = str(tmp_path / "a" / FOLDER_NAME / name_of(2))
    for path in (tmp_path / "b", tmp_path / "a"):
        run = make(path, resume_from=named)
        begin(run)
        assert run.state.step == 2
        go(make(path, resume_from=named), 3)
        run = go(make(path, resume_from=named, keep_last=0), 5)
        assert RunRecord.read(path / FOLDER_NAME / name_of(5)).state["callbacks"]["Counter"]["count"] == 5
        assert RunRecord.read(path / FOLDER_NAME / name_of(5)).origin
    assert steps(tmp_path / "b") == [3, 5]
    # Steps 3 and 5 of the second attempt; 4 is of the first, which got further.
    assert steps(tmp_path / "a") == [1, 2, 3, 4, 5]
    with pytest.raises(UserError, match="holds no checkpoint"):
        go(make(tmp_path / "c", resume_from=str(tmp_path)), 1)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("policy", ["stop", "go_on"])
def test_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, policy: str, asynchronous: bool
) -> None:
    """The disk is full while step 4 is saved."""
    options = {"interval": 2, "keep_last": 0, "on_failure": policy, "asynchronous": asynchronous}
    go(make(tmp_path, **options), 3)
    write = storage.HashedFile.write
    writes: list[int] = []

    def full(file: storage.HashedFile, data: memoryview) -> None:
        writes.append(len(data))
        if len(writes) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, data)

    monkeypatch.setattr(storage.HashedFile, "write", full)
    message = "step-00000004 could not be written: No space left on device"
    if policy == "stop":
        with pytest.raises(UserError, match=message):
            go(make(tmp_path, **options), 7)
        assert steps(tmp_path) == [2, 3]
    else:
        with caplog.at_level(logging.ERROR):
            go(make(tmp_path, **options), 7)
        assert message in caplog.text
        assert steps(tmp_path) == [2, 3, 6, 7]
    assert not list((tmp_path / FOLDER_NAME).glob(".*"))


def test_the_last_checkpoint_must_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: storage.HashedFile, data: memoryview) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage.HashedFile, "write", full)
    with pytest.raises(UserError, match="step-00000003 could not be written: No space left on device"):
        go(make(tmp_path, interval=0, on_failure="go_on"), 3)


def test_the_average_follows_the_weights(tmp_path: Path) -> None:
    go(make(tmp_path, ema_decay=0.5), 2)
    go(make(tmp_path, ema_decay=0.5), 3)
    state = read(tmp_path / FOLDER_NAME / name_of(3), FakeState(-1.0, ema=True))
    # It begins as the weights, 0, 1, 2, ...; then these were 1, 2, 3 everywhere.
    first = torch.arange(91.0)
    assert torch.allclose(state.held["ema"]["matrix"], ((first / 2 + 0.5) / 2 + 1.0) / 2 + 1.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": -1}, "checkpoint.interval must be 0 or more, got -1"),
        ({"on_failure": "x"}, "checkpoint.on_failure must be one of stop, go_on, got 'x'"),
        ({"resume": "never", "resume_from": "x"}, "checkpoint.resume is never"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CheckpointOptions(**options)
