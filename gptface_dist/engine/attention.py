"""A distributed model's attention, layer by layer: what it is given in a step, how FP8 fares on that, and which kernel runs."""

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
    """This rank's attention of each of its layers, with the layer's number in the whole model."""
    for stage in engine.stages:
        for number, layer in stage.layers.items():
            yield int(number), cast(StageLayer, layer).self_attention.core_attention


def without_fp8(engine: Engine, layer: int) -> None:
    """From the next step on, a layer attends in the activations' precision."""
    for number, attention in attentions(engine):
        if number == layer:
            attention.options = replace(attention.options, kernel="sdpa")


@dataclass
class AttentionInputs:
    """What one layer's attention was given: this rank's heads of B sequences."""

    q: Tensor
    """[B, L, N, D], through QK-norm where the model has it."""
    k: Tensor
    """[B, L, N, D], likewise."""
    v: Tensor
    """[B, L, N, D]."""
    lengths: Tensor
    """Int [B]: tokens that are no padding."""
    dout: Tensor | None = None
    """[B, L, N, D]: the output's gradient, once the backward pass was there."""


class AttentionRecorder:
    """Keeps what attention is given in the first micro-batch of a step, on the ranks that are data-parallel rank 0.

    All tensor- and pipeline-parallel ranks keep their heads and layers; recomputation does not matter. It takes the memory of
    q, k, v and a gradient of ``sequences`` sequences a layer until :meth:`end`.
    """

    def __init__(self, engine: Engine, sequences: int):
        self._engine, self._sequences = engine, sequences
        self._given: dict[int, AttentionInputs] = {}
        self._norms: dict[int, list[Tensor]] = {}
        self._hooks: list[RemovableHandle] = []

    def begin(self) -> None:
        """The next forward pass is that of a step's first micro-batch."""
        for layer, attention in attentions(self._engine) if groups.get_data_parallel_rank() == 0 else ():
            for norm in (attention.q_norm, attention.k_norm) if attention.qk_norm else ():
                # Under ZeRO-3 this is the only moment at which a norm's weights are there.
                keep_norm = partial(self._keep_norm, layer)
                self._hooks.append(norm.register_forward_hook(keep_norm))
            keep = partial(self._keep, layer, attention.eps)
            self._hooks.append(attention.register_forward_hook(keep))

    def _keep_norm(self, layer: int, _module: nn.Module, _inputs: tuple[()], affine: Tensor) -> None:
        if layer not in self._given:
            self._norms.setdefault(layer, []).append(affine.detach())

    def _keep(self, layer: int, eps: float, _module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if layer in self._given:
            return  # A later micro-batch, or the same one computed again.
        query, key, value, attn_mask = inputs
        q, k, v = (x[:, : self._sequences].detach().transpose(0, 1).clone() for x in (query, key, value))
        attn_mask = None if attn_mask is None else attn_mask[: self._sequences]
        if layer in self._norms:
            of_q, of_k = self._norms.pop(layer)
            q, k = QkNorm(of_q, of_k, eps)(q, k)
        self._given[layer] = given = AttentionInputs(q, k, v, lengths(q, attn_mask))

        def keep_gradient(gradient: Tensor) -> None:
            given.dout = gradient[:, : self._sequences].transpose(0, 1).reshape(q.shape).clone()

        output.register_hook(keep_gradient)

    def end(self, options: Fp8Options) -> dict[int, Health]:
        """How FP8 attention fares on what was kept: of every layer of the model, the same on every rank; all ranks call it."""
        for hook in self._hooks:
            hook.remove()
        layers = self._engine.stages[0].options.layers
        found = torch.zeros(layers, health.SIZE, dtype=torch.float64, device=self._engine.device)
        for layer, given in self._given.items():
            found[layer] = health.sums(given.q, given.k, given.v, given.lengths, options, given.dout)
        self._given, self._hooks = {}, []
        dist.all_reduce(found)
        return {layer: Health.of(numbers) for layer, numbers in enumerate(found.cpu())}
