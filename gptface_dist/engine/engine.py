"""One optimizer step of the composed whole."""

import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import deepspeed
import torch
import torch.distributed as dist
from megatron.core import parallel_state as groups
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from gptface_dist import host
from gptface_dist.data.batch import Batch
from gptface_dist.engine import bridges
from gptface_dist.engine.options import EngineOptions, LossWeights, OptimizerOptions
from gptface_dist.layout import Layout
from gptface_dist.model.names import Parameter, parameters
from gptface_dist.model.options import ModelOptions
from gptface_dist.model.stage import Stage, global_name
from gptface_dist.model.stage_layer import megatron_config
from gptface_dist.model.stage_words import TiedGradient
from gptface_dist.sequence import IGNORE
from gptface_dist.tokenizers.vocabulary import Vocabulary

PER_STEP = 10**15
"""A persistence threshold above every parameter: ZeRO-3 then gathers weights once a step."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step found; the same on every rank."""

    sums: Tensor
    """Float64 [3, 3] over the global batch: (summed loss, correct, count) of text, image and match."""
    loss: float
    """Weighted sum of the three mean losses."""
    norm: float
    """Norm of the whole gradient before clipping."""


class _Chunks(nn.Module):
    """The model chunks of one pipeline rank under one engine."""

    def __init__(self, stages: list[Stage]):
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def forward(self, turn: int, batch: Batch[Tensor] | None, scale: Tensor | None) -> Any:
        stage = cast(Stage, self.stages[turn])
        return stage.tied_scalar() if batch is None else stage(batch, scale)


class _Turn(nn.Module):
    """One model chunk as megatron-core's schedules want to see it."""

    def __init__(self, engine: Any, stage: Stage, turn: int, config: Any):
        super().__init__()
        # Kept out of this module's own submodules: the engine owns the parameters.
        self.__dict__.update(engine=engine, stage=stage)
        self.vp_stage: int | None = turn if config.virtual_pipeline_model_parallel_size else None
        self.turn, self.config, self.model_type = turn, config, ModelType.encoder_or_decoder

    def set_input_tensor(self, received: list[Tensor | None]) -> None:
        self.__dict__["stage"].receive(received[0])

    def forward(self, batch: Batch[Tensor], scale: Tensor) -> Any:
        engine = self.__dict__["engine"]
        output = engine(self.turn, batch, scale)
        if self.__dict__["stage"].last:
            loss, sums = output
            return bridges.begin_backward(loss, engine), sums
        return bridges.begin_backward(output, engine)


