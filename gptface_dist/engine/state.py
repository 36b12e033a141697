"""An engine's training state, where it lies: master weights, Adam moments and the running average, readable and writable
in place under every stage of ZeRO.

Reads DeepSpeed's internals, so it holds for the versions of :data:`gptface_dist.engine.deepspeed_patches.CHECKED`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as groups
from torch import Tensor, nn

from gptface_dist.checkpoint.local_shard import EMA, WEIGHTS, LocalShard
from gptface_dist.model.parameters import ParameterSpec
from gptface_dist.parallel.layout import Layout


@dataclass(frozen=True)
class _Part:
    """A parameter's range in a buffer."""

    parameter: nn.Parameter
    local_range: range
    """Elements of the flattened parameter."""
    at: int
    """Where they begin in the buffer."""
    owned_range: range
    """Those of them that this data-parallel rank writes to a checkpoint."""


@dataclass
class _Buffer:
    """One tensor of master weights that AdamW knows, with what it holds."""

    masters: Tensor
    parts: list[_Part] = field(default_factory=list)
    ema: Tensor | None = None


class EngineState:
    """What this rank holds of the training state; satisfies :class:`gptface_dist.checkpoint.local_shard.OptimizerStateView`.

    Args:
        zero: DeepSpeed's engine, or :class:`gptface_dist.engine.replicated.Replicated`.
        layout: of the run.
        parameters: this rank's, with their entries in the table.
    """

    def __init__(self, zero: Any, layout: Layout, parameters: Iterable[tuple[ParameterSpec, nn.Parameter]]):
        self._layout = layout
        self._inner: Any = zero if layout.zero == 0 else zero.optimizer
        self._adam: torch.optim.Optimizer = self._inner.optimizer
        find = {0: self._replicated, 1: self._flat, 2: self._flat, 3: self._sharded}[layout.zero]
        self._buffers = list(find())
        self._entries: dict[nn.Parameter, ParameterSpec] = {parameter: entry for entry, parameter in parameters}
        for buffer in self._buffers:
            self._moments(buffer)

    @property
    def updates(self) -> int:
        """Optimizer updates done."""
        return int(self._adam.state[self._buffers[0].masters]["step"])

    @updates.setter
    def updates(self, number: int) -> None:
        for buffer in self._buffers:
            self._adam.state[buffer.masters]["step"].fill_(number)

    def local_shards(self) -> list[LocalShard]:
        """All that this rank holds."""
        rank = groups.get_tensor_model_parallel_rank()
        found = []
        for buffer in self._buffers:
            moments = self._moments(buffer)
            values = {WEIGHTS: buffer.masters.detach(), "exp_avg": moments["exp_avg"], "exp_avg_sq": moments["exp_avg_sq"]}
            if buffer.ema is not None:
                values[EMA] = buffer.ema
            for part in buffer.parts:
                entry = self._entries[part.parameter]
                found.append(
                    LocalShard(
                        entry=entry,
                        shard=_shape(part.parameter),
                        rank=rank,
                        size=self._layout.tp,
                        local_range=part.local_range,
                        owned_range=part.owned_range if self._writes(entry, rank) else part.local_range[:0],
                        values={k: v.view(-1)[part.at : part.at + len(part.local_range)] for k, v in values.items()},
                    )
                )
        return found

    def refresh(self) -> None:
        """Master weights were written to: round them into the module's weights, on all ranks that hold a copy."""
        if self._layout.zero == 0:
            self._inner.write_weights()
        elif self._layout.zero < 3:
            self._inner.update_lp_params()
        else:
            self._inner.checkpoint_event_prologue()
            for rounded, masters in zip(
                self._inner.fp16_partitioned_groups_flat, self._inner.fp32_partitioned_groups_flat, strict=True
            ):
                # In float32 they are one tensor.
                rounded.data.copy_(masters.data)
            self._inner.checkpoint_event_epilogue()

    def begin_ema(self) -> None:
        """The running average begins anew, as the weights now are."""
        for buffer in self._buffers:
            buffer.ema = buffer.masters.detach().clone()

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        """``average <- decay * average + (1 - decay) * weights``, of what this rank holds."""
        for buffer in self._buffers:
            assert buffer.ema is not None
            buffer.ema.lerp_(buffer.masters.detach(), 1 - decay)

    def _writes(self, entry: ParameterSpec, rank: int) -> bool:
        """Whether this tensor-parallel and pipeline rank writes the parameter, of those that have it."""
        copy = entry.on_first_stage and not groups.is_pipeline_first_stage(ignore_virtual=True)
        return not copy and (entry.sharding is not None or rank == 0)

    def _moments(self, buffer: _Buffer) -> dict[str, Tensor]:
        moments: dict[str, Tensor] = self._adam.state[buffer.masters]
        if not moments:
            # AdamW makes these in its first step; a checkpoint is read before it.
            moments["step"] = torch.tensor(0.0)
            moments["exp_avg"] = torch.zeros_like(buffer.masters, requires_grad=False)
            moments["exp_avg_sq"] = torch.zeros_like(buffer.masters, requires_grad=False)
        return moments

    def _replicated(self) -> Iterator[_Buffer]:
        """Without ZeRO: every data-parallel rank holds all, and writes a share."""
        rank, size = groups.get_data_parallel_rank(), groups.get_data_parallel_world_size()
        for parameter, masters in self._inner.masters.items():
            held = range(masters.numel())
            share = held[len(held) * rank // size : len(held) * (rank + 1) // size]
            yield _Buffer(masters, [_Part(parameter, held, 0, share)])

    def _flat(self) -> Iterator[_Buffer]:
        """ZeRO-1 and -2: a group's parameters are laid end to end, and each rank has a range of that."""
        zero = self._inner
        for number, masters in enumerate(zero.single_partition_of_fp32_groups):
            rank = dist.get_rank(zero.real_dp_process_group[number])
            first = rank * masters.numel()
            buffer = _Buffer(masters)
            for parameter, start in zip(
                zero.round_robin_bit16_groups[number], zero.round_robin_bit16_offsets[number], strict=True
            ):
                begin, end = max(start, first), min(start + parameter.numel(), first + masters.numel())
                if begin < end:
                    held = range(begin - start, end - start)
                    buffer.parts.append(_Part(parameter, held, begin - first, held))
            yield buffer

    def _sharded(self) -> Iterator[_Buffer]:
        """ZeRO-3: each parameter is divided among ranks; a sub-group's parts are laid end to end."""
        zero = self._inner
        for parameters, masters in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
            buffer, at = _Buffer(masters), 0
            for parameter in parameters:
                each = parameter.ds_tensor.ds_numel
                begin = min(dist.get_rank(parameter.ds_process_group) * each, parameter.ds_numel)
                held = range(begin, min(begin + each, parameter.ds_numel))
                if held:
                    buffer.parts.append(_Part(parameter, held, at, held))
                at += each
            yield buffer


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Of a parameter whose values ZeRO-3 may have taken away."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
