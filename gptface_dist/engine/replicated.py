"""Data parallelism without ZeRO: every replica keeps the whole optimizer state, and gradients are added once a step.

DeepSpeed's engine refuses the pipeline's own backward passes at stage 0, so this stands in for it, with the part of its
interface that :class:`gptface_dist.engine.engine.Engine` uses.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as groups
from torch import Tensor, nn

BUCKET = 2**25
"""Gradients are added over replicas this many at a time (128 MiB), but for a parameter that is larger."""


class Replicated:
    """A module whose gradients are collected in float32 over a step's micro-batches, and its optimizer.

    A parameter with ``model_parallel`` set counts in the gradient norm on this rank; one without counts elsewhere.

    Args:
        module: called as this object is called.
        optimizer: AdamW of all of the module's parameters; it is given their float32 weights in their place.
        clip: largest norm of the whole gradient; 0 does not clip.
        bucket: largest number of gradients added over replicas at a time.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, clip: float, bucket: int = BUCKET):
        self.module, self.max_grad_norm = module, clip
        self.decide: Callable[[Tensor], float] = lambda norm: 1.0
        """From the gradient's norm (float64 scalar, on the device), the factor of the clipped gradient; 0 skips the update."""
        self.masters: dict[nn.Parameter, Tensor] = {}
        """Parameter -> the float32 weights that the optimizer updates: the parameter itself where it is float32."""
        self.gradients: dict[nn.Parameter, Tensor] = {}
        """Parameter -> its gradient, a float32 view of a bucket."""
        self.buckets: list[Tensor] = []
        self._hooks: list[Any] = []
        for parameter in module.parameters():
            exact = parameter.dtype == torch.float32
            self.masters[parameter] = parameter if exact else parameter.detach().float()
            self._hooks.append(parameter.register_post_accumulate_grad_hook(self._collect))
        self._make_buckets(bucket)
        self.optimizer = optimizer
        for group in optimizer.param_groups:
            group["params"] = [self.masters[p] for p in group["params"]]

    def __call__(self, *inputs: Any) -> Any:
        """The module's forward pass."""
        return self.module(*inputs)

    def train(self, mode: bool = True) -> None:
        """As of a module."""
        self.module.train(mode)

    def step(self) -> None:
        """Add the gradients of all replicas, ask ``decide``, clip, update, and forget the gradients."""
        group = groups.get_data_parallel_group()
        for bucket in self.buckets:
            # Before the sum, as DeepSpeed does: a mean cannot overflow where its parts did not.
            dist.all_reduce(bucket.div_(dist.get_world_size(group)), group=group)
        norm = self._global_norm()
        factor = self.decide(norm)
        if factor:
            self._update(norm, factor)
        for bucket in self.buckets:
            bucket.zero_()

    def _update(self, norm: Tensor, factor: float) -> None:
        # On the device: to ask it whether anything is to be clipped would keep the optimizer waiting.
        clip = (
            torch.where(norm > self.max_grad_norm, self.max_grad_norm / (norm + 1e-6), 1.0) if self.max_grad_norm > 0 else 1.0
        )
        if self.max_grad_norm > 0 or factor != 1:
            for bucket in self.buckets:
                bucket.mul_(clip * factor)
        for parameter, master in self.masters.items():
            master.grad = self.gradients[parameter]
        self.optimizer.step()
        for master in self.masters.values():
            master.grad = None
        self.write_weights()

    def destroy(self) -> None:
        """Take the hooks away, by which the parameters keep this object."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def write_weights(self) -> None:
        """Round the float32 weights into the module's."""
        for parameter, master in self.masters.items():
            if master is not parameter:
                parameter.copy_(master)

    def _make_buckets(self, limit: int) -> None:
        for members in _filled(self.masters, limit):
            self.buckets.append(torch.zeros(sum(p.numel() for p in members), device=members[0].device))
            parts = self.buckets[-1].split([p.numel() for p in members])
            self.gradients |= {p: part.view(p.shape) for p, part in zip(members, parts, strict=True)}

    def _collect(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        assert parameter.grad is not None
        self.gradients[parameter] += parameter.grad
        parameter.grad = None

    def _global_norm(self) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.buckets[0].device)
        for parameter, gradient in self.gradients.items():
            if parameter.model_parallel:  # type: ignore[attr-defined]
                total += torch.linalg.vector_norm(gradient).double().square()
        dist.all_reduce(total, group=groups.get_model_parallel_group())
        return total.sqrt()


def _filled(parameters: Iterable[nn.Parameter], limit: int) -> list[list[nn.Parameter]]:
    """The parameters in order, as many at a time as have at most ``limit`` values; at least one."""
    found: list[list[nn.Parameter]] = []
    size = 0
    for parameter in parameters:
        size += parameter.numel()
        if not found or size > limit:
            found.append([])
            size = parameter.numel()
        found[-1].append(parameter)
    return found
