"""The places where DeepSpeed's ZeRO is silently wrong under a pipeline, or wasteful, each mended in a few lines.

Checked with the DeepSpeed versions of :data:`CHECKED`; others are refused, since a bridge over internals that moved would
fail as silently as none. Each bridge has a test that fails when it is taken out.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator
from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION

from gptface_dist.errors import UserError

CHECKED = ("0.19.8",)


def check_version() -> None:
    """Refuse a DeepSpeed whose internals were not looked at."""
    if deepspeed.__version__ not in CHECKED:
        raise UserError(
            f"deepspeed {deepspeed.__version__} is not one of those the bridges were checked with: {', '.join(CHECKED)}"
        )


def scope_trace_check(group: dist.ProcessGroup) -> None:
    """Bridge 1: ZeRO-3 compares its trace of parameters over *all* ranks; stages trace different ones at different times.

    The comparison is kept, within the data-parallel group that shares the stage.
    """

    def same_within_group(values: list[int]) -> None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        # Numbers count on from engine to engine within a process: what is compared is their order.
        mine = torch.tensor([value - min(values) for value in values], dtype=torch.long, device=device)
        first = mine.clone()
        dist.broadcast(first, dist.get_global_rank(group, 0), group=group)
        if not torch.equal(mine, first):
            raise RuntimeError("data-parallel ranks of one stage use their parameters in different orders")

    coordinator.assert_ints_same_as_other_ranks = same_within_group


class _Boundary(torch.autograd.Function):
    """Identity; its backward runs first in each micro-batch's backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, engine: Any) -> torch.Tensor:
        ctx.engine = engine
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.engine.optimizer.clear_backward_seen_flag()
        return gradients[0], None


def begin_backward(output: torch.Tensor, engine: Any) -> torch.Tensor:
    """Bridge 2: DeepSpeed readies its gradient hooks in ``forward``; in a pipeline, backward passes follow each other.

    Put on a stage's output, this readies them before each backward pass instead. Without ZeRO there is nothing to ready.
    """
    return _Boundary.apply(output, engine) if isinstance(engine, deepspeed.DeepSpeedEngine) else output


def forget_gradients(engine: Any) -> None:
    """Bridge 3: ZeRO-3 copies a step's first gradients into its buffer and adds the later ones; with several model chunks
    the first gradient of the second chunk is added to what the last step left. Empty the buffer between steps.
    """
    buffer = getattr(engine.optimizer, "grad_partitions_flat_buffer", None)
    if buffer is not None:
        buffer.zero_()


def keep_persistent(engine: Any) -> None:
    """Bridge 4: ZeRO-3 lets go of persistent weights too after every use, unless modules run in the order they once ran in,
    which under a pipeline they do not. Keep them until the optimizer changes them.
    """
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    name = "_PartitionedParameterCoordinator__release_param"
    release, release_all = getattr(coordinator, name), coordinator.release_and_reset_all

    def release_passing(parameter: Any, free_data: bool = True) -> None:
        if not parameter.ds_persist:
            release(parameter, free_data)

    def release_really(module: Any) -> None:
        setattr(coordinator, name, release)
        release_all(module)
        setattr(coordinator, name, release_passing)

    setattr(coordinator, name, release_passing)
    coordinator.release_and_reset_all = release_really


def pause_before_update(zero: Any, stage: int, decide: Callable[[torch.Tensor], float]) -> None:
    """Patch 6: ``step`` of ZeRO's optimizer computes the gradient's norm and updates in one go. Ask in between.

    ``decide`` is given the norm (float32 scalar; infinite where it is no number) and returns the factor of the clipped
    gradient; 0 skips the update as DeepSpeed skips one whose gradients overflowed: weights, moments and their step count stay.
    """
    norms, unscale = ("_get_norm_groups" if stage == 3 else "scaled_global_norm"), zero.unscale_and_clip_grads
    compute, update_scale = getattr(zero, norms), zero._update_scale
    state: dict[str, Any] = {}

    def keep_norm(*inputs: Any) -> Any:
        output = compute(*inputs)
        state["norm"] = combine_grad_norm_groups(output) if stage == 3 else output
        return output

    # Called with the norm known and nothing changed yet, and what it leaves in `overflow` counts.
    def ask(overflow: bool) -> None:
        update_scale(overflow)
        state["factor"] = decide(state.pop("norm"))
        zero.overflow = overflow or state["factor"] == 0

    def unscale_and_scale(gradients: Any, norm: Any) -> None:
        unscale(gradients, norm)
        if state["factor"] != 1:
            parts = [zero.fp32_partitioned_groups_flat[gradients].grad] if stage == 3 else gradients
            for part in parts:
                part.mul_(state["factor"])

    setattr(zero, norms, keep_norm)
    zero._update_scale, zero.unscale_and_clip_grads = ask, unscale_and_scale


@contextlib.contextmanager
def one_optimizer() -> Iterator[None]:
    """While DeepSpeed is initialised: ZeRO-1 in bfloat16 with float32 gradients gets the optimizer of all other ZeRO-1 and -2
    runs, instead of one of its own that does not know of ``clear_backward_seen_flag`` and keeps its state elsewhere.
    """
    choose = deepspeed.DeepSpeedEngine._do_optimizer_sanity_check
    deepspeed.DeepSpeedEngine._do_optimizer_sanity_check = lambda *_: ZERO_OPTIMIZATION
    try:
        yield
    finally:
        deepspeed.DeepSpeedEngine._do_optimizer_sanity_check = choose
