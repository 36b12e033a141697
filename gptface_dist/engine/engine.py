"""One optimizer step of the composed whole."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as groups
from torch import Tensor, nn

from gptface_dist import host
from gptface_dist.data.batch import Batch
from gptface_dist.engine import deepspeed_patches, schedule, zero
from gptface_dist.engine.allgather_counter import GatherMeter
from gptface_dist.engine.replicated import Replicated
from gptface_dist.engine.schedule import Chunks, Turn
from gptface_dist.model.dropout import Masks
from gptface_dist.model.options import ModelOptions
from gptface_dist.model.parameters import Parameter, parameters
from gptface_dist.parallel import libraries, specs
from gptface_dist.parallel.layer import megatron_config
from gptface_dist.parallel.layout import Layout
from gptface_dist.parallel.options import EngineOptions, LossWeights, OptimizerOptions
from gptface_dist.parallel.stage import Stage, global_name
from gptface_dist.parallel.vocab_parallel import TiedGradient
from gptface_dist.tokenizers.vocabulary import Vocabulary


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step found, in host memory; the same on every rank but for ``gathered_bytes``."""

    sums: Tensor
    """Float64 [3, 3] over the global batch: (summed loss, correct, count) of text, image and match."""
    loss: float
    """Weighted sum of the three mean losses."""
    norm: float
    """Norm of the whole gradient before clipping."""
    gathered_bytes: int
    """Bytes of weights that ZeRO-3 gathered on this rank, by its dtype, padding and this rank's own part included; else 0."""
    tokens: int
    """Tokens of the global batch, without padding."""
    pairs: int
    """Sum over its sequences of the squared number of their tokens: what attention compares."""


