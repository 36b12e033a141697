"""A fixed batch of sequences: its recorded outputs tell whether two models compute the same."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptface_dist.sequence import IGNORE, IMAGE, PaddedBatch, SequenceLayout, empty_rows
from gptface_dist.tokenizers.vocabulary import Vocabulary

SEQUENCES = 4
ROWS = 8
"""Tokens with recorded logits in each sequence and modality, at most."""


@dataclass(frozen=True)
class ReferenceBatch(PaddedBatch[Tensor]):
    """Padded sequences, with a choice of tokens whose logits are recorded."""

    labels: Tensor = field(metadata={"pad": IGNORE})
    """Int64 [B, L]: an id of the modality whose logits are recorded at this token, ``sequence.IGNORE`` elsewhere."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of image codes."""
        rows, columns = (self.positions[self.segments == IMAGE].amax(0) + 1).tolist()
        return rows, columns

    def recorded(self, ids: range) -> Tensor:
        """Bool [B, L]: tokens whose logits over ``ids`` are recorded, in the order of ``features[recorded]``."""
        return (self.labels >= ids.start) & (self.labels < ids.stop)


def reference_batch(
    vocabulary: Vocabulary, grid: tuple[int, int], text_length: int, pad_to_multiple_of: int = 1, seed: int = 0
) -> ReferenceBatch:
    """The fixed batch: random ids, captions from one token to the longest, images from unmasked to all masked.

    Args:
        vocabulary: the joint ids.
        grid: rows and columns of image codes.
        text_length: longest caption in tokens.
        pad_to_multiple_of: divisor of the padded length; sequence parallelism needs the tensor-parallel size.
        seed: of token ids and masking.
    """
    rng, layout = np.random.default_rng(seed), SequenceLayout(vocabulary, grid)
    captions = [max(1, round(text_length * share)) for share in np.linspace(0, 1, SEQUENCES)]
    arrays = empty_rows(vocabulary, SEQUENCES, -(-layout.length(text_length) // pad_to_multiple_of) * pad_to_multiple_of)
    labels = np.full(arrays["tokens"].shape, IGNORE)
    for row, caption in enumerate(captions):
        text, codes = np.zeros(caption, dtype=np.int64), np.zeros(grid, dtype=np.int64)
        places = layout.write(arrays, row, text, codes)
        tokens = arrays["tokens"][row]
        for place, ids in zip(places, (vocabulary.text_range, vocabulary.image_range), strict=True):
            count = place.stop - place.start
            positions = place.start + np.arange(count)
            tokens[positions] = rng.integers(ids.start, ids.stop, size=count)
            recorded = place.start + np.sort(rng.choice(count, size=min(ROWS, count), replace=False))
            labels[row, recorded] = tokens[recorded]
            masked = rng.random(count) < row / (SEQUENCES - 1)
            tokens[positions[masked]] = vocabulary.mask_id
    arrays |= {"labels": labels, "lengths": np.array([layout.length(caption) for caption in captions])}
    tensors: dict[str, Any] = {name: torch.as_tensor(array.astype(np.int64)) for name, array in arrays.items()}
    return ReferenceBatch(**tensors, padded=True)