class Engine:
    """The distributed model with its optimizer.

    Process groups must exist (:func:`gptface_dist.engine.groups.start`).
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
        bridges.check_version()
        host.without_cuda()
        self.layout, self._weights, self.clip = layout, weights, optimizer.clip
        self.before_update: Callable[[], None] | None = None
        """Called when a step's gradients are complete, before they are clipped and used."""
        self.device = host.device()
        self.table: dict[str, Parameter] = {p.name: p for p in parameters(options, vocabulary)}
        self._config = megatron_config(options, layout, engine.torch_dtype)
        rank = groups.get_pipeline_model_parallel_rank()
        self.stages = [
            Stage(options, vocabulary, layout, self._config, layout.chunk(rank, turn)).to(self.device)
            for turn in range(layout.vpp)
        ]
        self._load(seed)
        self._tied = [stage.tied_gradient(self.device) for stage in self.stages]
        self.engine = self._shard(_Chunks(self.stages), optimizer, engine.torch_dtype)
        self._turns = [_Turn(self.engine, stage, turn, self._config) for turn, stage in enumerate(self.stages)]

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

    def _shard(self, chunks: _Chunks, options: OptimizerOptions, dtype: torch.dtype) -> Any:
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
            # ZeRO-3 asks the first of these, ZeRO-1 and -2 also the second.
            parameter.model_parallel = here and not copy  # type: ignore[attr-defined]
            parameter.ds_pipe_replicated = copy  # type: ignore[attr-defined]
        adam = torch.optim.AdamW(
            [
                {"params": kept, "weight_decay": decay}
                for kept, decay in ((decayed, options.weight_decay), (others, 0.0))
                if kept
            ],
            lr=options.lr,
            betas=(options.beta1, options.beta2),
            eps=options.eps,
        )
        zero: dict[str, Any] = {"stage": self.layout.zero, "overlap_comm": False}
        if self.layout.gathering == "per_step":
            zero |= {"stage3_param_persistence_threshold": PER_STEP, "stage3_model_persistence_threshold": PER_STEP}
        else:
            zero |= {"stage3_param_persistence_threshold": 0}
        if self.layout.zero == 3:
            bridges.scope_trace_check(groups.get_data_parallel_group())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine, *_ = deepspeed.initialize(
                model=chunks,
                optimizer=adam,
                config={
                    "train_micro_batch_size_per_gpu": 1,
                    "gradient_accumulation_steps": 1,
                    # The schedule owns micro-batches; nothing is divided behind our back.
                    "managed_gradient_accumulation": False,
                    "zero_optimization": zero,
                    "gradient_clipping": options.clip,
                    "bf16": {"enabled": dtype == torch.bfloat16},
                    "zero_allow_untested_optimizer": True,
                },
                mpu=_Groups(),
            )
        return engine

    def _scale(self, batches: list[Batch[Tensor]]) -> Tensor:
        """Factors float32 [3] that turn this rank's summed losses into its part of the global mean losses."""
        counts = torch.zeros(3, dtype=torch.long, device=self.device)
        for batch in batches:
            text = batch.labels < self.stages[0].vocabulary.image_offset
            predicted = batch.labels != IGNORE
            pairs = torch.tensor(len(batch.matched), device=self.device)
            counts += torch.stack([(predicted & text).sum(), (predicted & ~text).sum(), pairs])
        dist.all_reduce(counts, group=groups.get_data_parallel_group())
        # The engine averages gradients over data-parallel ranks; these are parts of a sum.
        return self._factors(torch.float32) / counts.clamp(min=1) * self.layout.dp

    def _run(self, batches: list[Batch[Tensor]], scale: Tensor, forward_only: bool) -> Tensor:
        """The schedule over a step's micro-batches; gradients stay in the engine. Returns this rank's sums."""
        length = max(batch.tokens.shape[1] for batch in batches)
        padded = [pad(batch, length) for batch in batches]
        iterators = [iter(padded) for _ in self.stages]
        self.engine.train(not forward_only)
        with host.schedules():
            found = get_forward_backward_func()(
                forward_step_func=functools.partial(_forward_step, scale=scale),
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self._turns if len(self._turns) > 1 else self._turns[0],
                num_microbatches=len(padded),
                seq_length=length,
                micro_batch_size=len(batches[0].matched),
                forward_only=forward_only,
            )
        return self._everywhere(sum(found, torch.zeros(3, 3, dtype=torch.float64, device=self.device)))

    def _everywhere(self, sums: Tensor) -> Tensor:
        """The last stage's sums, added over data-parallel ranks, on every rank."""
        dist.all_reduce(sums, group=groups.get_data_parallel_group())
        if self.layout.pp > 1:
            dist.broadcast(
                sums, groups.get_pipeline_model_parallel_last_rank(), group=groups.get_pipeline_model_parallel_group()
            )
        return sums

    def loss(self, sums: Tensor) -> float:
        """Weighted sum of the mean losses in ``sums`` [3, 3]; a loss that nothing was supervised for counts as 0."""
        return float((self._factors(torch.float64) * sums[:, 0] / sums[:, 2].clamp(min=1)).sum())

    def _add_tied(self) -> None:
        """Add the parts of the word embeddings' gradient and hand the sum to the engine."""
        mine: list[tuple[int, TiedGradient]] = [(turn, tied) for turn, tied in enumerate(self._tied) if tied is not None]
        for turn, tied in mine:
            if self.layout.pp > 1:
                dist.all_reduce(tied.sum, group=groups.get_embedding_group())
            bridges.begin_backward(self.engine(turn, None, None), self.engine).backward()
            tied.sum.zero_()

    def step(self, batches: list[Batch[Tensor]]) -> StepResult:
        """One optimizer step on this rank's micro-batches."""
        sums = self._run(batches, self._scale(batches), forward_only=False)
        self._add_tied()
        if self.before_update is not None:
            self.before_update()
        self.engine.step()
        bridges.forget_gradients(self.engine)
        return StepResult(sums, self.loss(sums), float(self.engine.get_global_grad_norm()))

    def evaluate(self, batches: list[Batch[Tensor]]) -> Tensor:
        """Sums float64 [3, 3] over all data-parallel ranks' micro-batches, without dropout; nothing is learned."""
        with torch.no_grad():
            return self._run(batches, torch.zeros(3, device=self.device), forward_only=True)

    def set_lr(self, lr: float) -> None:
        """Learning rate of the following steps."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr

    def _factors(self, dtype: torch.dtype) -> Tensor:
        return torch.tensor([self._weights.text, self._weights.image, self._weights.match], dtype=dtype, device=self.device)


def _forward_step(batches: Iterator[Batch[Tensor]], model: _Turn, scale: Tensor) -> Any:
    output = model(next(batches), scale)
    if not isinstance(output, tuple):
        return output, None
    loss, sums = output
    return loss, lambda loss: (loss, torch.ones((), dtype=torch.int), sums)


def pad(batch: Batch[Tensor], length: int) -> Batch[Tensor]:
    """The batch with more padding: the schedule wants one shape for a step's micro-batches."""
    more = length - batch.tokens.shape[1]
    if more == 0:
        return batch
    grow = functools.partial(nn.functional.pad, pad=(0, more))
    return replace(
        batch,
        tokens=grow(batch.tokens),
        labels=grow(batch.labels, value=IGNORE),
        segments=grow(batch.segments),
        positions=nn.functional.pad(batch.positions, (0, 0, 0, more)),
    )


class _Groups:
    """megatron-core's process groups under the names that DeepSpeed asks for (``mpu``)."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("get_model_parallel"):
            group = groups.get_model_parallel_group()
            return {
                "get_model_parallel_group": lambda: group,
                "get_model_parallel_rank": lambda: dist.get_rank(group),
                "get_model_parallel_world_size": lambda: dist.get_world_size(group),
            }[name]
        if name.startswith(("get_tensor_model_parallel", "get_pipeline_model_parallel", "get_data_parallel")):
            return getattr(groups, name)
        raise AttributeError(name)
