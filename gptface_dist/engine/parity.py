"""Parity check: losses, all gradients and the gradient norm of a layout against the plain model in one process.

Both train on the same synthetic batches, the plain model always on the CPU in float32. The relative error of a gradient is
``|g - w| / max(|w|, floor |all gradients|)`` in the 2-norm; the floor is for parameters whose true gradient vanishes (a bias
before a softmax that ignores it).
"""

import functools
import gc
import itertools
import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from gptface_dist import host
from gptface_dist.data.batch import BatchOptions
from gptface_dist.data.made_up import made_up_block
from gptface_dist.data.masking import MaskingOptions
from gptface_dist.data.options import DataConfig
from gptface_dist.data.stream import StreamOptions
from gptface_dist.distributed.rank import RankInfo
from gptface_dist.distributed.spawn import spawn
from gptface_dist.model.dropout import Masks
from gptface_dist.model.options import ModelOptions
from gptface_dist.model.parameters import initialise, parameters
from gptface_dist.model.plain import Transformer
from gptface_dist.objectives.milm_itm import MilmItm
from gptface_dist.objectives.objective import CoupledObjective, LossSum, Objective
from gptface_dist.parallel import libraries, specs
from gptface_dist.parallel.layout import ZERO_STAGES, Layout
from gptface_dist.parallel.options import EngineOptions, OptimizerOptions
from gptface_dist.sequence import PaddedBatch
from gptface_dist.tokenizers.vocabulary import Vocabulary

VOCABULARY = Vocabulary(text_size=43, image_codes=24, text_sha256="a" * 64, image_sha256="b" * 64)
"""67 + 4 ids, which no tensor-parallel size above 1 divides."""
GRID = (4, 4)
TEXT_LENGTH = 20
SAMPLES = 16
"""Default number of samples in the global batch."""
FLOOR = {"float32": 1e-3, "bfloat16": 0.1}
"""Floor of the denominator of relative errors, by dtype."""
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.1}
"""Largest relative error of loss, norm and gradients, by dtype."""
MODEL = ModelOptions(layers=4, hidden=16, heads=4, ffn=24, text_positions=32, rows=4, columns=4, init_std=0.3)


@dataclass(frozen=True)
class Case:
    """A configuration to compare with the plain model."""

    layout: Layout
    """Layout of the distributed model."""
    model: ModelOptions = MODEL
    """Size and form of the model."""
    steps: int = 3
    """Number of optimizer steps."""
    micro_batches: int = 8
    """Micro-batches of the global batch, over all replicas."""
    size: int = SAMPLES // 8
    """Sequences of a micro-batch."""
    seed: int = 0
    """Seed of weights, batches and dropout."""
    engine: EngineOptions = EngineOptions()  # noqa: RUF009 (frozen)
    """Precision, kernels and recomputation of the distributed model."""
    tolerance: float | None = None
    """Largest relative error; None: :data:`TOLERANCE` of the dtype."""
    objective: Objective = MilmItm()  # noqa: RUF009 (frozen)
    """Training objective."""

    def __str__(self) -> str:
        words = [*([self.objective.name] * (self.objective.name != MilmItm.name)), str(self.layout)]
        if self.model.hidden_dropout or self.model.attention_dropout:
            words.append("dropout")
        if self.engine.recompute != "none":
            words.append(f"recompute {self.engine.recompute}")
        if self.engine.dtype != "float32":
            words.append(self.engine.dtype)
        return ", ".join(words)


@dataclass
class ParityResult:
    """Errors of a layout against the plain model: the largest of all steps and ranks."""

    layout: str
    """``str`` of the case: the layout and options other than the defaults."""
    loss: float = 0.0
    """Relative error of the loss."""
    norm: float = 0.0
    """Relative error of the gradient's norm."""
    gradient: float = 0.0
    """Largest relative error of a gradient."""
    worst: str = ""
    """Parameter of that gradient, and the step."""
    compared: int = 0
    """Number of compared gradients, over all steps and ranks."""
    tolerance: float = TOLERANCE["float32"]
    """Largest accepted relative error."""
    losses: list[float] = field(default_factory=list)
    """Losses of the layout, by step."""
    gathered: list[int] = field(default_factory=list)
    """Bytes that ZeRO-3 gathered on the last rank, by step."""

    def ok(self) -> bool:
        """Whether gradients were compared and all errors are finite and within the tolerance."""
        errors = (self.loss, self.norm, self.gradient)
        return self.compared > 0 and all(math.isfinite(error) and error <= self.tolerance for error in errors)


