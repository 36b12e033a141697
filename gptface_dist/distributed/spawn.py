"""Worker processes on this machine, spawned by this one."""

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.spawn import start_processes

from gptface_dist.distributed.rank import RankInfo
from gptface_dist.distributed.rendezvous import rendezvous_store

POLL_S = 0.1


def spawn(
    work: Callable[..., object], world: int, *arguments: Any, threads: int = 1, poll: Callable[[], object] | None = None
) -> None:  # fmt: skip
    """Run ``work(rank_info, *arguments)`` in ``world`` new processes, and wait for all of them.

    ``rank_info`` names a store that this process serves. Each worker has ``threads`` CPU threads and ignores warnings, which
    libraries would print ``world`` times. ``poll`` is called every :data:`POLL_S` while they run, and once afterwards, to drain
    a queue. An exception in a worker ends the others, and is raised here as torch's ``ProcessRaisedException``.
    """
    with rendezvous_store(world) as ranks:
        setup = (work, ranks, threads, arguments)
        workers = start_processes(_run, setup, nprocs=world, join=False, start_method="spawn")
        while not workers.join(timeout=POLL_S if poll else None):
            if poll:
                poll()
    if poll:
        poll()


def share_of_cores(processes: int) -> int:
    """CPU threads of each of so many processes: ``OMP_NUM_THREADS``, else an equal share of the cores."""
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, len(os.sched_getaffinity(0)) // processes))


def _run(rank: int, work: Callable[..., object], ranks: list[RankInfo], threads: int, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore")
    work(ranks[rank], *arguments)
