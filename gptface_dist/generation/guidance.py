"""Guidance by the image-text matching (ITM) loss: shift the masked tokens' logits towards a match.

The paper (arXiv 2510.18345) says that the matching loss "pulls the generation distribution towards the control signal" and
no more; this is a reconstruction, after PPLM (Dathathri et al. 2020). With ``z`` the logits of the masked tokens::

    q = softmax(z + d)                              the changed distribution; d starts at 0
    loss = -log p(match | visible tokens, sum_v q_v E_v at masked ones) + kl KL(q || softmax(z))
    d <- d - strength * g / rms(g),  g = d loss / d d,  one norm for each sample

repeated ``iterations`` times; the fused distribution ``q^fusion softmax(z)^(1 - fusion)`` has the logits ``z + fusion d``.
Classifier-free guidance (Ho and Salimans 2022) is independent of it; both shift logits, and the shifts add up.
"""

import torch
from torch import Tensor
from torch.nn import functional

from gptface_dist.generation.options import Gradient
from gptface_dist.model.plain import GPTFace
from gptface_dist.sequence import PaddedBatch


def guidance_shift(
    model: GPTFace, batch: PaddedBatch[Tensor], hidden: Tensor, logits: Tensor, ids: range, options: Gradient
) -> Tensor:
    """``fusion d``: float32 [M, len(ids)], what to add to the ``logits`` of the M tokens that ``hidden`` (bool [B, L]) marks.

    Sequences do not influence each other: the loss is a sum over them and each step is normalised by sample.
    """
    words = model.embeddings.word.weight
    with torch.no_grad():
        embedded = model.embeddings(batch.tokens, batch.segments, batch.positions)
        # Remove the word embedding of [MASK] at masked tokens; segment and position stay.
        embedded[hidden] -= words[batch.tokens[hidden]]
        own = functional.log_softmax(logits, -1)
        row_of = hidden.nonzero()[:, 0]
        sizes = torch.bincount(row_of, minlength=len(batch.lengths)).tolist()
    table = words[ids.start : ids.stop].detach()
    change = torch.zeros_like(logits)
    for _ in range(options.iterations):
        change.requires_grad_(True)
        with torch.enable_grad():
            changed = functional.log_softmax(logits + change, -1)
            soft = changed.exp().to(table.dtype) @ table
            mixed = embedded.index_put((hidden,), embedded[hidden] + soft)
            match = model.itm_logits(model.encode(mixed, batch.lengths)).float()
            loss = -functional.log_softmax(match, -1)[:, 1].sum()
            loss = loss + options.kl * (changed.exp() * (changed - own)).sum()
            (gradient,) = torch.autograd.grad(loss, change)
        with torch.no_grad():
            steps = [part * (options.strength / part.square().mean().sqrt().clamp(min=1e-20)) for part in gradient.split(sizes)]
            change = change.detach() - torch.cat(steps)
    return options.fusion * change
