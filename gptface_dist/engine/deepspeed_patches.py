"""Patches of DeepSpeed's ZeRO where it is silently wrong, or wasteful, under a pipeline.

They are checked with the DeepSpeed versions of :data:`CHECKED`; :func:`check_version` refuses others, since a patch of changed
internals would fail as silently as no patch. Each patch has a test that fails without it.
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
    """Refuse versions of DeepSpeed that the patches were not checked with."""
    if deepspeed.__version__ not in CHECKED:
        raise UserError(
            f"deepspeed {deepspeed.__version__} is not one of those the patches were checked with: {', '.join(CHECKED)}"
        )


def scope_trace_check(group: dist.ProcessGroup) -> None:
    """Patch 1: ZeRO-3 compares its trace of parameters over *all* ranks, but stages trace different ones at different times.

    Compare within the data-parallel group of the stage instead.
    """

    def same_within_group(values: list[int]) -> None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        # Parameter ids continue over the engines of a process: compare their order.
        local = torch.tensor([value - min(values) for value in values], dtype=torch.long, device=device)
        first = local.clone()
        dist.broadcast(first, dist.get_global_rank(group, 0), group=group)
        if not torch.equal(local, first):
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
    """Patch 2: DeepSpeed resets its gradient hooks in ``forward``, but in a pipeline backward passes follow each other.

    Applied to a stage's output, this resets them at the start of each backward pass. Without ZeRO it does nothing.
    """
    return _Boundary.apply(output, engine) if isinstance(engine, deepspeed.DeepSpeedEngine) else output


def forget_gradients(engine: Any) -> None:
    """Patch 3: ZeRO-3 copies a step's first gradients into its buffer and adds later ones; with several model chunks it adds
    the second chunk's first gradient to that of the last step. Zero the buffer between steps.
    """
    buffer = getattr(engine.optimizer, "grad_partitions_flat_buffer", None)
    if buffer is not None:
        buffer.zero_()


def keep_persistent(engine: Any) -> None:
    """Patch 4: ZeRO-3 frees even persistent weights after every use, unless modules run in the order of its trace, which
    they do not under a pipeline. Keep them until the optimizer changes them.
    """
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    name = "_PartitionedParameterCoordinator__release_param"
    release, release_all = getattr(coordinator, name), coordinator.release_and_reset_all

    def release_unless_persistent(parameter: Any, free_data: bool = True) -> None:
        if not parameter.ds_persist:
            release(parameter, free_data)

    def release_persistent(module: Any) -> None:
        setattr(coordinator, name, release)
        release_all(module)
        setattr(coordinator, name, release_unless_persistent)

    setattr(coordinator, name, release_unless_persistent)
    coordinator.release_and_reset_all = release_persistent


def pause_before_update(zero: Any, stage: int, decide: Callable[[torch.Tensor], float]) -> None:
    """Patch 6: ``step`` of ZeRO's optimizer computes the gradient norm and updates at once. Call ``decide`` in between.

    ``decide`` maps the norm (float32 scalar; infinite if not finite) to the factor of the clipped gradient; 0 skips the update
    as DeepSpeed does for overflowed gradients: weights, moments and their step count do not change.
    """
    norms, unscale = ("_get_norm_groups" if stage == 3 else "scaled_global_norm"), zero.unscale_and_clip_grads
    compute, update_scale = getattr(zero, norms), zero._update_scale
    state: dict[str, Any] = {}

    def keep_norm(*inputs: Any) -> Any:
        output = compute(*inputs)
        state["norm"] = combine_grad_norm_groups(output) if stage == 3 else output
        return output

    # ZeRO calls it between norm and update, and then skips the update if `overflow` is true.
    def decide_update(overflow: bool) -> None:
        update_scale(overflow)
        state["factor"] = decide(state.pop("norm"))
        zero.overflow = overflow or state["factor"] == 0

    def unscale_and_scale(gradients: Any, norm: Any) -> None:
        unscale(gradients, norm)
        if state["factor"] != 1:
            shards = [zero.fp32_partitioned_groups_flat[gradients].grad] if stage == 3 else gradients
            for shard in shards:
                shard.mul_(state["factor"])

    setattr(zero, norms, keep_norm)
    zero._update_scale, zero.unscale_and_clip_grads = decide_update, unscale_and_scale


@contextlib.contextmanager
def one_optimizer() -> Iterator[None]:
    """Patch 5, around DeepSpeed's initialisation: ZeRO-1 in bfloat16 with float32 gradients gets the optimizer of all other
    ZeRO-1 and -2 runs, not a separate one that lacks ``clear_backward_seen_flag`` and keeps its state elsewhere.
    """
    original = deepspeed.DeepSpeedEngine._do_optimizer_sanity_check
    deepspeed.DeepSpeedEngine._do_optimizer_sanity_check = lambda *_: ZERO_OPTIMIZATION
    try:
        yield
    finally:
        deepspeed.DeepSpeedEngine._do_optimizer_sanity_check = original
