"""Creation and destruction of the process groups of a layout."""

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
from gptface_dist.distributed import rendezvous
from gptface_dist.distributed.rank import RankInfo
from gptface_dist.distributed.shutdown import shutdown
from gptface_dist.parallel import libraries
from gptface_dist.parallel.layout import Layout


def join(rank_info: RankInfo, store: Any, timeout_s: float) -> None:
    """Initialise the default process group by rendezvous in ``store``, or that of ``rank_info`` if None
    (:func:`rendezvous.connect`). On GPUs, set the device of this process (:func:`host.set_device`).

    :class:`UserError` if this process has no GPU, or shares it with another rank.
    """
    host.set_device(rank_info.local_rank)
    rendezvous.join(rank_info, store or rendezvous.connect(rank_info, timeout_s), timeout_s)
    host.refuse_shared_gpu(distributed_c10d._get_default_store(), rank_info.rank)


def start_deepspeed(timeout_s: float) -> None:
    """Let DeepSpeed communicate in the joined world (:func:`join`)."""
    # On CPUs DeepSpeed (0.19.8) would first compile an all-reduce for inference, which takes a minute, and again whenever two
    # installations alternate in one home folder. Training never calls it.
    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    deepspeed.init_distributed(host.backend(), timeout=datetime.timedelta(seconds=timeout_s), verbose=False)


def start(layout: Layout, seed: int, timeout_s: float = 600.0) -> None:
    """Create the process groups of a checked layout (``Layout.check``) in the joined world (:func:`join`), and seed torch."""
    libraries.patch_megatron_for_cpu()
    start_deepspeed(timeout_s)
    parallel_state.initialize_model_parallel(
        layout.tp,
        layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        # A whole number by its annotation; megatron-core (0.16.1) hands it to timedelta, which takes any.
        distributed_timeout_minutes=timeout_s / 60,
    )
    torch.manual_seed(seed)
    if torch.cuda.is_available():
        tensor_parallel.model_parallel_cuda_manual_seed(seed)


def set_timeouts(timeout_s: float) -> None:
    """Set the time limit of collectives in all groups that exist: DeepSpeed (0.19.8) makes some with torch's default of 30
    minutes.
    """
    for group in distributed_c10d._world.pg_map:
        distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=timeout_s), group)


def stop_layout() -> None:
    """Destroy the groups of a layout after its engine is closed; the default process group stays."""
    parallel_state.destroy_model_parallel()
    # ZeRO-3 patches this function for the whole process, and gradients then arrive in another order. If only some ranks of a
    # later layout kept the patch, ZeRO-1 and -2, which reduce in the order of arrival, would mix parameters up.
    torch.nn.functional.linear = torch._C._nn.linear
    # megatron-core drops its some forty groups without destroying them; each has gloo threads, and an uncollected engine
    # references them all.
    gc.collect()
    for group in list(distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            deepspeed.comm.destroy_process_group(group)


def data() -> dist.ProcessGroup:
    """The data-parallel group: ranks with the same part of the model and different data."""
    return parallel_state.get_data_parallel_group()


def stop() -> None:
    """Destroy the default process group; this process may then join another world."""
    shutdown()
    # DeepSpeed would otherwise assume that its communication is still initialised.
    deepspeed.comm.comm.cdb = None
