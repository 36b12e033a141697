"""Saving in the background: a thread writes a copy in host memory while training continues."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from gptface_dist import host
from gptface_dist.checkpoint.tensor_shards import TensorChunk, TensorShards
from gptface_dist.distributed.collectives import RankGroup


def staged(shards: Mapping[str, TensorShards]) -> dict[str, TensorShards]:
    """Copy this rank's chunks to host memory, out of reach of further training steps."""
    copies = {}
    for key, tensor in shards.items():
        chunks = [TensorChunk(chunk.box, torch.empty(chunk.box.sizes).copy_(chunk.memory)) for chunk in tensor.pieces]
        copies[key] = TensorShards(tensor.shape, chunks)
    return copies


@dataclass
class _Outcome:
    """Completion and error of a background job."""

    error: Exception | None = None
    finished: threading.Event = field(default_factory=threading.Event)


class Background:
    """Runs at most one job at a time in a thread; all ranks call its methods together.

    The job must communicate over a group of its own: ``ranks`` is the group of :meth:`done`, on the main thread.
    """

    def __init__(self, ranks: RankGroup):
        self._ranks = ranks
        self._outcome: _Outcome | None = None

    @property
    def busy(self) -> bool:
        """Whether a job was begun without a :meth:`wait` since; the same on every rank."""
        return self._outcome is not None

    def begin(self, work: Callable[[], object]) -> None:
        """Start a job in a thread, after :meth:`wait` for the previous one."""
        assert self._outcome is None
        self._outcome = outcome = _Outcome()
        device = host.device()

        def run() -> None:
            try:
                if device.type == "cuda":
                    # A thread begins with the first GPU, which is another rank's.
                    torch.cuda.set_device(device)
                work()
            except Exception as error:
                outcome.error = error
            finally:
                outcome.finished.set()

        # A daemon: a failing process exits without waiting for it.
        threading.Thread(target=run, daemon=True, name="checkpoint").start()

    def done(self) -> bool:
        """Whether rank 0's job is finished, the same answer on every rank; other ranks may need a moment more. Collective."""
        if self._outcome is None:
            return True
        flag = torch.tensor(self._outcome.finished.is_set(), dtype=torch.uint8)
        if self._ranks.group is not None:
            dist.broadcast(flag, dist.get_global_rank(self._ranks.group, 0), group=self._ranks.group)
        return bool(flag)

    def wait(self) -> None:
        """Block until the job ends, and raise its exception if it failed. Returns at once without a job."""
        outcome, self._outcome = self._outcome, None
        if outcome is None:
            return
        outcome.finished.wait()
        if outcome.error is not None:
            raise outcome.error
