"""Benchmark of an optimizer step, as ratios to DeepSpeed's own pipeline and to plain PyTorch in the same run.

All systems start from the same weights, read the same micro-batches and update with the same AdamW. Their losses are compared
before anything is timed, so that all timings are of the same work.
"""

import gc
import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptface_dist import host
from gptface_dist.benchmarks.workload import Workload
from gptface_dist.differences import largest
from gptface_dist.distributed.collectives import barrier
from gptface_dist.distributed.rank import RankInfo
from gptface_dist.distributed.spawn import share_of_cores, spawn
from gptface_dist.errors import UserError
from gptface_dist.parallel import libraries
from gptface_dist.parallel.layout import Layout
from gptface_dist.parallel.options import OptimizerOptions
from gptface_dist.sequence import PaddedBatch

OURS, PIPELINE, PYTORCH = "gptface_dist", "DeepSpeed PipelineModule", "PyTorch DDP"
WARM_UP = 2
"""Steps before the clock starts: the first one allocates optimizer state, and ZeRO-3 records the order of parameters."""
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-3}
"""Largest relative difference of losses between systems that do the same work; in bfloat16 they round at different places."""
TIMEOUT_S = 300.0
"""Timeout of collectives, in seconds."""

Step = Callable[[list[PaddedBatch[Tensor]]], float]


@dataclass(frozen=True)
class System:
    """A system with a parallel layout."""

    system: str
    """Name of the system: :data:`OURS`, :data:`PIPELINE` or :data:`PYTORCH`."""
    layout: Layout
    """Parallel layout, over all processes."""

    def __str__(self) -> str:
        axes = [f"PP{self.layout.pp}"] * (self.layout.pp > 1) + [f"DP{self.layout.dp}"] * (self.layout.dp > 1)
        zero = [f"ZeRO-{self.layout.zero}"] * (self.layout.zero > 0)
        return " ".join([self.system, *axes, *zero])


@dataclass(frozen=True)
class Timing:
    """Step times of one system."""

    way: str
    """``str`` of the system."""
    seconds: list[float]
    """Seconds a step, of each round."""
    baseline: str
    """``str`` of the system's baseline; a baseline is its own."""
    ratios: list[float]
    """The baseline's seconds divided by the system's, of each round: above 1 is faster than the baseline."""


@dataclass(frozen=True)
class Comparison:
    """Losses and timings of all systems."""

    losses: dict[str, list[float]]
    """``str`` of a system -> losses of its warm-up steps, from the first step on."""
    timings: list[Timing]
    """Empty where the losses differ."""

    @property
    def difference(self) -> float:
        """Largest relative difference of a step's losses between two systems."""
        return difference(self.losses)


