"""Saving in the background: a copy in host memory, written by a thread while training goes on."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from gptface_dist import host
from gptface_dist.checkpoint.tensor_shards import TensorChunk, TensorShards
from gptface_dist.distributed.collectives import RankGroup


def staged(pieces: Mapping[str, TensorShards]) -> dict[str, TensorShards]:
    """A copy in host memory, which training does not change."""
    found = {}
    for key, one in pieces.items():
        copies = [TensorChunk(piece.box, torch.empty(piece.box.sizes).copy_(piece.memory)) for piece in one.pieces]
        found[key] = TensorShards(one.shape, copies)
    return found


@dataclass
class _Outcome:
    """What became of the work."""

    error: Exception | None = None
    finished: threading.Event = field(default_factory=threading.Event)


class Background:
    """At most one piece of work at a time, in a thread; all ranks begin it and ask for it together.

    The work communicates over a group of its own. ``ranks`` are for asking whether it is done.
    """

    def __init__(self, ranks: RankGroup):
        self._ranks = ranks
        self._outcome: _Outcome | None = None

    @property
    def busy(self) -> bool:
        """Whether work was begun whose outcome was not asked for; the same on every rank."""
        return self._outcome is not None

    def begin(self, work: Callable[[], object]) -> None:
        """Work in the background. What was begun before must have been waited for."""
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

        # A daemon: a process that ends badly does not wait for it.
        threading.Thread(target=run, daemon=True, name="checkpoint").start()

    def done(self) -> bool:
        """Whether rank 0 is done: then the others are about to be. All ranks ask, and get the same answer."""
        if self._outcome is None:
            return True
        flag = torch.tensor(self._outcome.finished.is_set(), dtype=torch.uint8)
        if self._ranks.group is not None:
            dist.broadcast(flag, dist.get_global_rank(self._ranks.group, 0), group=self._ranks.group)
        return bool(flag)

    def wait(self) -> None:
        """Until it is done; raises what the work raised."""
        outcome, self._outcome = self._outcome, None
        if outcome is None:
            return
        outcome.finished.wait()
        if outcome.error is not None:
            raise outcome.error
