"""Reading whole gradients out of an engine that shards them."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from megatron.core import parallel_state as groups
from torch import Tensor, nn

from gptface_dist.engine.engine import Engine
from gptface_dist.model.parameters import Parameter


class GradientReader:
    """The gradients of the last step, before clipping, of this rank's (tensor-parallel shards of) parameters.

    ZeRO-3 has them after the backward pass. Other stages put them together only inside ``step``: there they are read when the
    optimizer is about to use them, and clipping is undone.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._kept: dict[nn.Parameter, Tensor] = {}
        if engine.layout.zero == 3:
            engine.before_update = self._read_sharded
        elif engine.layout.zero == 0:
            engine.engine.optimizer.register_step_pre_hook(self._read_replicated)
        else:
            engine.engine.optimizer.optimizer.register_step_pre_hook(self._read_flat)

    def gradients(self) -> Iterator[tuple[Parameter, Tensor]]:
        """Table entry and float32 gradient of every parameter."""
        for entry, parameter in self._engine.named_parameters():
            yield entry, self._kept[parameter]

    def _read_sharded(self) -> None:
        for _, parameter in self._engine.named_parameters():
            self._kept[parameter] = safe_get_full_grad(parameter).float().clone()

    def _unclip(self, norm: float) -> float:
        return max(1.0, norm / self._engine.clip) if self._engine.clip > 0 else 1.0

    def _read_replicated(self, *_: Any) -> None:
        unclip = self._unclip(float(self._engine.engine.get_global_grad_norm()))
        self._kept = {parameter: gradient * unclip for parameter, gradient in self._engine.engine.gradients.items()}

    def _read_flat(self, adam: Any, *_: Any) -> None:
        zero, group = self._engine.engine.optimizer, groups.get_data_parallel_group()
        unclip = self._unclip(float(zero._global_grad_norm))
        for number, flat in enumerate(zero.single_partition_of_fp32_groups):
            if not any(flat is kept for used in adam.param_groups for kept in used["params"]):
                continue
            parts = [torch.empty_like(flat.grad) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, flat.grad.contiguous(), group=group)
            whole, start = torch.cat(parts) * unclip, 0
            for parameter in zero.round_robin_bit16_groups[number]:
                self._kept[parameter] = whole[start : start + parameter.numel()].view(parameter.shape).clone()
                start += parameter.numel()
