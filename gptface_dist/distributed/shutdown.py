"""The processes' time together: waiting for each other, and its end."""

import time

import torch
import torch.distributed as dist

SETTLE_S = 0.2
"""A thread that is ready to run does so well within this time, on a busy machine too."""


def barrier() -> None:
    """Wait until every rank is here."""
    # Without a device NCCL guesses one by the rank's number.
    dist.barrier(device_ids=[torch.cuda.current_device()] if torch.cuda.is_available() else None)


def leave() -> None:
    """End this process's groups, so that the process itself may end.

    A thread of gloo lets go of a collective's tensors a moment after those who wait for it have gone on, and needs the
    interpreter for that. Should the interpreter be ending, the process aborts (torch 2.13, pytorch/pytorch#179291). Ending a
    group waits for its threads only where nothing else holds the group, and engines do; torch has no other call to wait with.
    """
    dist.destroy_process_group()
    time.sleep(SETTLE_S)
