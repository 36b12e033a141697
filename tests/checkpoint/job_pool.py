"""Training jobs of any world size in processes that are spawned once: each job takes the first of them."""

import errno
import json
import multiprocessing
import os
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed import distributed_c10d

from gptface_dist.checkpoint.folder import name_of
from gptface_dist.checkpoint.load import damage, load_checkpoint
from gptface_dist.checkpoint.manifest import Manifest
from gptface_dist.checkpoint.record import RunRecord
from gptface_dist.checkpoint.save import Content, save_checkpoint
from gptface_dist.checkpoint.storage import HashedFile
from gptface_dist.checkpoint.tensor_shards import collect_shards
from gptface_dist.distributed.collectives import Failed, RankGroup
from gptface_dist.distributed.rank import RankInfo
from gptface_dist.distributed.spawn import spawn
from gptface_dist.engine import parity_case
from gptface_dist.engine.parity_case import MODEL, VOCABULARY, Case
from gptface_dist.errors import UserError
from gptface_dist.model.options import ModelOptions
from gptface_dist.model.reference_batch import reference_batch
from gptface_dist.objectives.milm_itm import MilmItm
from gptface_dist.objectives.reference_outputs import REFERENCE_NAME, ReferenceOutputs
from gptface_dist.objectives.registry import ObjectiveOptions
from gptface_dist.parallel import libraries
from gptface_dist.parallel.layout import Layout
from gptface_dist.parallel.options import EngineOptions, OptimizerOptions

DECAY = 0.9
TOGETHER = 20
REFERENCE = reference_batch(VOCABULARY, parity_case.GRID, 20, 2)


@dataclass(frozen=True)
class Job:
    """Train some steps on a layout and save."""

    layout: Layout
    """The layout."""
    out: str
    """Its ``checkpoints`` folder."""
    first: int = 0
    """Steps done before."""
    saves: tuple[int, ...] = (10,)
    """Steps at which it is saved; the last ends the job."""
    start: str = ""
    """Another job's ``checkpoints``, to go on from its checkpoint of step ``first``."""
    model: ModelOptions = MODEL
    """What is trained."""
    dtype: str = "float32"
    """Of weights in the forward pass."""
    ema: bool = False
    """Whether a running average is kept."""
    full: int = -1
    """Rank whose disk is full at the first attempt of each save."""
    poisoned: str = ""
    """Kind of the last rank's state (``weights``, ``exp_avg``, ..) that is not finite at the first attempt of each save."""


def record(job: Job, step: int, updates: int) -> RunRecord:
    """What is saved beside the tensors."""
    return RunRecord(
        step, updates, {"step": step}, {"model": asdict(job.model), "objective": asdict(ObjectiveOptions())}, asdict(VOCABULARY)
    )


def run(job: Job) -> list[float]:
    """One job on this rank, whose world exists. Returns the losses."""
    from megatron.core import parallel_state

    from gptface_dist.engine.engine import Engine

    # Another seed: what is not loaded is wrong.
    seed = 1 if job.start else 0
    optimizer = OptimizerOptions(eps=1e-4)
    engine = Engine(MilmItm(), job.model, VOCABULARY, job.layout, seed, optimizer, EngineOptions(job.dtype))
    state, ranks = engine.state, RankGroup.of_world(300)
    if job.ema:
        state.begin_ema()
    if job.start:
        source = Path(job.start, name_of(job.first))
        assert damage(source, ranks) == ""
        assert load_checkpoint(source, state, ranks).step == job.first
    rank, losses = parallel_state.get_data_parallel_rank(), []
    case = Case(job.layout, model=job.model, micro_batches=2)
    each = case.micro_batches // job.layout.dp
    for step in range(job.first, job.saves[-1] + 1):
        if step in job.saves:
            _save(job, step, engine, state, ranks)
        if step < job.saves[-1]:
            losses.append(engine.step(parity_case.batches(case, step)[rank * each : (rank + 1) * each]).loss)
            if job.ema:
                state.update_ema(DECAY)
    engine.close()
    return losses


