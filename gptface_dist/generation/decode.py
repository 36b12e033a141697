"""Iterative parallel decoding: all wanted tokens start masked; each step commits those of the highest confidence.

After step ``t`` of ``T``, ``floor(cos(pi t / 2T) n)`` of the ``n`` tokens are still masked (at least one fewer than before).
Candidates are drawn from the model's distribution; their confidence is ``log p + confidence_noise (1 - t/T) Gumbel``.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptface_dist.generation.guidance import guidance_shift
from gptface_dist.generation.model import device_of, fast_products, logits_of, match_probabilities
from gptface_dist.generation.noise import Noise
from gptface_dist.generation.options import Guidance, Sampling
from gptface_dist.generation.sequence import MaskedSequence, batches, stack
from gptface_dist.model.plain import GPTFace
from gptface_dist.sequence import IMAGE, PaddedBatch


@dataclass(frozen=True)
class DecodeRequest:
    """A sequence whose wanted tokens are to be drawn."""

    sequence: MaskedSequence
    without_text: MaskedSequence | None
    """The same image after an empty text, for classifier-free guidance; None for captions."""
    number: int
    """Index of the sample within the call; its noise is a function of the seed and this."""


@dataclass(frozen=True)
class DecodeResult:
    """A sequence whose wanted tokens are drawn."""

    sequence: MaskedSequence
    match: float
    """p(match) of image and text."""


def still_masked(step: int, steps: int, before: int, total: int) -> int:
    """Number of tokens still masked after ``step`` (1 .. steps), where ``before`` of ``total`` were masked before it."""
    if step == steps:
        return 0
    return max(0, min(before - 1, math.floor(math.cos(math.pi * step / (2 * steps)) * total)))


def decode(
    model: GPTFace,
    requests: Sequence[DecodeRequest],
    ids: range,
    sampling: Sampling,
    options: Guidance,
    done: Callable[[], None] = lambda: None,
) -> list[DecodeResult]:
    """Decode each sequence as if it were alone: the other requests, their number and their order change nothing.

    The candidates of all sequences share batches, so that a few sequences still fill a GPU's rows.

    Args:
        model: in evaluation mode.
        requests: one for each result.
        ids: the joint ids of the wanted tokens' modality; nothing else is drawn.
        sampling: how tokens are drawn and committed.
        options: guidance, and the number of candidates of which the best match is kept.
        done: called after each candidate, for progress.
    """
    best: list[DecodeResult | None] = [None] * len(requests)
    draws = [(number, candidate) for candidate in range(options.rerank) for number in range(len(requests))]
    for rows in batches([requests[number].sequence for number, _ in draws], device_of(model)):
        numbers = [draws[row][0] for row in rows]
        chosen = [requests[number] for number in numbers]
        noises = [
            Noise(sampling.seed, requests[number].number, candidate) for number, candidate in (draws[row] for row in rows)
        ]
        with fast_products(device_of(model)):
            results = _decode_batch(model, chosen, ids, noises, sampling, options)
        for number, result in zip(numbers, results, strict=True):
            previous = best[number]
            if previous is None or result.match > previous.match:
                best[number] = result
            done()
    return [result for result in best if result is not None]


@torch.no_grad()
def _decode_batch(
    model: GPTFace,
    requests: Sequence[DecodeRequest],
    ids: range,
    noises: Sequence[Noise],
    sampling: Sampling,
    options: Guidance,
) -> list[DecodeResult]:
    device, mask_id = device_of(model), model.vocabulary.mask_id
    batch = stack([request.sequence for request in requests], device)
    hidden = torch.zeros_like(batch.tokens, dtype=torch.bool)
    for row, request in enumerate(requests):
        hidden[row, : len(request.sequence.tokens)] = request.sequence.wanted.to(device)
    wanted = [hidden[row].nonzero()[:, 0] for row in range(len(requests))]
    batch.tokens[hidden] = mask_id
    unconditional = UnconditionalBranch(requests, device) if options.classifier_free > 0 else None
    for step in range(1, sampling.steps + 1):
        own = logits = logits_of(model, batch, hidden, ids)
        if unconditional is not None:
            logits = logits + options.classifier_free * (own - unconditional.logits(model, batch, hidden, ids))
        if options.gradient.strength > 0:
            logits = logits + guidance_shift(model, batch, hidden, own, ids, options.gradient)
        counts = [int(hidden[row, indices].sum()) for row, indices in enumerate(wanted)]
        for row, part in enumerate(logits.split(counts)):
            masked = hidden[row, wanted[row]]
            kept, tokens = commit(part, masked, noises[row], step, sampling)
            committed = wanted[row][masked.nonzero()[:, 0][kept]]
            batch.tokens[row, committed] = tokens + ids.start
            hidden[row, committed] = False
        if not hidden.any():
            break
    finished = [request.sequence.completed(batch.tokens[row, wanted[row]].cpu()) for row, request in enumerate(requests)]
    return [DecodeResult(*both) for both in zip(finished, match_probabilities(model, finished), strict=True)]


def commit(logits: Tensor, masked: Tensor, noise: Noise, step: int, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draw a token for each masked position of one sequence and choose which to keep.

    Args:
        logits: float32 [M, K] of the M positions that are still masked.
        masked: bool [N] over the wanted positions, M of them true.
        noise: the sample's own; each step draws the next values.
        step: 1 .. steps.
        sampling: temperature, top-k and confidence noise.

    Returns int64 [C], indices into the masked positions to commit, and int64 [C], their tokens, 0 .. K - 1.
    """
    total, count = len(masked), len(logits)
    # Drawn for all wanted positions at each step: a position's noise does not depend on what was committed before.
    drawing, deciding = noise.gumbel(total, logits.shape[-1]), noise.gumbel(total)
    if not count:
        return masked.new_zeros(0, dtype=torch.int64), masked.new_zeros(0, dtype=torch.int64)
    tokens, log_p = draw(logits, drawing.to(logits.device)[masked], sampling)
    weight = sampling.confidence_noise * (1 - step / sampling.steps)
    confidence = log_p + weight * deciding.to(logits.device)[masked]
    left = still_masked(step, sampling.steps, count, total)
    kept = confidence.argsort(descending=True, stable=True)[: count - left]
    return kept, tokens[kept]