class Engine:
    """The distributed model with its optimizer.

    Process groups must exist (:func:`gptface_dist.parallel.groups.start`).
    """

    def __init__(
        self,
        options: ModelOptions,
        vocabulary: Vocabulary,
        layout: Layout,
        seed: int,
        optimizer: OptimizerOptions,
        weights: LossWeights,
        engine: EngineOptions = EngineOptions(),  # noqa: B008 (frozen)
    ):
        deepspeed_patches.check_version()
        libraries.without_cuda()
        self.layout, self.clip = layout, optimizer.clip
        self._seed = seed
        self.steps = 0
        """Optimizer steps done, of which dropout is a function: a run that resumes sets it."""
        self.before_update: Callable[[], None] | None = None
        """Called when a step's gradients are complete, before they are clipped and used."""
        self.device = host.device()
        self._weights = torch.tensor([weights.text, weights.image, weights.match], dtype=torch.float64)
        self._device_weights = host.to_device(self._weights.float(), self.device)
        self.table: dict[str, Parameter] = {p.name: p for p in parameters(options, vocabulary)}
        self._config = megatron_config(options, layout, engine)
        rank = groups.get_pipeline_model_parallel_rank()
        self.stages = [
            Stage(options, vocabulary, layout, self._config, engine, layout.chunk(rank, turn)).to(self.device)
            for turn in range(layout.vpp)
        ]
        self._load(seed)
        self._tied = [stage.tied_gradient(self.device) for stage in self.stages]
        self._gathers = GatherMeter() if layout.zero == 3 else None
        self.engine = self._shard(optimizer, engine)
        if engine.dtype != "float32":
            self._load_masters(seed)
        self._turns = [Turn(self.engine, stage, turn, self._config) for turn, stage in enumerate(self.stages)]

    def named_parameters(self) -> Iterator[tuple[Parameter, nn.Parameter]]:
        """This rank's parameters with their entries in the table; a stage's copy of tied weights included."""
        for stage in self.stages:
            for name, parameter in stage.named_parameters():
                yield self.table[global_name(name)], parameter

    def _load(self, seed: int) -> None:
        rank, size = groups.get_tensor_model_parallel_rank(), self.layout.tp
        with torch.no_grad():
            for entry, parameter in self.named_parameters():
                whole = entry.initial(seed)
                parameter.copy_(whole if entry.cut is None else entry.cut.shard(whole, rank, size))

    def _load_masters(self, seed: int) -> None:
        """Give the optimizer's float32 weights the initial values themselves: what was made of the model's is rounded."""
        # The state is read out of an engine, so it cannot be known before the engine is.
        from gptface_dist.checkpoint.local_shard import WEIGHTS
        from gptface_dist.engine.state import EngineState

        for region in EngineState(self).regions():
            whole = region.entry.initial(seed)
            cut = region.entry.cut
            shard = whole if cut is None else cut.shard(whole, region.rank, region.size)
            region.values[WEIGHTS].copy_(shard.flatten()[region.held.start : region.held.stop])

    def _shard(self, optimizer: OptimizerOptions, engine: EngineOptions) -> Any:
        decayed: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        last_copy = self.layout.pp > 1 and groups.is_pipeline_last_stage(ignore_virtual=True)
        for entry, parameter in self.named_parameters():
            (decayed if entry.decay else others).append(parameter)
            # Each value counts once in the gradient norm: a shard where it is, a replica on the first tensor-parallel
            # rank, tied words on the first stage.
            copy = entry.name == "embeddings.word.weight" and last_copy
            here = entry.cut is not None or groups.get_tensor_model_parallel_rank() == 0
            parameter.tensor_model_parallel = False  # type: ignore[attr-defined]
            # ZeRO-3 and Replicated ask the first of these, ZeRO-1 and -2 also the second.
            parameter.model_parallel = here and not copy  # type: ignore[attr-defined]
            parameter.ds_pipe_replicated = copy  # type: ignore[attr-defined]
        chunks = Chunks(self.stages)
        param_groups = [
            {"params": kept, "weight_decay": decay}
            for kept, decay in ((decayed, optimizer.weight_decay), (others, 0.0))
            if kept
        ]
        adam = specs.adamw(engine.optimizer)(
            param_groups, lr=optimizer.lr, betas=(optimizer.beta1, optimizer.beta2), eps=optimizer.eps
        )
        if self.layout.zero == 0:
            return Replicated(chunks, adam, optimizer.clip)
        return zero.shard(chunks, adam, self.layout, optimizer.clip, engine.torch_dtype)

    def _counts(self, batches: list[Batch[Tensor]]) -> Tensor:
        """Int64 [5] of the global batch: masked text tokens, masked image tokens, sequences, tokens, and pairs of tokens."""
        known = [[len(batch.masked_text), len(batch.masked_image), len(batch.matched)] for batch in batches]
        lengths = torch.cat([batch.lengths for batch in batches])
        counts = torch.cat(
            [
                host.to_device(torch.tensor(known).sum(0), self.device),
                torch.stack([lengths.sum(), lengths.square().sum()]),
            ]
        )
        dist.all_reduce(counts, group=groups.get_data_parallel_group())
        return counts

    def _scale(self, counts: Tensor) -> Tensor:
        """Factors float32 [3] that turn this rank's summed losses into its part of the global mean losses."""
        # The engine averages gradients over data-parallel ranks; these are parts of a sum.
        return self._device_weights / counts[:3].clamp(min=1) * self.layout.dp

    def _run(self, batches: list[Batch[Tensor]], scale: Tensor, forward_only: bool) -> Tensor:
        self.engine.train(not forward_only)
        masks = self._masks(batches, dropping=not forward_only)
        return self._everywhere(schedule.run(self._turns, batches, masks, scale, forward_only))

    def _masks(self, batches: list[Batch[Tensor]], dropping: bool) -> list[Masks | None]:
        """What dropout drops in a step's micro-batches; sequences are numbered over the global batch, rank by rank."""
        if not dropping or self._config.hidden_dropout == self._config.attention_dropout == 0:
            return [None] * len(batches)
        size = len(batches[0].matched)
        first = groups.get_data_parallel_rank() * len(batches) * size
        return [Masks(self._seed, self.steps, first + number * size) for number in range(len(batches))]

    def _everywhere(self, sums: Tensor) -> Tensor:
        """The last stage's sums, added over data-parallel ranks, on every rank."""
        dist.all_reduce(sums, group=groups.get_data_parallel_group())
        if self.layout.pp > 1:
            dist.broadcast(
                sums, groups.get_pipeline_model_parallel_last_rank(), group=groups.get_pipeline_model_parallel_group()
            )
        return sums

    def loss(self, sums: Tensor) -> float:
        """Weighted sum of the mean losses in ``sums`` [3, 3], on the host; one that nothing was supervised for counts as 0."""
        return float((self._weights * sums[:, 0] / sums[:, 2].clamp(min=1)).sum())

    def _add_tied(self) -> None:
        """Add the parts of the word embeddings' gradient and hand the sum to the engine."""
        mine: list[tuple[int, TiedGradient]] = [(turn, tied) for turn, tied in enumerate(self._tied) if tied is not None]
        for turn, tied in mine:
            if self.layout.pp > 1:
                dist.all_reduce(tied.sum, group=groups.get_embedding_group())
            deepspeed_patches.begin_backward(self.engine(turn, None, None), self.engine).backward()
            tied.sum.zero_()

    def step(self, batches: list[Batch[Tensor]]) -> StepResult:
        """One optimizer step on this rank's micro-batches. Without ZeRO, the host waits for the device once, at its end."""
        before = self._gathers.bytes if self._gathers else 0
        counts = self._counts(batches)
        sums = self._run(batches, self._scale(counts), forward_only=False)
        self._add_tied()
        if self.before_update is not None:
            self.before_update()
        self.engine.step()
        deepspeed_patches.forget_gradients(self.engine)
        self.steps += 1
        gathered = self._gathers.bytes - before if self._gathers else 0
        sums, norm, tokens, pairs = _read(sums, self.engine.get_global_grad_norm(), counts)
        return StepResult(sums, self.loss(sums), norm, gathered, tokens, pairs)

    def evaluate(self, batches: list[Batch[Tensor]]) -> Tensor:
        """Sums float64 [3, 3] over all data-parallel ranks' micro-batches, without dropout; nothing is learned."""
        with torch.no_grad():
            return self._run(batches, torch.zeros(3, device=self.device), forward_only=True)

    def close(self) -> None:
        """No longer used: hooks on gradients, which keep engine and process groups alive, are taken away.

        DeepSpeed 0.19.8's ZeRO-3 keeps its groups, and with them gloo's threads, all the same.
        """
        self.engine.destroy()

    def set_lr(self, lr: float) -> None:
        """Learning rate of the following steps."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr


def _read(sums: Tensor, norm: Tensor | float, counts: Tensor) -> tuple[Tensor, float, int, int]:
    """Sums, norm, tokens and pairs in host memory, by one transfer: each would wait for the device."""
    # DeepSpeed may have the norm on the host.
    last = norm.double().reshape(1) if isinstance(norm, Tensor) else sums.new_full((1,), norm)
    numbers = torch.cat([sums.flatten(), last, counts[3:].double()]).cpu()
    whole_norm, tokens, pairs = numbers[9:].tolist()
    return numbers[:9].view(3, 3), whole_norm, int(tokens), int(pairs)