def _save(job: Job, step: int, engine: Any, state: Any, ranks: RankGroup) -> None:
    # A bucket of a few rows: every kind of piece.
    pieces = collect_shards(state.local_shards(), written=True, bucket=100)
    outputs = ReferenceOutputs(REFERENCE, engine.reference_outputs(REFERENCE), job.dtype).content()
    content = Content(pieces, record(job, step, state.updates), {REFERENCE_NAME: outputs})
    if job.poisoned:
        shard = next(iter(state.local_shards())).values[job.poisoned] if ranks.rank == ranks.size - 1 else torch.zeros(1)
        first = shard[0].item()
        shard[0] = torch.inf
        with pytest.raises(UserError, match=f"the update made 1 values of {job.poisoned}/.* NaN or infinite"):
            save_checkpoint(Path(job.out), content, ranks)
        shard[0] = first
        assert not any(ranks.all_gather(Path(job.out).exists))
    if job.full >= 0:
        write = HashedFile.write
        if ranks.rank == job.full:
            HashedFile.write = _full  # type: ignore[method-assign]
        with pytest.raises(Failed, match=f"^rank {job.full}: No space left on device$"):
            save_checkpoint(Path(job.out), content, ranks)
        HashedFile.write = write  # type: ignore[method-assign]
        # On every rank at once: none goes on before rank 0 has cleared it away, nor begins anew before all have looked.
        assert not any(ranks.all_gather(lambda: any(Path(job.out).iterdir())))
    save_checkpoint(Path(job.out), content, ranks)


def _no_pickles(*_: Any, **__: Any) -> Any:
    raise AssertionError("a pickled object is sent to other ranks, or read from them")


def _full(file: HashedFile, data: memoryview) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def work(rank_info: RankInfo, jobs: list[Job], folder: str, turn: Any) -> None:
    """One spawned process. ``turn`` is a barrier: who has no part in a job waits without taking time from the others."""
    rank = rank_info.rank
    with libraries.quiet_imports():
        libraries.import_libraries()
        from gptface_dist.parallel import groups

        # Every collective of objects makes one of the other.
        distributed_c10d._object_to_tensor = distributed_c10d._tensor_to_object = _no_pickles
        store: Any = dist.TCPStore(rank_info.address, rank_info.port)
        for number, job in enumerate(jobs):
            turn.wait()
            if rank >= job.layout.world:
                continue
            began = time.perf_counter()
            groups.join(replace(rank_info, world=job.layout.world), dist.PrefixStore(str(number), store), 300)
            groups.start(job.layout, 0, 300)
            losses = run(job)
            groups.stop_layout()
            groups.stop()
            if rank == 0:
                done = {"job": job.out, "losses": losses, "seconds": time.perf_counter() - began}
                with Path(folder, "done.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(done) + "\n")


def train(jobs: list[Job], folder: Path) -> None:
    """Run all jobs, in order, a few in the same processes: ZeRO-3 leaves threads behind, and starting them takes long.

    What they found is in their checkpoints.
    """
    for some in together(jobs):
        processes = max(job.layout.world for job in some)
        turn = multiprocessing.get_context("spawn").Barrier(processes)
        spawn(work, processes, some, str(folder), turn)


def together(jobs: list[Job]) -> list[list[Job]]:
    """The jobs in order, cut where their worlds grow beyond two processes or shrink to that, and after TOGETHER of them."""
    found: list[list[Job]] = []
    for job in jobs:
        last = found[-1] if found else []
        if last and len(last) < TOGETHER and (last[-1].layout.world > 2) == (job.layout.world > 2):
            last.append(job)
        else:
            found.append([job])
    return found


def tensors(checkpoints: Path, step: int) -> dict[str, Tensor]:
    """All tensors of a checkpoint, read by torch's own reader."""
    folder = checkpoints / name_of(step)
    found = {key: torch.full(entry.shape, torch.nan) for key, entry in Manifest.read(folder).tensors.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(found, checkpoint_id=folder / "state", no_dist=True)
    return found
