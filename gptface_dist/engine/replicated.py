"""Data parallelism without ZeRO: every replica keeps the whole optimizer state; gradients are all-reduced once a step.

It replaces DeepSpeed's engine, which refuses the pipeline's backward passes at stage 0, and has the part of its interface that
:class:`gptface_dist.engine.engine.Engine` uses.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as groups
from torch import Tensor, nn

BUCKET = 2**25
"""Elements of an all-reduce of float32 gradients at most (128 MiB), or one parameter if that is larger."""


class Replicated:
    """A module with its optimizer; gradients accumulate in float32 over a step's micro-batches.

    Parameters with a true ``model_parallel`` count in the gradient norm on this rank, the others on another rank.

    Args:
        module: the module; calling this object calls it.
        optimizer: AdamW of all of the module's parameters, which are replaced by their float32 weights.
        clip: largest norm of the whole gradient; 0 does not clip.
        bucket: elements of an all-reduce at most, or one parameter.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, clip: float, bucket: int = BUCKET):
        self.module, self.max_grad_norm = module, clip
        self.decide: Callable[[Tensor], float] = lambda norm: 1.0
        """Maps the gradient norm (float64 scalar, on the device) to the factor of the clipped gradient; 0 skips the update."""
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
        """Set training or evaluation mode of the module."""
        self.module.train(mode)

    def step(self) -> None:
        """All-reduce the gradients, call ``decide``, clip, update, and zero the gradients."""
        group = groups.get_data_parallel_group()
        for bucket in self.buckets:
            # Divide before the sum, as DeepSpeed does: a mean of finite values cannot overflow.
            dist.all_reduce(bucket.div_(dist.get_world_size(group)), group=group)
        norm = self._global_norm()
        factor = self.decide(norm)
        if factor:
            self._update(norm, factor)
        for bucket in self.buckets:
            bucket.zero_()

    def _update(self, norm: Tensor, factor: float) -> None:
        # On the device: a branch on the host would wait for the norm.
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
        """Remove the gradient hooks, through which the parameters keep this object alive."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def write_weights(self) -> None:
        """Round the float32 master weights into the module's weights."""
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
    """Split parameters, in order, into buckets of at most ``limit`` values or of one parameter."""
    buckets: list[list[nn.Parameter]] = []
    size = 0
    for parameter in parameters:
        size += parameter.numel()
        if not buckets or size > limit:
            buckets.append([])
            size = parameter.numel()
        buckets[-1].append(parameter)
    return buckets
