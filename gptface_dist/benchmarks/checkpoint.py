"""Benchmark of saving, loading and converting checkpoints: time and memory, as ratios to DeepSpeed's own functions.

Both systems write the state of the same DeepSpeed engine, in the same processes, in turn. Files are loaded soon after they
were written: from the page cache, if memory is large enough.
"""

import gc
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gptface_dist import host
from gptface_dist.checkpoint import folder
from gptface_dist.checkpoint.background import Background, staged
from gptface_dist.checkpoint.load import damage, load_checkpoint
from gptface_dist.checkpoint.record import RunRecord
from gptface_dist.checkpoint.save import Content, save_checkpoint
from gptface_dist.checkpoint.tensor_shards import collect_shards
from gptface_dist.data.options import DataConfig
from gptface_dist.distributed.collectives import RankGroup, barrier
from gptface_dist.distributed.rank import RankInfo
from gptface_dist.distributed.spawn import share_of_cores, spawn
from gptface_dist.errors import UserError
from gptface_dist.files import fsync
from gptface_dist.model.options import ModelOptions
from gptface_dist.objectives.milm_itm import MilmItm
from gptface_dist.parallel import libraries
from gptface_dist.parallel.layout import Layout
from gptface_dist.parallel.options import EngineOptions, OptimizerOptions
from gptface_dist.sequence import SPECIALS_PER_SEQUENCE
from gptface_dist.tokenizers.vocabulary import Vocabulary
from gptface_dist.training.config import Config

OURS, BACKGROUND, THEIRS, FLUSHED = "gptface_dist", "gptface_dist, background", "DeepSpeed", "DeepSpeed, then fsync"
TAG = "step"


@dataclass(frozen=True)
class CheckpointWorkload:
    """The training state that is saved, loaded and converted."""

    model: ModelOptions
    """Size and form of the model."""
    vocabulary: Vocabulary
    """The joint ids of the model."""
    layout: Layout
    """Parallel layout, with a ZeRO stage of at least 1."""
    engine: EngineOptions
    """Precision of the engine; master weights and moments are float32 in any case."""
    tokenizers: Path | None
    """Folder of the vocabulary's tokenizers; None skips the conversion, since a release contains its tokenizers."""


@dataclass
class Measurement:
    """Measurements of one operation by one system."""

    what: str
    """``save``, ``load`` or ``convert``."""
    way: str
    """System: :data:`OURS`, :data:`BACKGROUND`, :data:`THEIRS` or :data:`FLUSHED`."""
    seconds: list[float] = field(default_factory=list)
    """Seconds of the slowest process, of each round."""
    memory: list[int] = field(default_factory=list)
    """Peak resident memory beyond that at the start, in bytes, of the process with the highest, of each round."""
    written: int = 0
    """Size of the files in bytes."""


Progress = Callable[[str], None]


def compare(task: CheckpointWorkload, path: Path, rounds: int, progress: Progress) -> list[Measurement]:
    """Measure all operations of all systems, each once a round. ``path`` is an empty folder on the disk to measure.

    :class:`UserError` where DeepSpeed cannot save the layout.
    """
    if task.layout.zero == 0:
        raise UserError("DeepSpeed shards nothing at zero=0: compare at zero 1, 2 or 3")
    task.layout.check(task.layout.world, task.model, 1)
    host.check_gpus(task.layout.world)
    queue: Any = multiprocessing.get_context("spawn").SimpleQueue()
    measured: dict[tuple[str, str], Measurement] = {}

    def drain() -> None:
        while not queue.empty():
            what, way, seconds, memory, written = queue.get()
            progress(f"{what}: {way}")
            measurement = measured.setdefault((what, way), Measurement(what, way))
            measurement.seconds.append(seconds)
            measurement.memory.append(memory)
            measurement.written = written

    world = task.layout.world
    spawn(_work, world, task, str(path), rounds, queue, threads=share_of_cores(world), poll=drain)
    if task.tokenizers is not None:
        for _ in range(rounds):
            for way in (OURS, THEIRS):
                # A process of its own: memory that an earlier conversion freed would be used again.
                spawn(_convert, 1, way, task, str(path), queue, threads=share_of_cores(1), poll=drain)
    return list(measured.values())


def parts(task: CheckpointWorkload, rounds: int) -> int:
    """Number of measurements, and so of calls of ``progress``, in :func:`compare`."""
    return rounds * (6 if task.tokenizers is None else 8)


