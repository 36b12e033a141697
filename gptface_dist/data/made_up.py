"""Synthetic samples for parity runs and benchmarks."""

import numpy as np

from gptface_dist.data.stream import Block, DecodedSample, Provenance
from gptface_dist.data.tokens import TokenSample
from gptface_dist.tokenizers.vocabulary import Vocabulary


def made_up_block(
    rng: np.random.Generator,
    vocabulary: Vocabulary,
    grid: tuple[int, int],
    text_length: int,
    number: int,
    size: int,
    run: str,
) -> Block[TokenSample]:
    """Block ``number`` of ``size`` samples: random codes, and captions of random ids and lengths up to ``text_length``.

    Keys name the samples by ``run`` and their number in the run, whatever the size of blocks.
    """
    samples = []
    for sample in range(number * size, (number + 1) * size):
        caption = rng.integers(vocabulary.text_size, size=(1, rng.integers(1, text_length + 1)), dtype=np.int32)
        codes = rng.integers(vocabulary.image_codes, size=grid).astype(np.uint16)
        samples.append(DecodedSample(TokenSample(codes, caption), Provenance("made up", "", f"{run}-{sample}", 0)))
    return Block(number, samples, [])
