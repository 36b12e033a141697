"""The distributed model and its optimizer step."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as groups
from torch import Tensor, nn

from gptface_dist import host
from gptface_dist.checkpoint.local_shard import WEIGHTS
from gptface_dist.distributed.collectives import RankGroup
from gptface_dist.engine import deepspeed_patches, last_stage, schedule, zero
from gptface_dist.engine.allgather_counter import AllGatherCounter
from gptface_dist.engine.replicated import Replicated
from gptface_dist.engine.schedule import MicroBatch, ModelChunk, ModelChunks
from gptface_dist.engine.state import EngineState
from gptface_dist.engine.survey import survey
from gptface_dist.model.dropout import Masks
from gptface_dist.model.flops import Work
from gptface_dist.model.options import ModelOptions
from gptface_dist.model.parameters import ParameterSpec
from gptface_dist.model.reference_batch import ReferenceBatch
from gptface_dist.objectives.objective import CoupledObjective, Objective
from gptface_dist.parallel import libraries, specs
from gptface_dist.parallel.layer import megatron_config
from gptface_dist.parallel.layout import Layout
from gptface_dist.parallel.options import EngineOptions, OptimizerOptions
from gptface_dist.parallel.stage import Stage, global_name
from gptface_dist.sequence import PaddedBatch
from gptface_dist.tokenizers.vocabulary import Vocabulary


@dataclass(frozen=True)
class StepResult:
    """Results of one optimizer step, in host memory; the same on every rank except ``allgather_bytes``."""

    sums: Tensor
    """Float64 [terms, 3] over the global batch: (summed loss, correct, count) of each term of the objective."""
    loss: float
    """Weighted sum of the terms' mean losses."""
    grad_norm: float
    """2-norm of the whole gradient before clipping; infinite if not finite."""
    allgather_bytes: int
    """Bytes of weights that ZeRO-3 gathered on this rank, including padding and its own shard; 0 at other ZeRO stages, and
    in ``before_update``, since the update gathers too."""
    samples: int
    """Samples of the global batch."""
    work: Work
    """Tokens, pairs and items of the global batch."""


BeforeUpdate = Callable[[StepResult], float]
"""Function of a step's result, called with complete gradients before the update; returns the factor of the clipped gradient,
0 to skip the update. All ranks must return the same."""


