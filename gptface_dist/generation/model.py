"""The plain model as decoding uses it: logits of wanted tokens, and p(match) of image and text."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from gptface_dist.generation.sequence import MaskedSequence, batches, stack
from gptface_dist.model.plain import GPTFace
from gptface_dist.sequence import PaddedBatch


def device_of(model: GPTFace) -> torch.device:
    """The device of the model's weights."""
    return model.embeddings.word.weight.device


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """Let a GPU multiply float32 matrices in TensorFloat-32: 10 bits of mantissa, more than the bfloat16 of most releases.

    For the transformer alone: the image tokenizer's codes turn at near ties and need full float32. Changes nothing on the CPU.
    """
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def logits_of(model: GPTFace, batch: PaddedBatch[Tensor], hidden: Tensor, ids: range) -> Tensor:
    """Float32 [M, len(ids)] of the M tokens that ``hidden`` (bool [B, L]) marks, row by row."""
    features = model(batch.tokens, batch.segments, batch.positions, batch.lengths)
    return model.token_logits(features[hidden], ids).float()


@torch.no_grad()
def match_probabilities(model: GPTFace, sequences: Sequence[MaskedSequence]) -> list[float]:
    """p(match) of each sequence by the matching head; all tokens must be in place."""
    matches = [0.0] * len(sequences)
    with fast_products(device_of(model)):
        for numbers in batches(sequences, device_of(model)):
            batch = stack([sequences[number] for number in numbers], device_of(model))
            features = model(batch.tokens, batch.segments, batch.positions, batch.lengths)
            for number, p in zip(numbers, model.itm_logits(features).float().softmax(-1)[:, 1].tolist(), strict=False):
                matches[number] = p
    return matches
