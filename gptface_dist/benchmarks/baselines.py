"""Baselines of the composed engine: DeepSpeed's own pipeline, and plain PyTorch, both around the plain model.

Each implements the contract of :meth:`gptface_dist.engine.engine.Engine.step`: from this rank's micro-batches to updated
weights and the loss of the global batch on every rank. Losses are sums divided by global counts; the gradient norm is clipped;
AdamW is torch's, with the same options.
"""

import contextlib
import functools
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gptface_dist import host
from gptface_dist.benchmarks.workload import Workload
from gptface_dist.errors import UserError
from gptface_dist.model.options import ModelOptions
from gptface_dist.model.parameters import initialise
from gptface_dist.model.plain import Embeddings, Layer, TokenHead, Transformer, summed_cross_entropy
from gptface_dist.objectives.objective import CoupledObjective, Objective
from gptface_dist.parallel.options import OptimizerOptions
from gptface_dist.sequence import PaddedBatch
from gptface_dist.tokenizers.vocabulary import Vocabulary

TIED = "embeddings"
"""Name of the module that the first and the last pipeline stage share."""


class DataParallel:
    """The plain model and torch's AdamW, in DistributedDataParallel if there are several processes.

    Gradients are reduced over processes once a step. bfloat16 means torch's autocast: weights stay float32.
    """

    def __init__(self, work: Workload, optimizer: OptimizerOptions):
        if isinstance(work.objective, CoupledObjective):
            raise UserError(f"the objective {work.objective.name} needs two passes: only gptface_dist does that")
        model = work.objective.model(work.model, work.vocabulary)
        initialise(model, work.seed)
        model.to(host.device())
        self._adam, self._clip = _adam(work, model.named_parameters(), optimizer), optimizer.max_grad_norm
        self._world, self._objective = dist.get_world_size(), work.objective
        losses = _Losses(work.objective, model, work.engine.torch_dtype)
        self._model = DistributedDataParallel(losses) if self._world > 1 else losses

    def step(self, batches: list[PaddedBatch[Tensor]]) -> float:
        """One optimizer step on this rank's micro-batches; the loss of the global batch."""
        # DistributedDataParallel averages gradients, which are parts of a sum here: scale them up.
        scale = _scale(self._objective, batches, dist.group.WORLD) * self._world
        total = torch.zeros((), device=scale.device)
        for number, batch in enumerate(batches):
            with contextlib.ExitStack() as stack:
                if isinstance(self._model, DistributedDataParallel) and number < len(batches) - 1:
                    stack.enter_context(self._model.no_sync())
                loss = (self._model(batch) * scale).sum()
                loss.backward()
            total += loss.detach() / self._world
        if self._clip > 0:
            nn.utils.clip_grad_norm_(self._model.parameters(), self._clip)
        self._adam.step()
        self._adam.zero_grad()
        dist.all_reduce(total)
        return float(total)


class Pipeline:
    """DeepSpeed's ``PipelineModule`` of the plain model's modules, with ZeRO-1.

    All stages have the same number of layers. Every micro-batch must have the same shape. DeepSpeed communicates already
    (``groups.start_deepspeed``).
    """

    def __init__(self, work: Workload, optimizer: OptimizerOptions, stages: int):
        self._objective = work.objective
        self._last: list[LastStage] = []
        self._batch: PaddedBatch[Tensor] | None = None
        specs, prefixes = _specs(work, self._last)
        module = PipelineModule(specs, num_stages=stages, loss_fn=self._loss, partition_method="type:^transformerlayer$")
        named = {_global_name(name, prefixes): parameter for name, parameter in module.named_parameters()}
        with torch.no_grad():
            for entry in work.objective.parameters(work.model, work.vocabulary):
                if entry.name in named:
                    named[entry.name].copy_(entry.initial(work.seed))
        self._replicas = dist.get_world_size() // stages
        half = work.engine.torch_dtype == torch.bfloat16
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=_adam(work, named.items(), optimizer),
            config={
                "train_micro_batch_size_per_gpu": work.size,
                "gradient_accumulation_steps": work.micro_batches // self._replicas,
                "zero_optimization": {"stage": 1},
                "zero_allow_untested_optimizer": True,
                "gradient_clipping": optimizer.max_grad_norm,
                "bf16": {"enabled": half},
                "data_types": {"grad_accum_dtype": "fp32"},
                "steps_per_print": 10**9,
            },
        )
        self._group = module.mpu().get_data_parallel_group()

    def step(self, batches: list[PaddedBatch[Tensor]]) -> float:
        """One optimizer step on this rank's micro-batches; the loss of the global batch."""
        # The engine averages over micro-batches and replicas, whose losses are parts of a sum here: scale them up.
        scale = _scale(self._objective, batches, self._group) * (len(batches) * self._replicas)
        self._batch = batches[0]
        return float(self._engine.train_batch(iter([_pack(batch, scale) for batch in batches])))

    def _loss(self, outputs: tuple[Tensor, Tensor], labels: tuple[Tensor, ...]) -> Tensor:
        """The weighted loss on the last stage."""
        assert self._batch is not None
        scale, *parts = labels
        tensors: dict[str, Any] = dict(zip(_tensors(self._batch), parts, strict=True))
        batch = replace(self._batch, **tensors)
        return (self._last[0].losses(outputs, batch) * scale).sum()


def _scale(objective: Objective, batches: list[PaddedBatch[Tensor]], group: Any) -> Tensor:
    """Float32 [terms]: weight over the number of items of each term, over all micro-batches and the ranks of ``group``."""
    known = torch.tensor([objective.counts(batch) for batch in batches]).sum(0)
    counts = host.to_device(known, batches[0].tokens.device)
    dist.all_reduce(counts, group=group)
    return torch.tensor(list(objective.weights.values()), device=counts.device) / counts.clamp(min=1)


