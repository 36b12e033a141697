"""The distributed model's answer to the probe batch."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as groups
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from gptface_dist.engine.engine import Engine
from gptface_dist.model.reference_batch import Logits, ProbeBatch
from gptface_dist.parallel import libraries


@torch.no_grad()
def run(engine: Engine, batch: ProbeBatch) -> Logits:
    """Logits for the batch, without dropout, on the CPU of every rank; all ranks call it. Nothing is learned.

    Under sequence parallelism, the batch's length must be a multiple of the tensor-parallel size.
    """
    layout, turns = engine.layout, engine._turns
    here = ProbeBatch(**{name: tensor.to(engine.device) for name, tensor in vars(batch).items()})
    # Interleaved schedules want a multiple of the stages; the same batch is as good as any.
    repeats = layout.pp if layout.vpp > 1 else 1
    iterators = [iter([here] * repeats) for _ in turns]
    engine.engine.train(False)
    with libraries.schedules():
        found: list[tuple[Tensor, ...]] = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iterators if len(turns) > 1 else iterators[0],
            model=turns if len(turns) > 1 else turns[0],
            num_microbatches=repeats,
            seq_length=here.tokens.shape[1],
            micro_batch_size=len(here.tokens),
            forward_only=True,
        )
    answer: list[Any] = [tuple(logits.cpu() for logits in found[0]) if found else None]
    if layout.pp > 1:
        last = groups.get_pipeline_model_parallel_last_rank()
        dist.broadcast_object_list(answer, last, group=groups.get_pipeline_model_parallel_group())
    return Logits(*answer[0])


def _forward_step(batches: Iterator[ProbeBatch], model: Any) -> Any:
    output = model(next(batches), None)
    if not isinstance(output, tuple):
        return output, None
    loss, logits = output
    return loss, lambda loss: (loss, torch.ones((), dtype=torch.int), logits)