class Engine:
    """The distributed model with its optimizer.

    Process groups must exist (:func:`gptface_dist.parallel.groups.start`).
    """

    def __init__(
        self,
        objective: Objective,
        options: ModelOptions,
        vocabulary: Vocabulary,
        layout: Layout,
        seed: int,
        optimizer: OptimizerOptions,
        engine: EngineOptions = EngineOptions(),  # noqa: B008 (frozen)
    ):
        deepspeed_patches.check_version()
        libraries.patch_megatron_for_cpu()
        self.objective, self.layout, self.max_grad_norm = objective, layout, optimizer.max_grad_norm
        self._seed = seed
        self.steps = 0
        """Optimizer steps done, which seed dropout; a resumed run sets it."""
        self.device = host.device()
        self._weights = torch.tensor(list(objective.weights.values()), dtype=torch.float64)
        self._device_weights = host.to_device(self._weights.float(), self.device)
        self.table: dict[str, ParameterSpec] = {p.name: p for p in objective.parameters(options, vocabulary)}
        self._config = megatron_config(options, layout, engine)
        rank = groups.get_pipeline_model_parallel_rank()
        self.stages = [
            Stage(objective, options, vocabulary, layout, self._config, engine, layout.chunk(rank, vp_stage)).to(self.device)
            for vp_stage in range(layout.vpp)
        ]
        self._load(seed)
        self._tied = [stage.tied_gradient(self.device) for stage in self.stages]
        self._gathers = AllGatherCounter() if layout.zero == 3 else None
        self._decide: Callable[[Tensor], float] = lambda norm: 1.0
        self.zero = self._shard(optimizer, engine)
        self.state = EngineState(self.zero, layout, self.named_parameters())
        """Views of master weights, Adam moments and EMA."""
        if engine.dtype != "float32":
            self._load_masters(seed)
        self._model_chunks = [
            ModelChunk(self.zero, stage, vp_stage, self._config) for vp_stage, stage in enumerate(self.stages)
        ]

    def named_parameters(self) -> Iterator[tuple[ParameterSpec, nn.Parameter]]:
        """This rank's parameters with their entries in the table, including a stage's copy of tied weights."""
        for stage in self.stages:
            for name, parameter in stage.named_parameters():
                yield self.table[global_name(name)], parameter

    def _load(self, seed: int) -> None:
        rank, size = groups.get_tensor_model_parallel_rank(), self.layout.tp
        with torch.no_grad():
            for entry, parameter in self.named_parameters():
                whole = entry.initial(seed)
                parameter.copy_(whole if entry.sharding is None else entry.sharding.shard(whole, rank, size))

    def _load_masters(self, seed: int) -> None:
        """Set the master weights to the exact initial values: DeepSpeed copied them from the model's rounded weights."""
        for local_shard in self.state.local_shards():
            whole = local_shard.entry.initial(seed)
            sharding = local_shard.entry.sharding
            shard = whole if sharding is None else sharding.shard(whole, local_shard.rank, local_shard.size)
            local_shard.values[WEIGHTS].copy_(shard.flatten()[local_shard.local_range.start : local_shard.local_range.stop])

    def _shard(self, optimizer: OptimizerOptions, engine: EngineOptions) -> Any:
        decayed: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        last_copy = self.layout.pp > 1 and groups.is_pipeline_last_stage(ignore_virtual=True)
        for entry, parameter in self.named_parameters():
            (decayed if entry.decay else others).append(parameter)
            # Each value counts once in the gradient norm: shards on their rank, replicas on the first tensor-parallel rank,
            # tied words on the first stage.
            copy = entry.tied and last_copy
            counted = entry.sharding is not None or groups.get_tensor_model_parallel_rank() == 0
            parameter.tensor_model_parallel = False  # type: ignore[attr-defined]
            # ZeRO-3 and Replicated read `model_parallel`, ZeRO-1 and -2 also `ds_pipe_replicated`.
            parameter.model_parallel = counted and not copy  # type: ignore[attr-defined]
            parameter.ds_pipe_replicated = copy  # type: ignore[attr-defined]
        chunks = ModelChunks(self.stages)
        param_groups = [
            {"params": members, "weight_decay": decay}
            for members, decay in ((decayed, optimizer.weight_decay), (others, 0.0))
            if members
        ]
        adam = specs.adamw(engine.optimizer)(
            param_groups, lr=optimizer.lr, betas=(optimizer.beta1, optimizer.beta2), eps=optimizer.eps
        )
        if self.layout.zero == 0:
            replicated = Replicated(chunks, adam, optimizer.max_grad_norm)
            replicated.decide = lambda norm: self._decide(norm)
            return replicated
        sharded = zero.shard(chunks, adam, self.layout, optimizer.max_grad_norm, engine.torch_dtype)
        deepspeed_patches.pause_before_update(sharded.optimizer, self.layout.zero, lambda norm: self._decide(norm))
        return sharded

    def _counts(self, batches: list[PaddedBatch[Tensor]]) -> Tensor:
        """Int64 [terms + 3] of the global batch: items of each term, samples, tokens, and pairs of tokens."""
        host_counts = [[*self.objective.counts(batch), batch.samples] for batch in batches]
        lengths = torch.cat([batch.lengths for batch in batches])
        counts = torch.cat(
            [
                host.to_device(torch.tensor(host_counts).sum(0), self.device),
                torch.stack([lengths.sum(), lengths.square().sum()]),
            ]
        )
        dist.all_reduce(counts, group=groups.get_data_parallel_group())
        return counts

    def _scale(self, counts: Tensor) -> Tensor:
        """Factors float32 [terms] from this rank's summed losses to its summands of the weighted global mean losses."""
        # ZeRO averages gradients over data-parallel ranks: times dp makes that a sum.
        return self._device_weights / counts[: len(self._weights)].clamp(min=1) * self.layout.dp

    def _run(self, batches: list[PaddedBatch[Tensor]], scale: Tensor, forward_only: bool) -> Tensor:
        """Sums float64 [terms, 3] of the global batch; unless ``forward_only``, gradients accumulate in the engine."""
        self.zero.train(not forward_only)
        masks = self._masks(batches, dropping=not forward_only)
        constants: list[dict[str, Tensor]] = [{} for _ in batches]
        if isinstance(self.objective, CoupledObjective):
            constants = survey(self.objective, self._model_chunks, batches, masks)
        finishes = [functools.partial(last_stage.losses, self.objective, scale, each) for each in constants]
        micro_batches = [MicroBatch(*each) for each in zip(batches, finishes, masks, strict=True)]
        sums = schedule.run(self._model_chunks, micro_batches, forward_only)
        return self._everywhere(sum(sums, torch.zeros(len(self._weights), 3, dtype=torch.float64, device=self.device)))

    def _masks(self, batches: list[PaddedBatch[Tensor]], dropping: bool) -> list[Masks | None]:
        """Dropout masks of a step's micro-batches; sequences are numbered over the global batch, rank by rank."""
        if not dropping or self._config.hidden_dropout == self._config.attention_dropout == 0:
            return [None] * len(batches)
        size = batches[0].rows
        first = groups.get_data_parallel_rank() * len(batches) * size
        return [Masks(self._seed, self.steps, first + number * size) for number in range(len(batches))]

    def _everywhere(self, sums: Tensor) -> Tensor:
        """All-reduce the last stage's sums over data-parallel ranks, and broadcast them to all stages."""
        dist.all_reduce(sums, group=groups.get_data_parallel_group())
        if self.layout.pp > 1:
            dist.broadcast(
                sums, groups.get_pipeline_model_parallel_last_rank(), group=groups.get_pipeline_model_parallel_group()
            )
        return sums

    def loss(self, sums: Tensor) -> float:
        """Weighted sum of the mean losses in ``sums`` [terms, 3] on the host; a term without items counts as 0."""
        return float((self._weights * sums[:, 0] / sums[:, 2].clamp(min=1)).sum())

    def _add_tied(self) -> None:
        """All-reduce the word embeddings' gradient over first and last stage, and hand the sum to the engine."""
        for vp_stage, tied in enumerate(self._tied):
            if tied is None:
                continue
            if self.layout.pp > 1 and self.objective.predicts_tokens:
                dist.all_reduce(tied.sum, group=groups.get_embedding_group())
            deepspeed_patches.begin_backward(self.zero(vp_stage, None), self.zero).backward()
            tied.sum.zero_()

    def step(self, batches: list[PaddedBatch[Tensor]], before_update: BeforeUpdate = lambda result: 1.0) -> StepResult:
        """One optimizer step on this rank's micro-batches: gradients, then ``before_update``, then the update.

        Without ZeRO, the host waits for the device once, for the argument of ``before_update``.
        """
        bytes_before = self._gathers.bytes if self._gathers else 0
        counts = self._counts(batches)
        sums = self._run(batches, self._scale(counts), forward_only=False)
        self._add_tied()
        results: list[StepResult] = []

        def decide(norm: Tensor) -> float:
            results.append(self._result(sums, norm, counts))
            return before_update(results[0])

        self._decide = decide
        self.zero.step()
        deepspeed_patches.forget_gradients(self.zero)
        self.steps += 1
        # The update gathers too, where weights are kept until it has changed them.
        return replace(results[0], allgather_bytes=self._gathers.bytes - bytes_before if self._gathers else 0)

    def _result(self, sums: Tensor, norm: Tensor, counts: Tensor) -> StepResult:
        """Copy results to the host in one transfer, since each transfer waits for the device."""
        terms = len(self._weights)
        numbers = torch.cat([sums.flatten(), norm.double().reshape(1), counts[terms:].double()]).cpu()
        sums = numbers[: 3 * terms].view(terms, 3)
        whole_norm, samples, tokens, pairs = numbers[3 * terms :].tolist()
        work = Work(int(tokens), int(pairs), tuple(int(count) for count in sums[:, 2]))
        return StepResult(sums, self.loss(sums), whole_norm, 0, int(samples), work)

    def evaluate(self, batches: list[PaddedBatch[Tensor]]) -> Tensor:
        """Sums float64 [terms, 3] over all data-parallel ranks' micro-batches, without dropout or update. Collective."""
        with torch.no_grad():
            return self._run(batches, torch.zeros(len(self._weights), device=self.device), forward_only=True)

    @torch.no_grad()
    def reference_outputs(self, batch: ReferenceBatch) -> dict[str, Tensor]:
        """The objective's outputs for the batch, without dropout, by name, on the CPU of every rank. Collective.

        Under sequence parallelism, the batch's length must be a multiple of the tensor-parallel size.
        """
        micro_batch = MicroBatch(batch.tensors(self.device), functools.partial(last_stage.reference_outputs, self.objective))
        self.zero.train(False)
        # Interleaved schedules need a multiple of pp micro-batches: repeat the batch.
        outputs = schedule.run(
            self._model_chunks, [micro_batch] * (self.layout.pp if self.layout.vpp > 1 else 1), forward_only=True
        )
        stages = RankGroup(groups.get_pipeline_model_parallel_group()) if self.layout.pp > 1 else RankGroup()
        return stages.broadcast(outputs[0] if outputs else None, self.layout.pp - 1)

    def close(self) -> None:
        """Release the engine: remove the gradient hooks that keep it and its process groups alive.

        ZeRO-3 of DeepSpeed 0.19.8 still keeps its groups, and with them gloo's threads.
        """
        self.zero.destroy()

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the following steps."""
        for group in self.zero.optimizer.param_groups:
            group["lr"] = lr