def _adam(work: Workload, named: Iterable[tuple[str, nn.Parameter]], options: OptimizerOptions) -> torch.optim.AdamW:
    decay = {entry.name: entry.decay for entry in work.objective.parameters(work.model, work.vocabulary)}
    kept: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in named:
        kept[decay[name]].append(parameter)
    groups = [{"params": kept[True], "weight_decay": options.weight_decay}, {"params": kept[False], "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=options.lr,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
    )


class _Losses(nn.Module):
    """A micro-batch -> its summed losses, float32 [terms]: the module that DistributedDataParallel wraps."""

    def __init__(self, objective: Objective, model: Transformer, dtype: torch.dtype):
        super().__init__()
        self.objective, self.model, self.dtype = objective, model, dtype

    def forward(self, batch: PaddedBatch[Tensor]) -> Tensor:
        with torch.autocast(batch.tokens.device.type, self.dtype, enabled=self.dtype != torch.float32):
            x_BLH = self.model.encode(self.objective.embed(self.model.embeddings, batch), batch.lengths)
            losses = self.objective.losses(x_BLH, batch, self.model, {})
        return torch.stack([each.loss for each in losses])


# The plain model's modules as pipeline layers, each with the outputs of the previous one as input. Hidden states are passed
# with the lengths, and with the tied word embeddings on the last stage, where DeepSpeed passes the rest of the micro-batch as
# labels.


class EmbeddingLayer(Embeddings):
    """A micro-batch -> (hidden states, lengths)."""

    def forward(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Int64 tokens, segments, positions, lengths -> [B, L, H], int64 [B]."""
        tokens, segments, positions, lengths = batch
        return super().forward(tokens, segments, positions), lengths


class TransformerLayer(Layer):
    """(hidden states, lengths) -> (hidden states, lengths)."""

    def forward(self, carried: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """[B, L, H], int64 [B] -> the same."""
        x_BLH, lengths = carried
        attn_mask = torch.arange(x_BLH.shape[1], device=x_BLH.device) < lengths.unsqueeze(1)
        return super().forward(x_BLH, attn_mask[:, None, None, :]), lengths


class FinalNorm(nn.LayerNorm):
    """(hidden states, lengths) -> (features, lengths)."""

    def forward(self, carried: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """[B, L, H], int64 [B] -> the same."""
        return super().forward(carried[0]), carried[1]


class LastStage(nn.Module):
    """The heads of the model, with the methods of the plain model that an objective calls."""

    def __init__(self, objective: Objective, options: ModelOptions, vocabulary: Vocabulary, built: "list[LastStage]"):
        super().__init__()
        self.objective, self.vocabulary = objective, vocabulary
        self.token_head = TokenHead(vocabulary.size, options)
        for name, module in objective.heads(options).items():
            self.add_module(name, module)
        self._words = torch.empty(0)
        built.append(self)

    def forward(self, carried: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """[B, L, H], int64 [B], words [V, H] -> features, words."""
        x_BLH, _, words = carried
        return x_BLH, words

    def losses(self, outputs: tuple[Tensor, Tensor], batch: PaddedBatch[Tensor]) -> Tensor:
        """Float32 [terms]: summed losses."""
        x_BLH, self._words = outputs
        return torch.stack([each.loss for each in self.objective.losses(x_BLH, batch, self, {})])

    def token_logits(self, x_MH: Tensor, ids: range) -> Tensor:
        """As :meth:`Transformer.token_logits`."""
        logits: Tensor = self.token_head(x_MH, self._words, ids)
        return logits

    def token_loss(self, x_MH: Tensor, labels: Tensor, ids: range) -> tuple[Tensor, Tensor]:
        """As :meth:`Transformer.token_loss`."""
        return summed_cross_entropy(self.token_logits(x_MH, ids), labels - ids.start)


def _pack(batch: PaddedBatch[Tensor], scale: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """A micro-batch for DeepSpeed's pipeline: (inputs of the first stage, labels of the last), all of them tensors."""
    inputs = (batch.tokens, batch.segments, batch.positions, batch.lengths)
    return inputs, (scale, *(getattr(batch, name) for name in _tensors(batch)))


def _tensors(batch: PaddedBatch[Tensor]) -> list[str]:
    return [each.name for each in fields(batch) if isinstance(getattr(batch, each.name), Tensor)]


def _words(embeddings: EmbeddingLayer, carried: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Append the tied word embeddings [V, H] to the inputs of the heads."""
    return *carried, embeddings.word.weight


def _specs(work: Workload, last: list[LastStage]) -> tuple[list[LayerSpec], list[str]]:
    """Pipeline layers, and the prefix of each one's parameters in the plain model; built heads are appended to ``last``."""
    options, vocabulary = work.model, work.vocabulary
    tied = functools.partial(TiedLayerSpec, TIED, EmbeddingLayer, vocabulary.size, options, tied_weight_attr="word.weight")
    specs = [
        tied(),
        *(LayerSpec(TransformerLayer, options) for _ in range(options.layers)),
        LayerSpec(FinalNorm, options.hidden, options.norm_eps),
        tied(forward_fn=_words),
        LayerSpec(LastStage, work.objective, options, vocabulary, last),
    ]
    return specs, ["embeddings.", *(f"layers.{i}." for i in range(options.layers)), "final_norm.", "embeddings.", ""]


def _global_name(local: str, prefixes: list[str]) -> str:
    """The name in the plain model of a parameter of the ``PipelineModule``."""
    if local.startswith(f"tied_modules.{TIED}."):
        return local.removeprefix("tied_modules.")
    layer, _, rest = local.partition(".")
    return prefixes[int(layer)] + rest
