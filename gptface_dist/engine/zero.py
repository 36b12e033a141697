"""DeepSpeed's ZeRO around the model chunks of one pipeline rank."""

import warnings
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from megatron.core import parallel_state as groups
from torch import nn

from gptface_dist.engine import deepspeed_patches
from gptface_dist.parallel.layout import Layout

PER_STEP = 10**15
"""Persistence threshold above the size of every parameter: ZeRO-3 then gathers weights once a step."""


def shard(chunks: nn.Module, adam: torch.optim.Optimizer, layout: Layout, clip: float, dtype: torch.dtype) -> Any:
    """Wrap ``chunks`` in DeepSpeed's engine at ZeRO stage 1, 2 or 3; ``adam`` must have the parameters of ``chunks``."""
    zero: dict[str, Any] = {"stage": layout.zero, "overlap_comm": False}
    if not layout.reshard_after_forward:
        zero |= {"stage3_param_persistence_threshold": PER_STEP, "stage3_model_persistence_threshold": PER_STEP}
    else:
        # Gather at each use, without reuse or prefetch: DeepSpeed plans both by the order in which modules ran before, which
        # changes under a pipeline.
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    if layout.zero == 3:
        deepspeed_patches.scope_trace_check(groups.get_data_parallel_group())
    with warnings.catch_warnings(), deepspeed_patches.one_optimizer():
        warnings.simplefilter("ignore")
        engine, *_ = deepspeed.initialize(
            model=chunks,
            optimizer=adam,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                # The schedule owns micro-batches: DeepSpeed must not divide losses by their number.
                "managed_gradient_accumulation": False,
                "zero_optimization": zero,
                "gradient_clipping": clip,
                "bf16": {"enabled": dtype == torch.bfloat16},
                # Accumulate and reduce gradients in float32, whatever their dtype.
                "data_types": {"grad_accum_dtype": "fp32"},
                "communication_data_type": "fp32",
                "zero_allow_untested_optimizer": True,
            },
            mpu=_Groups(),
        )
    if not layout.reshard_after_forward:
        deepspeed_patches.keep_persistent(engine)
    return engine


class _Groups:
    """megatron-core's process groups under DeepSpeed's names (its ``mpu`` argument)."""

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
