"""Ending the process groups of this process."""

import time

import torch.distributed as dist

SETTLE_S = 0.2
"""A thread that is ready to run does so well within this time, on a busy machine too."""


def shutdown() -> None:
    """Destroy this process's groups, so that the process itself may end.

    A gloo thread frees a collective's tensors a moment after the collective returns, and needs the interpreter for that; if the
    interpreter is ending, the process aborts (torch 2.13, pytorch/pytorch#179291). Destroying a group joins its threads only if
    nothing else refers to the group, and engines do; torch has no other call to wait with.
    """
    dist.destroy_process_group()
    time.sleep(SETTLE_S)
