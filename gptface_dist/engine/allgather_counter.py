"""Counter of the bytes that ZeRO-3 all-gathers."""

from typing import Any

import deepspeed.comm
from deepspeed.runtime.zero import partition_parameters
from torch import Tensor


class AllGatherCounter:
    """Counts the bytes of weights that ZeRO-3 all-gathers on this rank since construction.

    It wraps the collectives of DeepSpeed's partitioned parameters. The count includes the rank's own shard, one of ``dp``,
    which is not communicated.
    """

    def __init__(self) -> None:
        self.bytes = 0
        partition_parameters.dist = self

    def __getattr__(self, name: str) -> Any:
        return getattr(deepspeed.comm, name)

    def allgather_fn(self, output: Tensor, *inputs: Any, **options: Any) -> Any:
        """DeepSpeed's collective, with its output counted."""
        return self._counted(deepspeed.comm.allgather_fn, [output], output, *inputs, **options)

    def all_gather_into_tensor(self, output: Tensor, *inputs: Any, **options: Any) -> Any:
        """DeepSpeed's collective, with its output counted."""
        return self._counted(deepspeed.comm.all_gather_into_tensor, [output], output, *inputs, **options)

    def all_gather(self, outputs: list[Tensor], *inputs: Any, **options: Any) -> Any:
        """DeepSpeed's collective, with its output counted."""
        return self._counted(deepspeed.comm.all_gather, outputs, outputs, *inputs, **options)

    def _counted(self, collective: Any, gathered: list[Tensor], *inputs: Any, **options: Any) -> Any:
        self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in gathered)
        return collective(*inputs, **options)
