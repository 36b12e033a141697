"""What the composed engine is compared with: DeepSpeed's own pipeline, and plain PyTorch, both around the plain model.

Each does what :meth:`gptface_dist.engine.engine.Engine.step` does: from this rank's micro-batches to updated weights and the
loss of the global batch on every rank. Losses are sums divided by global counts; norms are clipped; AdamW is torch's, with the
same options.
"""

import contextlib
import functools
from collections.abc import Iterable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gptface_dist import host
from gptface_dist.benchmarks.workload import Workload
from gptface_dist.data.batch import Batch, within
from gptface_dist.model.options import ModelOptions
from gptface_dist.model.parameters import initialise, parameters
from gptface_dist.model.plain import Embeddings, GPTFace, Layer, MatchHead, TokenHead, sums
from gptface_dist.parallel.options import OptimizerOptions
from gptface_dist.tokenizers.vocabulary import Vocabulary

TIED = "embeddings"
"""Name of the module that the first and the last pipeline stage have in common."""


class DataParallel:
    """The plain model and torch's AdamW, under DistributedDataParallel where there is more than one process.

    Gradients are added over processes once a step. bfloat16 is torch's autocast: weights stay float32.
    """

    def __init__(self, work: Workload, optimizer: OptimizerOptions):
        model = GPTFace(work.model, work.vocabulary)
        initialise(model, work.seed)
        model.to(host.device())
        self._adam, self._clip = _adam(work, model.named_parameters(), optimizer), optimizer.clip
        self._world = dist.get_world_size()
        losses = _Losses(model, work.engine.torch_dtype)
        self._model = DistributedDataParallel(losses) if self._world > 1 else losses

    def step(self, batches: list[Batch[Tensor]]) -> float:
        """One optimizer step on this rank's micro-batches; the loss of the global batch."""
        # DistributedDataParallel averages gradients; these are parts of a sum.
        scale = _scale(batches, dist.group.WORLD) * self._world
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
    """DeepSpeed's ``PipelineModule`` of the plain model's own parts, with ZeRO-1.

    Its stages have equally many layers. Every micro-batch must have the same shape.
    """

    def __init__(self, work: Workload, optimizer: OptimizerOptions, stages: int):
        deepspeed.init_distributed(host.backend(), verbose=False)
        specs, prefixes = _specs(work.model, work.vocabulary)
        module = PipelineModule(specs, num_stages=stages, loss_fn=_weighted, partition_method="type:^transformerlayer$")
        named = {_global_name(name, prefixes): parameter for name, parameter in module.named_parameters()}
        with torch.no_grad():
            for entry in parameters(work.model, work.vocabulary):
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
                "gradient_clipping": optimizer.clip,
                "bf16": {"enabled": half},
                "data_types": {"grad_accum_dtype": "fp32"},
                "steps_per_print": 10**9,
            },
        )
        self._group = module.mpu().get_data_parallel_group()

    def step(self, batches: list[Batch[Tensor]]) -> float:
        """One optimizer step on this rank's micro-batches; the loss of the global batch."""
        # The engine takes means over micro-batches and replicas; these are parts of a sum.
        scale = _scale(batches, self._group) * (len(batches) * self._replicas)
        pairs = [((b.tokens, b.segments, b.positions, b.lengths, b.labels, b.matched), scale) for b in batches]
        return float(self._engine.train_batch(iter(pairs)))


def _scale(batches: list[Batch[Tensor]], group: Any) -> Tensor:
    """Float32 [3]: one over the numbers of masked text tokens, masked image tokens and pairs, over all micro-batches and
    the ranks of ``group``.
    """
    known = [[len(batch.masked_text), len(batch.masked_image), len(batch.matched)] for batch in batches]
    counts = host.to_device(torch.tensor(known).sum(0), batches[0].labels.device)
    dist.all_reduce(counts, group=group)
    return 1 / counts.clamp(min=1)


