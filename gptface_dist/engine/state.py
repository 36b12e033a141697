"""Views of an engine's training state under every ZeRO stage: master weights, Adam moments and EMA, writable in place.

It reads DeepSpeed's internals, so it is valid for the versions of :data:`gptface_dist.engine.deepspeed_patches.CHECKED`.
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
    """A range of a parameter in a buffer."""

    parameter: nn.Parameter
    local_range: range
    """Elements of the flattened parameter."""
    at: int
    """Offset of the range in the buffer."""
    owned_range: range
    """The part of ``local_range`` that this data-parallel rank saves."""


@dataclass
class _Buffer:
    """One tensor of AdamW's master weights, with its parameters' ranges and its EMA."""

    masters: Tensor
    parts: list[_Part] = field(default_factory=list)
    ema: Tensor | None = None


class EngineState:
    """This rank's part of the training state; implements :class:`gptface_dist.checkpoint.local_shard.OptimizerStateView`.

    Args:
        zero: DeepSpeed's engine, or :class:`gptface_dist.engine.replicated.Replicated`.
        layout: of the run.
        parameters: of this rank, with their entries in the table.
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
        """All shards in this rank's memory, as views."""
        rank = groups.get_tensor_model_parallel_rank()
        local_shards = []
        for buffer in self._buffers:
            moments = self._moments(buffer)
            values = {WEIGHTS: buffer.masters.detach(), "exp_avg": moments["exp_avg"], "exp_avg_sq": moments["exp_avg_sq"]}
            if buffer.ema is not None:
                values[EMA] = buffer.ema
            for part in buffer.parts:
                entry = self._entries[part.parameter]
                local_shards.append(
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
        return local_shards

    def refresh(self) -> None:
        """Round the master weights into the module's weights after writes to them. Collective."""
        if self._layout.zero == 0:
            self._inner.write_weights()
        elif self._layout.zero < 3:
            self._inner.update_lp_params()
        else:
            self._inner.checkpoint_event_prologue()
            for rounded, masters in zip(
                self._inner.fp16_partitioned_groups_flat, self._inner.fp32_partitioned_groups_flat, strict=True
            ):
                # In float32 both are one tensor.
                rounded.data.copy_(masters.data)
            self._inner.checkpoint_event_epilogue()

    def begin_ema(self) -> None:
        """Start the EMA from the present master weights."""
        for buffer in self._buffers:
            buffer.ema = buffer.masters.detach().clone()

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        """``ema <- decay * ema + (1 - decay) * weights`` on this rank's shards."""
        for buffer in self._buffers:
            assert buffer.ema is not None
            buffer.ema.lerp_(buffer.masters.detach(), 1 - decay)

    def _writes(self, entry: ParameterSpec, rank: int) -> bool:
        """Whether this rank saves its shard: one of the tensor-parallel and pipeline ranks with a copy does."""
        copy = entry.on_first_stage and not groups.is_pipeline_first_stage(ignore_virtual=True)
        return not copy and (entry.sharding is not None or rank == 0)

    def _moments(self, buffer: _Buffer) -> dict[str, Tensor]:
        moments: dict[str, Tensor] = self._adam.state[buffer.masters]
        if not moments:
            # AdamW creates these in its first step, but checkpoints load before it.
            moments["step"] = torch.tensor(0.0)
            moments["exp_avg"] = torch.zeros_like(buffer.masters, requires_grad=False)
            moments["exp_avg_sq"] = torch.zeros_like(buffer.masters, requires_grad=False)
        return moments

    def _replicated(self) -> Iterator[_Buffer]:
        """Without ZeRO: every data-parallel rank holds whole shards and saves a share of them."""
        rank, size = groups.get_data_parallel_rank(), groups.get_data_parallel_world_size()
        for parameter, masters in self._inner.masters.items():
            local_range = range(masters.numel())
            share = local_range[len(local_range) * rank // size : len(local_range) * (rank + 1) // size]
            yield _Buffer(masters, [_Part(parameter, local_range, 0, share)])

    def _flat(self) -> Iterator[_Buffer]:
        """ZeRO-1 and -2: a group's parameters are concatenated, and each rank holds a range of that."""
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
                    local_range = range(begin - start, end - start)
                    buffer.parts.append(_Part(parameter, local_range, begin - first, local_range))
            yield buffer

    def _sharded(self) -> Iterator[_Buffer]:
        """ZeRO-3: each parameter is sharded over ranks; the shards of a sub-group are concatenated."""
        zero = self._inner
        for parameters, masters in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
            buffer, at = _Buffer(masters), 0
            for parameter in parameters:
                each = parameter.ds_tensor.ds_numel
                begin = min(dist.get_rank(parameter.ds_process_group) * each, parameter.ds_numel)
                local_range = range(begin, min(begin + each, parameter.ds_numel))
                if local_range:
                    buffer.parts.append(_Part(parameter, local_range, at, local_range))
                at += each
            yield buffer


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of a parameter, also while ZeRO-3 has freed its values."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
