"""Starting and ending the process groups of a layout."""

import datetime

import deepspeed
import torch
from megatron.core import parallel_state, tensor_parallel

from gptface_dist import host
from gptface_dist.layout import Layout


def start(layout: Layout, seed: int, timeout_s: float = 600.0) -> None:
    """Process groups for a layout that was checked; ranks come from the environment (torchrun's variables)."""
    host.without_cuda()
    deepspeed.init_distributed(host.backend(), timeout=datetime.timedelta(seconds=timeout_s), verbose=False)
    parallel_state.initialize_model_parallel(
        layout.tp,
        layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        distributed_timeout_minutes=max(1, int(timeout_s / 60)),
    )
    torch.manual_seed(seed)
    if torch.cuda.is_available():
        tensor_parallel.model_parallel_cuda_manual_seed(seed)


def stop_layout() -> None:
    """End the groups of a layout; the world stays."""
    parallel_state.destroy_model_parallel()