def _work(rank_info: RankInfo, task: CheckpointWorkload, path: str, rounds: int, queue: Any) -> None:
    """Body of one process of the layout: save and load in turn; rank 0 reports."""
    rank, world = rank_info.rank, rank_info.world
    with libraries.quiet_imports():
        libraries.import_libraries()
        from gptface_dist.engine.engine import Engine
        from gptface_dist.model.reference_batch import reference_batch
        from gptface_dist.objectives.reference_outputs import REFERENCE_NAME, ReferenceOutputs
        from gptface_dist.parallel import groups

        groups.join(rank_info, None, 600)
        groups.start(task.layout, 0, 600)
        engine = Engine(MilmItm(), task.model, task.vocabulary, task.layout, 0, OptimizerOptions(), task.engine)
        for local_shard in engine.state.local_shards():
            for kind in ("exp_avg", "exp_avg_sq"):
                local_shard.values[kind].uniform_(0, 1e-3)
        ours, theirs = Path(path, "ours"), Path(path, "theirs")
        # As large as in a run: the model may have positions for much longer sequences.
        grid = (min(16, task.model.rows), min(16, task.model.columns))
        batch = reference_batch(task.vocabulary, grid, min(64, task.model.text_positions - SPECIALS_PER_SEQUENCE))
        answer = ReferenceOutputs(batch, engine.reference_outputs(batch), task.engine.dtype).content()
        ranks, background = RankGroup.of_world(600), Background(RankGroup.of_world(600))

        def content(copied: bool) -> Content:
            state = engine.state
            shards = collect_shards(state.local_shards(), written=True)
            return Content(staged(shards) if copied else shards, _record(task, state.updates), {REFERENCE_NAME: answer})

        def save_in_background() -> None:
            copy = content(copied=True)
            background.begin(lambda: save_checkpoint(ours, copy, ranks))

        def read() -> None:
            latest = folder.latest(ours)
            assert latest is not None
            assert damage(latest, ranks) == ""
            load_checkpoint(latest, engine.state, ranks)

        def save_theirs() -> None:
            engine.zero.save_checkpoint(str(theirs), tag=TAG)

        def read_theirs() -> None:
            loaded, _ = engine.zero.load_checkpoint(str(theirs), tag=TAG)
            assert loaded is not None, "DeepSpeed loaded nothing"

        def flush() -> None:
            save_theirs()
            barrier()
            for file in sorted(theirs.rglob("*"))[rank::world]:
                if file.is_file():
                    fsync(file)

        todo: list[tuple[str, str, Callable[[], object], Path]] = [
            ("save", OURS, lambda: save_checkpoint(ours, content(copied=False), ranks), ours),
            ("save", THEIRS, save_theirs, theirs),
            ("save", FLUSHED, flush, theirs),
            ("save", BACKGROUND, save_in_background, ours),
            ("load", OURS, read, ours),
            ("load", THEIRS, read_theirs, theirs),
        ]
        for _ in range(rounds):
            for what, way, act, files in todo:
                if what == "save" and rank == 0:
                    shutil.rmtree(files, ignore_errors=True)
                    # The disk is idle when the clock starts.
                    os.sync()
                barrier()
                seconds, memory = _measure(act)
                background.wait()
                # All other results are the same on all ranks.
                worst = torch.tensor([seconds, memory], dtype=torch.float64)
                dist.all_reduce(worst, dist.ReduceOp.MAX, group=ranks.group)
                if rank == 0:
                    written = sum(file.stat().st_size for file in files.rglob("*") if file.is_file())
                    queue.put((what, way, float(worst[0]), int(worst[1]), written))
        groups.stop_layout()
        groups.stop()


def _convert(_: RankInfo, way: str, task: CheckpointWorkload, path: str, queue: Any) -> None:
    """Body of the single process that converts a checkpoint once."""
    os.environ["TQDM_DISABLE"] = "1"
    with libraries.quiet_imports():
        from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

        from gptface_dist.release.convert import ConvertOptions, convert

        out = Path(path, "release")
        shutil.rmtree(out, ignore_errors=True)
        if way == OURS:
            options = ConvertOptions(dtype="float32", tokenizers=task.tokenizers)
            seconds, memory = _measure(lambda: convert(Path(path, "ours"), out, options))
        else:
            theirs = str(Path(path, "theirs"))
            seconds, memory = _measure(lambda: convert_zero_checkpoint_to_fp32_state_dict(theirs, str(out), tag=TAG))
        queue.put(("convert", way, seconds, memory, sum(file.stat().st_size for file in out.rglob("*") if file.is_file())))


def _record(task: CheckpointWorkload, updates: int) -> RunRecord:
    data = DataConfig(tokenizers=str(task.tokenizers), sources=[])
    config = asdict(Config(data=data, model=task.model, layout=task.layout, engine=task.engine))
    return RunRecord(1, updates, {"step": 1, "samples": 0, "tokens": 0, "seconds": 0.0}, config, asdict(task.vocabulary))


def _measure(act: Callable[[], object]) -> tuple[float, int]:
    """Seconds of ``act``, and its peak resident memory beyond that at the start, in bytes."""
    gc.collect()
    # Linux: reset the peak resident memory.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    began = time.perf_counter()
    act()
    seconds = time.perf_counter() - began
    return seconds, _status("VmHWM") - before


def _status(name: str) -> int:
    """The value of one line of ``/proc/self/status``, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