def systems(processes: int) -> dict[System, System]:
    """Systems to time on ``processes`` processes -> their baselines; baselines come first.

    On one process plain PyTorch is the only baseline; a larger number must be even, for two pipeline stages.
    """
    alone = Layout(dp=processes, zero=0)
    pytorch = System(PYTORCH if processes > 1 else "PyTorch", alone)
    replicas = [System(OURS, Layout(dp=processes, zero=zero)) for zero in (0, 1)]
    if processes == 1:
        return dict.fromkeys((pytorch, *replicas), pytorch)
    if processes % 2:
        raise UserError(f"two pipeline stages need an even number of processes, got {processes}")
    stages = {zero: Layout(dp=processes // 2, pp=2, zero=zero) for zero in (1, 3)}
    pipeline = System(PIPELINE, stages[1])
    staged = [System(OURS, layout) for layout in stages.values()]
    return dict.fromkeys((pipeline, *staged), pipeline) | dict.fromkeys((pytorch, *replicas), pytorch)


def difference(losses: dict[str, list[float]]) -> float:
    """Largest relative difference of a step's losses between two systems; NaN where one is."""
    return largest(
        abs(a - b) / max(abs(a), abs(b), 1e-30)
        for first, second in itertools.combinations(losses.values(), 2)
        for a, b in zip(first, second, strict=True)
    )


def agree(losses: dict[str, list[float]], dtype: str) -> bool:
    """Whether the losses of all systems agree within the tolerance of ``dtype``."""
    return difference(losses) <= TOLERANCE[dtype]


def timings(seconds: dict[System, list[float]], plan: dict[System, System]) -> list[Timing]:
    """Step times with their ratios to the baselines of ``plan``."""
    timed = []
    for way, baseline in plan.items():
        ratios = [b / own for b, own in zip(seconds[baseline], seconds[way], strict=True)]
        timed.append(Timing(str(way), seconds[way], str(baseline), ratios))
    return timed


def compare(work: Workload, processes: int, rounds: int, steps: int, progress: Callable[[str], None]) -> Comparison:
    """Spawn the processes on this machine, compare the losses of all systems, and time each in turn, ``rounds`` times.

    In every round each system is built anew, does the warm-up and then ``steps`` timed steps. ``progress`` is called before
    each with a description, :func:`parts` times in all. :class:`UserError` where the work cannot be divided.
    """
    plan = systems(processes)
    for way in plan:
        if work.micro_batches % way.layout.dp:
            raise UserError(f"{work.micro_batches} micro-batches cannot be divided among {way.layout.dp} replicas")
        way.layout.check(processes, work.model, work.micro_batches // way.layout.dp)
        if work.model.layers % way.layout.pp:
            raise UserError(
                f"{work.model.layers} layers cannot be divided evenly among {way.layout.pp} stages, and systems differ in how "
                "they divide unevenly: compare them on a model with more or fewer"
            )
    host.check_gpus(processes)
    messages = multiprocessing.get_context("spawn").SimpleQueue()
    losses: dict[str, list[float]] = {}
    seconds: dict[System, list[float]] = {way: [] for way in plan}

    def drain() -> None:
        while not messages.empty():
            kind, way, value = messages.get()
            if kind == "next":
                progress(value)
            elif kind == "losses":
                losses[str(way)] = value
            else:
                seconds[way].append(value)

    spawn(_work, processes, work, rounds, steps, messages, threads=share_of_cores(processes), poll=drain)
    return Comparison(losses, timings(seconds, plan) if agree(losses, work.engine.dtype) else [])


def parts(processes: int, rounds: int) -> int:
    """Number of calls of ``progress`` in :func:`compare`."""
    return len(systems(processes)) * (rounds + 1)


def machine(processes: int) -> str:
    """Hardware, versions, processes and threads, for the head of a table."""
    used = f"processes x CPU threads {processes} x {share_of_cores(processes)}"
    return f"{host.hardware('torch', 'deepspeed', 'megatron-core')}; {used}, {host.backend()}"


def _work(rank_info: RankInfo, work: Workload, rounds: int, steps: int, messages: Any) -> None:
    """Body of one spawned process; rank 0 reports losses and seconds."""

    def send(kind: str, way: System, value: Any) -> None:
        if rank_info.rank == 0:
            messages.put((kind, way, value))

    # DeepSpeed's pipeline prints its partition each time it is built.
    with libraries.quiet_imports():
        libraries.import_libraries()
        from gptface_dist.parallel import groups

        groups.join(rank_info, None, TIMEOUT_S)
        batches = [work.batches(step, host.device()) for step in range(WARM_UP + steps)]
        losses: dict[str, list[float]] = {}
        for turn in range(rounds + 1):
            for way in systems(rank_info.world):
                send("next", way, f"{way}: {f'round {turn}' if turn else 'losses'}")
                each = work.micro_batches // way.layout.dp
                # In all three systems consecutive ranks are the replicas of one stage.
                replica = rank_info.rank % way.layout.dp
                local = [micro[replica * each : (replica + 1) * each] for micro in batches]
                with _built(way, work) as step:
                    warm_up = [step(micro) for micro in local[:WARM_UP]]
                    if turn:
                        send("seconds", way, _seconds(step, local[WARM_UP:]))
                    else:
                        losses[str(way)] = warm_up
                        send("losses", way, warm_up)
                gc.collect()
            # The same on every rank, so that all of them stop.
            if not agree(losses, work.engine.dtype):
                break
        groups.stop()


@contextmanager
def _built(way: System, work: Workload) -> Iterator[Step]:
    """Build a system with initial weights; yields the function that does one step."""
    from gptface_dist.benchmarks.baselines import DataParallel, Pipeline
    from gptface_dist.engine.engine import Engine
    from gptface_dist.parallel import groups

    optimizer = OptimizerOptions()
    if way.system == OURS:
        groups.start(way.layout, work.seed, TIMEOUT_S)
        engine = Engine(work.objective, work.model, work.vocabulary, way.layout, work.seed, optimizer, work.engine)
        yield lambda batches: engine.step(batches).loss
        # Also undoes ZeRO-3's patches of torch, so that the next system is not timed with them.
        groups.stop_layout()
    elif way.system == PIPELINE:
        groups.start_deepspeed(TIMEOUT_S)
        yield Pipeline(work, optimizer, way.layout.pp).step
    else:
        yield DataParallel(work, optimizer).step


def _seconds(step: Step, batches: list[list[PaddedBatch[Tensor]]]) -> float:
    """Mean seconds a step, from a barrier before the first one to a barrier after the last one."""
    barrier()
    began = time.perf_counter()
    for micro in batches:
        step(micro)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    barrier()
    return (time.perf_counter() - began) / len(batches)