def draw(logits: Tensor, noise: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draw a token for each row of ``logits`` (float32 [M, K]) with Gumbel ``noise`` of the same shape.

    Returns the tokens, int64 [M], and their log-probabilities after temperature and top-k, float32 [M].
    """
    if sampling.top_k and sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if sampling.temperature == 0:
        drawn = logits.argmax(-1)
    else:
        logits = logits / sampling.temperature
        drawn = (logits + noise).argmax(-1)
    return drawn, logits.log_softmax(-1).gather(-1, drawn.unsqueeze(-1))[:, 0]


class UnconditionalBranch:
    """The requests' images after an empty text: what classifier-free guidance moves away from."""

    def __init__(self, requests: Sequence[DecodeRequest], device: torch.device):
        without = [request.without_text for request in requests if request.without_text is not None]
        if len(without) != len(requests):
            raise ValueError("classifier-free guidance needs each sequence without its text too")
        self._batch = stack(without, device)
        self._image = self._batch.segments == IMAGE

    def logits(self, model: GPTFace, batch: PaddedBatch[Tensor], hidden: Tensor, ids: range) -> Tensor:
        """Copy the images of ``batch``, then compute float32 [M, len(ids)] of the M tokens that ``hidden`` marks in it."""
        image = batch.segments == IMAGE
        self._batch.tokens[self._image] = batch.tokens[image]
        masked = torch.zeros_like(self._image)
        masked[self._image] = hidden[image]
        return logits_of(model, self._batch, masked, ids)