def _adam(work: Workload, named: Iterable[tuple[str, nn.Parameter]], options: OptimizerOptions) -> torch.optim.AdamW:
    decay = {entry.name: entry.decay for entry in parameters(work.model, work.vocabulary)}
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
    """The plain model from a micro-batch to its summed losses, float32 [3]: what DistributedDataParallel wraps."""

    def __init__(self, model: GPTFace, dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, batch: Batch[Tensor]) -> Tensor:
        with torch.autocast(batch.tokens.device.type, self.dtype, enabled=self.dtype != torch.float32):
            x = self.model(batch.tokens, batch.segments, batch.positions, batch.lengths)
            ids = self.model.vocabulary
            # As the engine does, so that neither waits for a GPU to count.
            found = [
                sums(self.model.token_logits(x[chosen], kind), batch.labels[chosen] - kind.start)
                for kind, chosen in (
                    (ids.text_range, batch.masked_text.unbind(1)),
                    (ids.image_range, batch.masked_image.unbind(1)),
                )
            ]
            found.append(sums(self.model.match_logits(x), batch.matched))
        return torch.stack([one.loss for one in found])


# The plain model's parts as pipeline layers: each takes what the one before gives. Hidden states travel with what later layers
# need of the micro-batch, as one int64 tensor [B, L + 2]: labels, matched, length.


class EmbeddingLayer(Embeddings):
    """A micro-batch -> (hidden states, what later layers need)."""

    def forward(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Int64 tokens, segments, positions, lengths, labels, matched -> [B, L, H], int64 [B, L + 2]."""
        tokens, segments, positions, lengths, labels, matched = batch
        needed = torch.cat([labels, matched[:, None], lengths[:, None]], dim=1)
        return super().forward(tokens, segments, positions), needed


class TransformerLayer(Layer):
    """Hidden states -> hidden states."""

    def forward(self, carried: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """[B, L, H], int64 [B, L + 2] -> the same."""
        x_BLH, needed = carried
        seen = torch.arange(x_BLH.shape[1], device=x_BLH.device) < needed[:, -1:]
        return super().forward(x_BLH, seen[:, None, None, :]), needed


class FinalNorm(nn.LayerNorm):
    """Hidden states -> features."""

    def forward(self, carried: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """[B, L, H], int64 [B, L + 2] -> the same."""
        return super().forward(carried[0]), carried[1]


class Heads(nn.Module):
    """Features -> summed losses."""

    def __init__(self, options: ModelOptions, vocabulary: Vocabulary):
        super().__init__()
        self.vocabulary = vocabulary
        self.token_head = TokenHead(vocabulary.size, options)
        self.match_head = MatchHead(options)

    def forward(self, carried: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """[B, L, H], int64 [B, L + 2], words [V, H] -> float32 [3]: losses of text, image and match."""
        x_BLH, needed, words = carried
        labels, matched = needed[:, :-2], needed[:, -2]
        losses = []
        for ids in (self.vocabulary.text_range, self.vocabulary.image_range):
            chosen = within(labels, ids)
            losses.append(sums(self.token_head(x_BLH[chosen], words, ids), labels[chosen] - ids.start).loss)
        return torch.stack([*losses, sums(self.match_head(x_BLH[:, 0]), matched).loss])


def _words(embeddings: EmbeddingLayer, carried: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Hand the tied words to the heads."""
    return *carried, embeddings.word.weight


def _weighted(losses: Tensor, scale: Tensor) -> Tensor:
    return (losses * scale).sum()


def _specs(options: ModelOptions, vocabulary: Vocabulary) -> tuple[list[LayerSpec], list[str]]:
    """The model as pipeline layers, and the global names' prefix of each one's parameters."""
    tied = functools.partial(TiedLayerSpec, TIED, EmbeddingLayer, vocabulary.size, options, tied_weight_attr="word.weight")
    specs = [
        tied(),
        *(LayerSpec(TransformerLayer, options) for _ in range(options.layers)),
        LayerSpec(FinalNorm, options.hidden, options.norm_eps),
        tied(forward_fn=_words),
        LayerSpec(Heads, options, vocabulary),
    ]
    return specs, ["embeddings.", *(f"layers.{i}." for i in range(options.layers)), "final_norm.", "embeddings.", ""]


def _global_name(local: str, prefixes: list[str]) -> str:
    """A parameter of the ``PipelineModule`` -> its name in the plain model."""
    if local.startswith(f"tied_modules.{TIED}."):
        return local.removeprefix("tied_modules.")
    layer, _, rest = local.partition(".")
    return prefixes[int(layer)] + rest
