"""Reader of whole gradients from an engine that shards them."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from megatron.core import parallel_state as groups
from torch import Tensor, nn

from gptface_dist.engine.engine import Engine, StepResult
from gptface_dist.model.parameters import ParameterSpec


class GradientReader:
    """Reads the last step's gradients of this rank's (tensor-parallel shards of) parameters, before clipping.

    Pass :meth:`before_update` to ``Engine.step``. ZeRO-1 and -2 complete gradients only just before the optimizer's step: there
    a pre-step hook reads them and undoes the clipping.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._gradients: dict[nn.Parameter, Tensor] = {}
        if engine.layout.zero in (1, 2):
            engine.zero.optimizer.optimizer.register_step_pre_hook(self._read_flat)

    def gradients(self) -> Iterator[tuple[ParameterSpec, Tensor]]:
        """Table entry and float32 gradient of each of this rank's parameters."""
        for entry, parameter in self._engine.named_parameters():
            yield entry, self._gradients[parameter]

    def before_update(self, _: StepResult) -> float:
        """Read the gradients; returns 1, which leaves the update as it is."""
        if self._engine.layout.zero == 3:
            for _entry, parameter in self._engine.named_parameters():
                self._gradients[parameter] = safe_get_full_grad(parameter).float().clone()
        elif self._engine.layout.zero == 0:
            self._gradients = {parameter: gradient.clone() for parameter, gradient in self._engine.zero.gradients.items()}
        return 1.0

    def _read_flat(self, adam: Any, *_: Any) -> None:
        zero, group = self._engine.zero.optimizer, groups.get_data_parallel_group()
        norm = float(zero._global_grad_norm)
        unclip = max(1.0, norm / self._engine.max_grad_norm) if self._engine.max_grad_norm > 0 else 1.0
        for number, flat in enumerate(zero.single_partition_of_fp32_groups):
            if not any(flat is updated for group in adam.param_groups for updated in group["params"]):
                continue
            parts = [torch.empty_like(flat.grad) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, flat.grad.contiguous(), group=group)
            whole, start = torch.cat(parts) * unclip, 0
            for parameter in zero.round_robin_bit16_groups[number]:
                self._gradients[parameter] = whole[start : start + parameter.numel()].view(parameter.shape).clone()
                start += parameter.numel()
