"""Starting and ending the process groups of a layout."""

import datetime
import gc
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
from megatron.core import parallel_state, tensor_parallel
from torch.distributed import distributed_c10d

from gptface_dist import host
from gptface_dist.distributed.rank import RankInfo
from gptface_dist.distributed.shutdown import shutdown
from gptface_dist.parallel import libraries
from gptface_dist.parallel.layout import Layout


def join(rank_info: RankInfo, store: Any, timeout_s: float) -> None:
    """Form the world of all processes that meet in ``store``; without one, at the address of ``rank_info``. On GPUs, each
    process takes its own (:func:`host.set_device`).

    :class:`UserError` where this process has no GPU, or one that another rank has too.
    """
    host.set_device(rank_info.local_rank)
    rank_info.export()
    timeout = datetime.timedelta(seconds=timeout_s)
    dist.init_process_group(host.backend(), store=store, rank=rank_info.rank, world_size=rank_info.world, timeout=timeout)
    host.refuse_shared_gpu(distributed_c10d._get_default_store(), rank_info.rank)


def start(layout: Layout, seed: int, timeout_s: float = 600.0) -> None:
    """Process groups for a layout that was checked, in the world that was joined (:func:`join`)."""
    libraries.patch_megatron_for_cpu()
    # On CPUs DeepSpeed (0.19.8) would compile an all-reduce for inference first, for a minute, and where two installations
    # share a home folder, again each time they take turns. Training never calls it.
    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
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
    """End the groups of a layout, whose engine is no longer used; the world stays."""
    parallel_state.destroy_model_parallel()
    # ZeRO-3 replaces this function for the whole process. With it, gradients arrive in another order; should only some
    # ranks of a later layout have it, ZeRO-1 and -2, which reduce in the order of arrival, would mix parameters up.
    torch.nn.functional.linear = torch._C._nn.linear
    # megatron-core forgets its groups without ending them. There are some forty, gloo gives each its threads, and an engine
    # that is garbage keeps them all.
    gc.collect()
    for group in list(distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            deepspeed.comm.destroy_process_group(group)


def data() -> dist.ProcessGroup:
    """The ranks that hold the same part of the model and read other data."""
    return parallel_state.get_data_parallel_group()


def stop() -> None:
    """End the world; this process may start another one."""
    shutdown()
    # DeepSpeed would take the ended world for a running one.
    deepspeed.comm.comm.cdb = None
