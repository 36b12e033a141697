"""Training jobs of any world size in processes that are spawned once: each job takes the first of them."""

import contextlib
import json
import os
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from gptface_dist.checkpoint.folder import name_of
from gptface_dist.checkpoint.manifest import Manifest
from gptface_dist.checkpoint.record import RunRecord
from gptface_dist.engine import parity
from gptface_dist.engine.options import EngineOptions, LossWeights, OptimizerOptions
from gptface_dist.engine.parity import MODEL, VOCABULARY, Case
from gptface_dist.layout import Layout
from gptface_dist.model.options import ModelOptions
from gptface_dist.place import Place
from gptface_dist.release.probe import PROBE_NAME, Probe, probe_batch

DECAY = 0.9
PROBE = probe_batch(VOCABULARY, parity.GRID, 20, 2)


@dataclass(frozen=True)
class Job:
    """Train some steps and save."""

    layout: Layout
    """On this layout."""
    out: str
    """Its ``checkpoints`` folder."""
    first: int = 0
    """Steps done before."""
    steps: int = 10
    """Steps to do; there is a checkpoint after them."""
    start: str = ""
    """Folder of the checkpoint to go on from."""
    model: ModelOptions = MODEL
    """What is trained."""
    dtype: str = "float32"
    """Of weights in the forward pass."""
    average: bool = False
    """Whether a running average is kept."""


def record(job: Job, step: int, updates: int) -> RunRecord:
    """What is saved beside the tensors."""
    return RunRecord(step, updates, {"step": step}, {"model": asdict(job.model)}, asdict(VOCABULARY))


def run(job: Job) -> list[float]:
    """One job on this rank, whose world exists. Returns the losses."""
    from megatron.core import parallel_state

    from gptface_dist.checkpoint.load import damage, load
    from gptface_dist.checkpoint.pieces import collect
    from gptface_dist.checkpoint.save import Content, save
    from gptface_dist.checkpoint.together import Ranks
    from gptface_dist.engine import probe
    from gptface_dist.engine.engine import Engine
    from gptface_dist.engine.state import EngineState

    # A seed of its own: what is not loaded is wrong.
    seed = 0 if not job.start else 1
    engine = Engine(
        job.model, VOCABULARY, job.layout, seed, OptimizerOptions(eps=1e-4), LossWeights(), EngineOptions(job.dtype)
    )
    state, ranks = EngineState(engine, job.average), Ranks.of_world()
    if job.start:
        assert damage(Path(job.start), ranks) == ""
        assert load(Path(job.start), state, ranks).step == job.first
    rank, losses = parallel_state.get_data_parallel_rank(), []
    case = Case(job.layout, job.model, micro_batches=4)
    each = case.micro_batches // job.layout.dp
    for step in range(job.first, job.first + job.steps):
        losses.append(engine.step(parity.batches(case, step)[rank * each : (rank + 1) * each]).loss)
        if job.average:
            state.update_average(DECAY)
    done = job.first + job.steps
    # A bucket of a few rows: every kind of piece.
    pieces = collect(state.regions(), written=True, bucket=100)
    answer = Probe(PROBE, probe.run(engine, PROBE), job.dtype).content()
    save(Path(job.out), Content(pieces, record(job, done, state.updates), {PROBE_NAME: answer}), ranks)
    return losses


def work(rank: int, jobs: list[Job], folder: str) -> None:
    """One spawned process."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        from gptface_dist.engine import groups

        for number, job in enumerate(jobs):
            if rank >= job.layout.world:
                continue
            store: Any = dist.FileStore(f"{folder}/store{number}", job.layout.world)
            groups.join(Place(rank, job.layout.world, rank), store, 120)
            groups.start(job.layout, 0, 120)
            losses = run(job)
            if rank == 0:
                with Path(folder, "losses.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(losses) + "\n")
            groups.stop_layout()
            groups.stop()


def train(jobs: list[Job], folder: Path) -> list[list[float]]:
    """Run all jobs, in order, and return their losses."""
    processes = max(job.layout.world for job in jobs)
    start_processes(work, (jobs, str(folder)), nprocs=processes, start_method="spawn")
    return [json.loads(line) for line in Path(folder, "losses.jsonl").read_text().splitlines()]


def tensors(checkpoints: str, step: int) -> dict[str, Tensor]:
    """All tensors of a checkpoint, read by torch's own reader."""
    folder = Path(checkpoints, name_of(step))
    found = {key: torch.full(entry.shape, torch.nan) for key, entry in Manifest.read(folder).tensors.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(found, checkpoint_id=folder / "state", no_dist=True)
    return found