def matrix() -> list[Case]:
    """Legal combinations of {TP 1, 2} x {PP 1, 2} x {VPP 1, 2} x {SP} x {ZeRO 0..3}, with DP 2 each: 8 processes at most."""
    axes = itertools.product((1, 2), (1, 2), (1, 2), (False, True), ZERO_STAGES)
    cases = [Case(Layout(2, tp, pp, vpp, sp, zero)) for tp, pp, vpp, sp, zero in axes]
    return [case for case in cases if not any(case.layout.problems(case.model, case.micro_batches // case.layout.dp))]


def batches(case: Case, step: int, device: torch.device | str = "cpu") -> list[PaddedBatch[Tensor]]:
    """Global batch of a step, with synthetic captions and pictures of varying length; its third micro-batch has no captions."""
    rng = np.random.default_rng([case.seed, step])
    micro_batches = []
    for number in range(case.micro_batches):
        masking = MaskingOptions(captioning_ratio=0.0, text_dropout=1.0) if number == 2 else MaskingOptions()
        batch = BatchOptions(text_length=TEXT_LENGTH, pad_to_multiple_of=4)
        data = DataConfig("", [], order=StreamOptions(case.seed), masking=masking, batch=batch)
        block = made_up_block(rng, VOCABULARY, GRID, TEXT_LENGTH, number, case.size, str(step))
        micro_batches.append(case.objective.collate(data, VOCABULARY, GRID)([block]).tensors(device))
    return micro_batches


def plain_losses(case: Case, model: Transformer, step: int) -> list[LossSum]:
    """The objective's losses of the plain model over the global batch of a step, in one process."""
    losses, surveyed = [], []
    for number, batch in enumerate(batches(case, step)):
        masks = Masks(case.seed, step, number * batch.rows)
        features = model.encode(case.objective.embed(model.embeddings, batch), batch.lengths, masks)
        if isinstance(case.objective, CoupledObjective):
            surveyed.append(case.objective.survey(features, batch, model))
        else:
            losses.append(case.objective.losses(features, batch, model, {}))
    if isinstance(case.objective, CoupledObjective):
        return case.objective.coupled_losses({name: torch.cat([each[name] for each in surveyed]) for name in surveyed[0]})
    return [LossSum(*(sum(parts[1:], parts[0]) for parts in zip(*term, strict=True))) for term in zip(*losses, strict=True)]


@functools.lru_cache(maxsize=4)
def reference_steps(case: Case, optimizer: OptimizerOptions) -> list[tuple[float, float, dict[str, Tensor]]]:
    """Loss, gradient norm and gradients (both before clipping) of the plain model, by step.

    Cached: cases that differ only in layout and engine options share it if the caller resets these.
    """
    model = case.objective.model(case.model, VOCABULARY)
    initialise(model, case.seed)
    decay = {p.name: optimizer.weight_decay if p.decay else 0.0 for p in parameters(model)}
    adam = torch.optim.AdamW(
        [{"params": [p], "weight_decay": decay[name]} for name, p in model.named_parameters()],
        lr=optimizer.lr,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.eps,
    )
    steps = []
    for step in range(case.steps):
        adam.zero_grad()
        losses = zip(plain_losses(case, model, step), case.objective.weights.values(), strict=True)
        loss = sum((weight * each.loss / max(1, each.items) for each, weight in losses), torch.zeros(()))
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer.max_grad_norm)
        adam.step()
        steps.append((loss.item(), norm.item(), gradients))
    return steps


def compare(case: Case) -> ParityResult:
    """Run a case on this rank and compare it with the plain model; the layout's process groups must exist."""
    from megatron.core import parallel_state as groups

    from gptface_dist.checkpoint.local_shard import WEIGHTS
    from gptface_dist.engine.engine import Engine
    from gptface_dist.engine.gradients import GradientReader

    # A large eps: otherwise AdamW turns rounding noise in vanishing gradients into whole steps.
    optimizer = OptimizerOptions(eps=1e-4)
    engine = Engine(case.objective, case.model, VOCABULARY, case.layout, case.seed, optimizer, case.engine)
    for local_shard in engine.state.local_shards():
        whole = local_shard.entry.initial(case.seed)
        shard = (
            whole
            if local_shard.entry.sharding is None
            else local_shard.entry.sharding.shard(whole, local_shard.rank, local_shard.size)
        )
        if not torch.equal(
            shard.flatten()[local_shard.local_range.start : local_shard.local_range.stop], local_shard.values[WEIGHTS].cpu()
        ):
            raise RuntimeError(f"{case}: the optimizer's {local_shard.entry.name} does not begin with its initial value")
    reader = GradientReader(engine)
    parity = ParityResult(str(case), tolerance=case.tolerance or TOLERANCE[case.engine.dtype])
    rank, each = groups.get_data_parallel_rank(), case.micro_batches // case.layout.dp
    plain = replace(case, layout=Layout(zero=0), engine=EngineOptions(), tolerance=None)
    for step, (loss, norm, wanted) in enumerate(reference_steps(plain, optimizer)):
        local = batches(case, step, engine.device)[rank * each : (rank + 1) * each]
        result = engine.step(local, reader.before_update)
        parity.losses.append(result.loss)
        parity.gathered.append(result.allgather_bytes)
        parity.loss = max(parity.loss, abs(result.loss - loss) / abs(loss))
        parity.norm = max(parity.norm, abs(result.grad_norm - norm) / norm)
        for entry, gradient in reader.gradients():
            whole = wanted[entry.name]
            if entry.sharding is not None:
                whole = entry.sharding.shard(whole, groups.get_tensor_model_parallel_rank(), case.layout.tp)
            error = float((gradient.cpu() - whole).norm() / max(float(whole.norm()), FLOOR[case.engine.dtype] * norm))
            parity.compared += 1
            if not error <= parity.gradient:
                parity.gradient, parity.worst = error, f"{entry.name} at step {step}"
    engine.close()
    return parity


def work(rank_info: RankInfo, cases: list[Case], out: str, timeout_s: float = 300) -> None:
    """Run all cases of a world size on this process; rank 0 appends the worst result of all ranks to ``out`` as JSON lines."""
    # Without it, DeepSpeed and megatron-core print messages once per process.
    with libraries.quiet_imports():
        libraries.import_libraries()
        from gptface_dist.engine import engine
        from gptface_dist.parallel import groups

        del engine  # Imported for its imports: DeepSpeed collects garbage with each engine, and frozen modules are skipped.
        gc.freeze()
        groups.join(rank_info, None, timeout_s)
        for case in cases:
            groups.start(case.layout, case.seed, timeout_s=timeout_s)
            results: list[Any] = [None] * rank_info.world
            dist.all_gather_object(results, compare(case))
            if rank_info.rank == 0:
                worst = max(results, key=lambda result: result.gradient)
                worst.loss, worst.norm = max(result.loss for result in results), max(result.norm for result in results)
                worst.gathered = results[-1].gathered
                worst.compared = sum(result.compared for result in results)
                with Path(out).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(worst)) + "\n")
            groups.stop_layout()
        groups.stop()


def run_parity(cases: list[Case], out: Path) -> list[ParityResult]:
    """Compare all cases in spawned processes, the smallest worlds first; results also go to ``out`` as JSON lines.

    Each world size gets new processes, since ZeRO-3 leaves threads behind (:meth:`Engine.close`).
    """
    out.unlink(missing_ok=True)
    for case in cases:
        specs.check(case.engine, case.model, case.layout)
        case.layout.check(case.layout.world, case.model, case.micro_batches // case.layout.dp)
        host.check_gpus(case.layout.world)
    for world in sorted({case.layout.world for case in cases}):
        spawn(work, world, [case for case in cases if case.layout.world == world], str(out))
    return [ParityResult(**json.loads(line)) for line in out.read_text(encoding="utf-8").splitlines()]
