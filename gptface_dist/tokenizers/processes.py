"""The data-parallel processes of an image tokenizer's training: one, or as many as torchrun started."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from gptface_dist import host
from gptface_dist.distributed import rendezvous
from gptface_dist.distributed.collectives import barrier
from gptface_dist.distributed.rank import RankInfo
from gptface_dist.distributed.shutdown import shutdown
from gptface_dist.errors import UserError

TIMEOUT_S = 1800.0
"""Time limit of the rendezvous and of each collective."""


@dataclass(frozen=True)
class Processes:
    """This process among the processes that train together."""

    rank: int
    """Rank of this process; rank 0 writes the files."""
    count: int
    """Number of processes."""
    device: torch.device
    """Device of this process."""

    def share(self, batch: int) -> int:
        """Pictures of each process in a global batch; :class:`UserError` where it does not divide."""
        if batch % self.count:
            raise UserError(f"a batch of {batch} pictures does not divide among {self.count} processes: choose a multiple")
        return batch // self.count

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum the tensor over processes, in place, and return it."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """Average the tensor over processes, in place, and return it."""
        return self.sum(tensor).div_(self.count)

    def wait(self) -> None:
        """Wait until all processes have called it."""
        if self.count > 1:
            barrier()


@contextmanager
def processes() -> Iterator[Processes]:
    """Join the process group of torchrun's environment (NCCL on GPUs, else gloo); without one, this process alone."""
    rank_info = RankInfo.from_env()
    device = host.set_device(rank_info.local_rank)
    if rank_info.world == 1:
        yield Processes(0, 1, device)
        return
    rendezvous.join(rank_info, rendezvous.connect(rank_info, TIMEOUT_S), TIMEOUT_S)
    try:
        host.refuse_shared_gpu(distributed_c10d._get_default_store(), rank_info.rank)
        yield Processes(rank_info.rank, rank_info.world, device)
    finally:
        shutdown()
