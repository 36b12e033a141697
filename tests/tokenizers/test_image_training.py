"""Training an image tokenizer: exact resume, any number of processes, revival, refusals, and that it learns."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gptface_dist.distributed.rank import RankInfo
from gptface_dist.distributed.spawn import spawn
from gptface_dist.errors import UserError
from gptface_dist.tokenizers import image_training
from gptface_dist.tokenizers.image import ImageTokenizer
from gptface_dist.tokenizers.image_files import WEIGHTS_NAME
from gptface_dist.tokenizers.image_options import PRESETS, ImageArchitecture, ImageTrainingOptions
from gptface_dist.tokenizers.image_state import ImageTrainingState
from gptface_dist.tokenizers.image_training import CHECKPOINT_NAME, METRICS_NAME, SUMMARY_NAME, ImageRun, train_image_tokenizer
from gptface_dist.tokenizers.processes import Processes, processes

SMALL = ImageArchitecture(
    size=16, channels=(8, 16), layers=1, codes=32, code_channels=4, latent_channels=8, attention=False, norm_groups=4
)
# Everything that has a state of its own is on: the discriminator, revivals, a window of metrics that checkpoints cut.
OPTIONS = ImageTrainingOptions(
    steps=8, batch=4, learning_rate=1e-3, warmup=2, laplacian=0.1, adversarial=0.5, adversarial_start=2,
    revive_every=2, revive_after=2, log_every=4, checkpoint_every=3,
)  # fmt: skip
ALONE = Processes(0, 1, torch.device("cpu"))
RUN = ImageRun(SMALL, OPTIONS, data="some", held_out=2)


def global_batch(step: int, batch: int = 4, size: int = 16) -> Tensor:
    """Pictures of two colours that meet on a line, float32 [batch, 3, size, size]: a function of the step."""
    generator = torch.Generator().manual_seed(step)
    colours = torch.rand(batch, 2, 3, 1, 1, generator=generator) * 2 - 1
    slope = torch.randn(batch, 2, 1, 1, 1, generator=generator)
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    side = torch.sigmoid(8 * (slope[:, 0] * rows + slope[:, 1] * columns))
    return colours[:, 0] * side + colours[:, 1] * (1 - side)


def shares(group: Processes = ALONE, batch: int = 4) -> Callable[[int], Iterator[Tensor]]:
    def batches(step: int) -> Iterator[Tensor]:
        while True:
            yield global_batch(step, batch).chunk(group.count)[group.rank].contiguous()
            step += 1

    return batches


def held_out() -> list[Tensor]:
    return [global_batch(1000), global_batch(1001)]


def train(folder: Path, run: ImageRun = RUN, group: Processes = ALONE, **more: Any) -> dict[str, Any]:
    return train_image_tokenizer(shares(group, run.training.batch), held_out, folder, run, group, **more)


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / METRICS_NAME).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "pictures_per_second"} for line in lines]


class Stopped(Exception):
    """The run was killed."""


def stop_at(step: int) -> Callable[[int, Any], None]:
    def on_step(done: int, _: Any) -> None:
        if done == step:
            raise Stopped

    return on_step


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    train(folder)
    return folder


@pytest.mark.parametrize("stops", [[5], [3], [7, 8], [1, 4, 6]])
def test_interrupted_and_straight_are_the_same_bits(tmp_path: Path, straight: Path, stops: list[int]) -> None:
    for stop in stops:
        with pytest.raises(Stopped):
            train(tmp_path, on_step=stop_at(stop))
    summary = train(tmp_path)
    assert (tmp_path / WEIGHTS_NAME).read_bytes() == (straight / WEIGHTS_NAME).read_bytes()
    assert summary == json.loads((straight / SUMMARY_NAME).read_text())
    assert metrics(tmp_path) == metrics(straight)
    assert (tmp_path / "sheet.png").read_bytes() == (straight / "sheet.png").read_bytes()


def test_what_lies_in_the_folder(straight: Path) -> None:
    names = {"config.json", WEIGHTS_NAME, METRICS_NAME, SUMMARY_NAME, "sheet.png"}
    assert {path.name for path in straight.iterdir()} == names
    assert [line["step"] for line in metrics(straight)] == [4, 8]
    last = metrics(straight)[-1]
    assert {"loss", "l1", "laplacian", "codebook", "commitment", "psnr", "adversarial", "discriminator", "gradient_norm"} < set(
        last
    )
    summary = json.loads((straight / SUMMARY_NAME).read_text())
    assert summary["sha256"] == ImageTokenizer.load(straight).sha256
    assert summary["held_out"]["pictures"] == 8
    assert summary["run"]["training"]["steps"] == 8


def test_a_kill_while_writing_leaves_the_old_checkpoint(
    tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    save = torch.save

    def fails_second(raw: Any, file: Any) -> None:
        saved.append(raw["state"]["step"])
        if len(saved) == 2:
            file.write(b"half a checkpoint")
            raise Stopped
        save(raw, file)

    monkeypatch.setattr(image_training.torch, "save", fails_second)
    with pytest.raises(Stopped):
        train(tmp_path)
    assert saved == [3, 6]
    assert torch.load(tmp_path / CHECKPOINT_NAME, weights_only=True)["state"]["step"] == 3
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    train(tmp_path)
    assert (tmp_path / WEIGHTS_NAME).read_bytes() == (straight / WEIGHTS_NAME).read_bytes()


def test_a_finished_run_is_not_done_again(straight: Path) -> None:
    def nothing(_: int) -> Iterator[Tensor]:
        raise AssertionError

    before = {path.name: path.stat().st_mtime_ns for path in straight.iterdir()}
    found = train_image_tokenizer(nothing, held_out, straight, RUN, ALONE)
    assert found == json.loads((straight / SUMMARY_NAME).read_text())
    assert before == {path.name: path.stat().st_mtime_ns for path in straight.iterdir()}


OTHERS = [
    (replace(RUN, training=replace(OPTIONS, learning_rate=2e-3)), "learning_rate=0.001, not 0.002"),
    (replace(RUN, architecture=replace(SMALL, codes=64)), "codes=32, not 64"),
    (replace(RUN, held_out=3, data="another"), "held_out=2, not 3"),
    (replace(RUN, data="another"), "other pictures"),
]


@pytest.mark.parametrize(("run", "message"), OTHERS)
@pytest.mark.parametrize("finished", [False, True])
def test_other_options_are_refused_by_name(tmp_path: Path, straight: Path, run: ImageRun, message: str, finished: bool) -> None:
    folder = straight if finished else tmp_path
    if not finished:
        with pytest.raises(Stopped):
            train(folder, on_step=stop_at(3))
    with pytest.raises(UserError, match=f"was trained with {message}: train into another folder"):
        train(folder, run)


def test_a_tokenizer_from_elsewhere_is_not_overwritten(tmp_path: Path, straight: Path) -> None:
    ImageTokenizer.load(straight).save(tmp_path)
    with pytest.raises(UserError, match="already holds an image tokenizer from elsewhere"):
        train(tmp_path)


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save({"format": "gptface-image-training-1", "state": Bomb()}, tmp_path / CHECKPOINT_NAME)
    with pytest.raises(UserError, match="cannot be read") as caught:
        train(tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint"])
def test_a_broken_checkpoint_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / CHECKPOINT_NAME).write_bytes(content)
    with pytest.raises(UserError, match="remove it to start anew"):
        train(tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        train(tmp_path / "file")


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    run = replace(RUN, training=replace(OPTIONS, learning_rate=1e30, warmup=0, clip=1e30, adversarial=0.0))
    with pytest.raises(UserError, match="the loss is no number at step 4: start anew with a lower learning rate"):
        train(tmp_path, run)


def test_too_few_pictures(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the pictures end before step 3 of 8"):
        train_image_tokenizer(lambda _: iter([global_batch(0), global_batch(1)]), held_out, tmp_path, RUN, ALONE)


def test_the_callers_random_numbers_are_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(tmp_path, replace(RUN, training=replace(OPTIONS, steps=2)))
    assert torch.equal(torch.rand(3), expected)


def test_it_learns() -> None:
    options = replace(OPTIONS, steps=80, learning_rate=4e-3, warmup=20, beta1=0.9, beta2=0.95, adversarial=0.0)
    state = ImageTrainingState(replace(SMALL, channels=(16, 16)), options, ALONE)
    found = [state.train_step(global_batch(0)).losses["psnr"].item() for _ in range(80)]
    assert found[-1] > found[0] + 5


def test_bf16_learns_too_and_keeps_weights_in_float32(tmp_path: Path) -> None:
    options = replace(OPTIONS, steps=40, batch=8, learning_rate=4e-3, precision="bf16", log_every=20)
    train(tmp_path, replace(RUN, training=options))
    first, last = metrics(tmp_path)
    assert last["l1"] < first["l1"]
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS_NAME).values()} == {torch.float32}


def test_dead_codes_come_back_where_latents_are() -> None:
    options = replace(OPTIONS, steps=100, warmup=0, learning_rate=0.0, adversarial=0.0)
    state = ImageTrainingState(SMALL, options, ALONE)
    state.train_step(global_batch(0))
    book = state.autoencoder.codebook
    with torch.no_grad():
        book[10:] = 1e3  # far from everything: dead from now on
    for step in range(1, 4):
        state.train_step(global_batch(step))
    latents = state.autoencoder.latents(global_batch(3)).detach().permute(0, 2, 3, 1).flatten(0, 2)
    distances = (book.detach()[10:, None] - latents[None]).abs().sum(2).amin(1)
    assert float(distances.max()) < 1e-5, "each is an output of the encoder"
    assert len(book.detach()[10:].unique(dim=0)) > 15, "and not one for all"
    assert (state.last_used[10:] == 3).all()
    assert float(state.optimizer.state[book]["exp_avg_sq"][10:].abs().max()) == 0, "without the moments of its former life"


def test_living_codes_are_not_revived() -> None:
    options = replace(OPTIONS, steps=100, warmup=0, learning_rate=0.0, adversarial=0.0, revive_after=50)
    state = ImageTrainingState(SMALL, options, ALONE)
    state.train_step(global_batch(0))
    before = state.autoencoder.codebook.detach().clone()
    for step in range(1, 6):
        state.train_step(global_batch(step))
    assert torch.equal(state.autoencoder.codebook.detach(), before)


def one_process(rank_info: RankInfo, folder: Path) -> None:
    """What each of two processes does: train in a group of two, and note its own state."""
    rank_info.export()
    with processes() as group:
        train(folder, replace(RUN, training=replace(OPTIONS, log_every=1)), group)
        state = ImageTrainingState(SMALL, OPTIONS, group)
        records = [state.train_step(next(shares(group)(step))) for step in range(8)]
        torch.save({"state": state.state(), "counts": [r.counts for r in records]}, folder / f"rank{rank_info.rank}.pt")


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    spawn(one_process, 2, folder)
    return folder


def test_two_processes_do_what_one_does(tmp_path: Path, by_two: Path) -> None:
    train(tmp_path, replace(RUN, training=replace(OPTIONS, log_every=1)))
    ours, theirs = metrics(tmp_path), metrics(by_two)
    assert len(ours) == len(theirs) == 8
    for one, two in zip(ours, theirs, strict=True):
        assert one.keys() == two.keys()
        for name in one:
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), (one["step"], name)
    alone, together = (load_file(folder / WEIGHTS_NAME) for folder in (tmp_path, by_two))
    for name in alone:
        torch.testing.assert_close(together[name], alone[name], rtol=0, atol=1e-4, msg=name)


def test_two_processes_stay_equal_to_the_bit(by_two: Path) -> None:
    first, second = (torch.load(by_two / f"rank{rank}.pt", weights_only=True) for rank in range(2))

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor):
            return torch.equal(a, b)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        if isinstance(a, list):
            return len(a) == len(b) and all(map(same, a, b))
        return bool(a == b)

    assert same(first, second)
    assert first["state"]["step"] == 8


def test_a_batch_that_does_not_divide() -> None:
    with pytest.raises(UserError, match="a batch of 5 pictures does not divide among 2 processes"):
        Processes(0, 2, torch.device("cpu")).share(5)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_what_they_say(name: str) -> None:
    architecture = PRESETS[name].architecture
    assert architecture.grid * architecture.factor == architecture.size
    assert architecture.vqmodel()["block_out_channels"] == architecture.channels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 17}, "size 17 is not a multiple of the down-sampling factor 2"),
        ({"codes": 1}, "codes must be 2 to 65536"),
        ({"channels": (8, 18)}, r"channels \[18\] are not multiples of norm_groups 4"),
    ],
)
def test_impossible_architectures(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(SMALL, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"l1": -1.0}, "l1 must not be negative"),
        ({"l1": 0.0, "laplacian": 0.0}, "no loss looks at the picture"),
        ({"vgg": 1.0}, "needs vgg_weights"),
        ({"precision": "fp8"}, "precision must be fp32 or bf16"),
    ],
)
def test_impossible_options(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(OPTIONS, **change)
