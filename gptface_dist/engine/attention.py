"""Attention of a distributed model by layer: recording its inputs, the error of FP8 on them, and choosing the kernel."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state as groups
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gptface_dist.engine.engine import Engine
from gptface_dist.kernels.attention import health
from gptface_dist.kernels.attention.health import Health
from gptface_dist.kernels.attention.norm import QkNorm
from gptface_dist.kernels.attention.options import Fp8Options
from gptface_dist.model.attention import lengths
from gptface_dist.parallel.layer import CoreAttention, StageLayer


def attentions(engine: Engine) -> Iterator[tuple[int, CoreAttention]]:
    """Global layer number and attention module of each layer on this rank."""
    for stage in engine.stages:
        for number, layer in stage.layers.items():
            yield int(number), cast(StageLayer, layer).self_attention.core_attention


def without_fp8(engine: Engine, layer: int) -> None:
    """Set the attention of a layer (global number) to the activations' precision, from the next forward pass on."""
    for number, attention in attentions(engine):
        if number == layer:
            attention.options = replace(attention.options, kernel="sdpa")


@dataclass
class AttentionInputs:
    """Recorded inputs of one layer's attention: this rank's heads of B sequences."""

    q: Tensor
    """[B, L, N, D], after QK-norm if the model has it."""
    k: Tensor
    """[B, L, N, D], after QK-norm if the model has it."""
    v: Tensor
    """[B, L, N, D]."""
    lengths: Tensor
    """Int [B]: tokens without padding."""
    dout: Tensor | None = None
    """[B, L, N, D]: gradient of the output; None before the backward pass."""


class AttentionRecorder:
    """Records the attention inputs of a step's first micro-batch, on data-parallel rank 0.

    All its tensor- and pipeline-parallel ranks record their heads and layers; recomputation makes no difference. Until
    :meth:`end`, it needs the memory of q, k, v and one gradient of ``sequences`` sequences per layer.
    """

    def __init__(self, engine: Engine, sequences: int):
        self._engine, self._sequences = engine, sequences
        self._inputs: dict[int, AttentionInputs] = {}
        self._norms: dict[int, list[Tensor]] = {}
        self._hooks: list[RemovableHandle] = []

    def begin(self) -> None:
        """Start recording; the next forward pass must be that of a step's first micro-batch."""
        for layer, attention in attentions(self._engine) if groups.get_data_parallel_rank() == 0 else ():
            for norm in (attention.q_norm, attention.k_norm) if attention.qk_norm else ():
                # ZeRO-3 materialises the norm's weights in its forward pass only.
                keep_norm = partial(self._keep_norm, layer)
                self._hooks.append(norm.register_forward_hook(keep_norm))
            keep = partial(self._keep, layer, attention.eps)
            self._hooks.append(attention.register_forward_hook(keep))

    def _keep_norm(self, layer: int, _module: nn.Module, _inputs: tuple[()], affine: Tensor) -> None:
        if layer not in self._inputs:
            self._norms.setdefault(layer, []).append(affine.detach())

    def _keep(self, layer: int, eps: float, _module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if layer in self._inputs:
            return  # A later micro-batch, or recomputation of the first one.
        query, key, value, attn_mask = inputs
        q, k, v = (x[:, : self._sequences].detach().transpose(0, 1).clone() for x in (query, key, value))
        attn_mask = None if attn_mask is None else attn_mask[: self._sequences]
        if layer in self._norms:
            q_affine, k_affine = self._norms.pop(layer)
            q, k = QkNorm(q_affine, k_affine, eps)(q, k)
        self._inputs[layer] = recorded = AttentionInputs(q, k, v, lengths(q, attn_mask))

        def keep_gradient(gradient: Tensor) -> None:
            recorded.dout = gradient[:, : self._sequences].transpose(0, 1).reshape(q.shape).clone()

        output.register_hook(keep_gradient)

    def end(self, options: Fp8Options) -> dict[int, Health]:
        """Stop recording; returns the error of FP8 attention for every layer of the model on every rank. Collective."""
        for hook in self._hooks:
            hook.remove()
        layers = self._engine.stages[0].options.layers
        sums = torch.zeros(layers, health.SIZE, dtype=torch.float64, device=self._engine.device)
        for layer, recorded in self._inputs.items():
            sums[layer] = health.sums(recorded.q, recorded.k, recorded.v, recorded.lengths, options, recorded.dout)
        self._inputs, self._hooks = {}, []
        dist.all_reduce(sums)
        return {layer: Health.of(numbers) for layer, numbers in enumerate(sums.cpu())}
