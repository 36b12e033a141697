"""FP8 attention costs no more loss than another seed does; what is broken in it does."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gptface_dist.data import tokens
from gptface_dist.data.batch import BatchOptions
from gptface_dist.data.options import DataConfig, SourceConfig
from gptface_dist.data.shards import ShardWriter, write_index
from gptface_dist.data.stream import StreamOptions
from gptface_dist.distributed.rank import RankInfo
from gptface_dist.distributed.spawn import spawn
from gptface_dist.kernels.attention import emulator
from gptface_dist.model.options import ModelOptions
from gptface_dist.parallel import libraries
from gptface_dist.parallel.options import OptimizerOptions
from gptface_dist.training.config import Config
from gptface_dist.training.options import EvaluationOptions, RunOptions
from gptface_dist.training.schedule import ScheduleOptions
from tests.corpus import GRID, VOCABULARY

STEPS, SEEDS = 90, 3


def write_copies(folder: Path, count: int, seed: int) -> None:
    """Images of one code each, which its caption names: a masked token is known to whoever attends to another one."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    with ShardWriter(folder / "00000.tar") as writer:
        for number in range(count):
            code = int(rng.integers(8))
            writer.write(f"{seed}-{number:06d}", tokens.encode(np.full(GRID, code), [[code] * 4]))
    write_index(folder, tokens.KIND, tokens.index_meta(VOCABULARY, GRID), [folder / "00000.tar"])


def config(folder: Path) -> Config:
    return Config(
        data=DataConfig(
            str(folder), [SourceConfig(str(folder / "tokens"))], 16, 16, StreamOptions(block=4, streams=2),
            batch=BatchOptions(text_length=4, itm_negative_ratio=0.0, buckets=1), workers=0,
        ),
        model=ModelOptions(layers=2, hidden=32, heads=2, ffn=64, text_positions=16, rows=4, columns=6, init_std=0.1),
        optimizer=OptimizerOptions(lr=1e-2),
        schedule=ScheduleOptions(warmup_steps=10),
        run=RunOptions(str(folder / "run"), STEPS),
        evaluation=EvaluationOptions([SourceConfig(str(folder / "held_out"))], batches=4),
    )  # fmt: skip


def without_mean(*arguments: Any) -> tuple[Tensor, emulator.State]:
    """The forward pass of the recipe, but for V's mean, which is taken away and not given back."""
    out, state = FORWARD(*arguments)
    back = state.v_mean.transpose(1, 2).to(out.dtype)
    return torch.where(state.seen.transpose(1, 2), out - back, 0), state


FORWARD = emulator.forward


def work(_: RankInfo, folder: Path) -> None:
    """One spawned process: the study as it is, and of a recipe that is broken."""
    with libraries.quiet_imports():
        libraries.import_libraries()
        from gptface_dist.training.analysis.fp8_study import compare, prepared

        options, taken, done = prepared(config(folder)), [], []
        for name, forward in (("sound", FORWARD), ("broken", without_mean)):
            emulator.forward = forward
            found = compare(options, VOCABULARY, range(SEEDS), lambda: taken.append(1), lambda *run: done.append(run))
            (folder / f"{name}.json").write_text(json.dumps({key: dataclasses.asdict(gap) for key, gap in found.items()}))
    assert len(taken) == 2 * 2 * SEEDS * STEPS
    assert [run[:2] for run in done] == 2 * [(kernel, seed) for seed in range(SEEDS) for kernel in ("sdpa", "fp8")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    write_copies(folder / "tokens", 400, 0)
    write_copies(folder / "held_out", 64, 1)
    VOCABULARY.save(folder / "vocabulary.json")
    spawn(work, 1, folder)
    return folder


def gaps(folder: Path, name: str) -> dict[str, Any]:
    """A study's gaps in each loss."""
    from gptface_dist.training.analysis.fp8_study import Gap

    return {key: Gap(**raw) for key, raw in json.loads((folder / f"{name}.json").read_text()).items()}


def test_fp8_costs_no_more_than_another_seed(folder: Path) -> None:
    found = gaps(folder, "sound")
    loss = found["loss"]
    assert max(found["loss/image"].plain) < math.log(8) / 2, "attention was learned"
    assert loss.plain != loss.fp8
    assert len(set(loss.plain)) == SEEDS
    assert loss.within_noise()


def test_a_broken_recipe_costs_more(folder: Path) -> None:
    found = gaps(folder, "broken")
    assert found["loss"].plain == gaps(folder, "sound")["loss"].plain
    assert found["loss"].gap > 2 * found["loss"].noise
    assert not found["loss"].within_noise()
