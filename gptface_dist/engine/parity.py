"""Parity check: losses, all gradients and the gradient norm of a layout against the plain model in one process.

Both train on the same synthetic batches, the plain model on the CPU and in float64 (:mod:`parity_reference`).
"""

import functools
import gc
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gptface_dist import host
from gptface_dist.differences import largest, relative
from gptface_dist.distributed.collectives import RankGroup
from gptface_dist.distributed.rank import RankInfo
from gptface_dist.distributed.spawn import spawn
from gptface_dist.engine.parity_case import VOCABULARY, Case, batches
from gptface_dist.engine.parity_reference import (
    FLOOR,
    TOLERANCE,
    gradient_error,
    reference_steps,
    rounding,
    tolerance,
    without_layout,
)
from gptface_dist.parallel import libraries, specs
from gptface_dist.parallel.options import OptimizerOptions

OPTIMIZER = OptimizerOptions(eps=1e-4)
"""A large eps: otherwise AdamW turns rounding noise in vanishing gradients into whole steps."""


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
    rounding: float = 0.0
    """Largest relative error of the plain model itself in the layout's dtype."""
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


def compare(case: Case) -> ParityResult:
    """Run a case on this rank and compare it with the plain model; the layout's process groups must exist."""
    from megatron.core import parallel_state as groups

    from gptface_dist.checkpoint.local_shard import WEIGHTS
    from gptface_dist.engine.engine import Engine
    from gptface_dist.engine.gradients import GradientReader

    engine = Engine(case.objective, case.model, VOCABULARY, case.layout, case.seed, OPTIMIZER, case.engine)
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
    parity = ParityResult(str(case), tolerance=tolerance(case, 0.0))
    rank, each = groups.get_data_parallel_rank(), case.micro_batches // case.layout.dp
    for step, truth in enumerate(reference_steps(without_layout(case), OPTIMIZER)):
        local = batches(case, step, engine.device)[rank * each : (rank + 1) * each]
        result = engine.step(local, reader.before_update)
        parity.losses.append(result.loss)
        parity.gathered.append(result.allgather_bytes)
        parity.loss = largest([parity.loss, relative(result.loss, truth.loss)])
        parity.norm = largest([parity.norm, relative(result.grad_norm, truth.norm)])
        for entry, gradient in reader.gradients():
            whole = truth.gradients[entry.name]
            if entry.sharding is not None:
                whole = entry.sharding.shard(whole, groups.get_tensor_model_parallel_rank(), case.layout.tp)
            error = gradient_error(gradient.cpu(), whole, truth.norm, FLOOR[case.engine.dtype])
            parity.compared += 1
            if math.isnan(error) or error > parity.gradient:
                parity.gradient, parity.worst = error, f"{entry.name} at step {step}"
    engine.close()
    return parity


def merged(results: Sequence[ParityResult]) -> ParityResult:
    """The results of all ranks in rank order as one: the largest errors, and losses and bytes of the last rank."""
    worst = max(results, key=lambda result: (math.isnan(result.gradient), result.gradient))
    return replace(
        results[-1],
        loss=largest(result.loss for result in results),
        norm=largest(result.norm for result in results),
        gradient=worst.gradient,
        worst=worst.worst,
        compared=sum(result.compared for result in results),
    )


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
            # Outside of the gathering, which would keep a failed rank waiting for those that wait for it.
            local = asdict(compare(case))
            gathered: list[dict[str, Any]] = RankGroup(dist.group.WORLD).all_gather(functools.partial(dict, local))
            if rank_info.rank == 0:
                worst = merged([ParityResult(**each) for each in gathered])
                worst.rounding = rounding(case, OPTIMIZER)
                worst.tolerance = tolerance(case, worst.rounding)
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
