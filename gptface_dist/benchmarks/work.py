"""How much a step computes, for rates."""

from collections.abc import Sequence

from torch import Tensor

from gptface_dist.data.batch import Batch
from gptface_dist.model.flops import Work


def done(batches: Sequence[Batch[Tensor]]) -> Work:
    """What a step on these micro-batches has to compute."""
    lengths = [int(length) for batch in batches for length in batch.lengths.tolist()]
    text, image = (sum(len(getattr(batch, name)) for batch in batches) for name in ("masked_text", "masked_image"))
    return Work(sum(lengths), sum(length**2 for length in lengths), text, image, len(lengths))
