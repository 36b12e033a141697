"""The one layout of a sequence, ``[CLS] text [SEP] image [SEP]``, and the one padded batch: what data make and models read."""

from dataclasses import dataclass, field, fields, replace
from typing import Any, Generic, Self, TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from gptface_dist import host
from gptface_dist.tokenizers.vocabulary import Vocabulary

IGNORE = -100
"""Label of a token that is not to be predicted; what ``torch.nn.functional.cross_entropy`` ignores."""
PADDING, TEXT, IMAGE = 0, 1, 2
"""Segments. [CLS] and both [SEP] belong to the text."""
SEGMENTS = 3
SPECIALS_PER_SEQUENCE = 3

Array = TypeVar("Array", np.ndarray, torch.Tensor)


@dataclass(frozen=True)
class PaddedBatch(Generic[Array]):
    """B sequences padded to L tokens: numpy arrays in data workers, torch tensors (``tensors``) in training.

    Objectives add fields of their own (labels, another view's pixels) in subclasses; arrays among them move with the batch, and
    those [B, L, ..] that ``padded_to`` fills up name the value in their metadata (``pad``).
    """

    tokens: Array = field(metadata={"pad": 0})
    """int64 [B, L]: ids of the joint vocabulary; [PAD] or anything else at the end."""
    segments: Array = field(metadata={"pad": PADDING})
    """int64 [B, L]: :data:`PADDING`, :data:`TEXT` or :data:`IMAGE`."""
    positions: Array = field(metadata={"pad": 0})
    """int64 [B, L, 2]: (position in the text, 0) of text and specials, (row, column) of image tokens, (0, 0) of padding."""
    lengths: Array = field()
    """int64 [B]: tokens of each sequence before padding."""
    padded: bool = field()
    """Whether some sequence is shorter than L; for the host, which would have to wait for a GPU's ``lengths``."""

    @property
    def rows(self) -> int:
        """B."""
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        """L."""
        return self.tokens.shape[1]

    @property
    def samples(self) -> int:
        """Samples of the data that the rows were made of."""
        return self.rows

    def tensors(self, device: torch.device | str = "cpu") -> Any:
        """The same batch as tensors on a device; on a GPU, the copies may still be under way."""
        moved: dict[str, Any] = {}
        for name in (each.name for each in fields(self)):
            value = getattr(self, name)
            if isinstance(value, np.ndarray | torch.Tensor):
                moved[name] = host.to_device(torch.as_tensor(value), device)
        return replace(self, **moved)

    def padded_to(self, length: int) -> Self:
        """The batch of tensors with more padding: a pipeline's micro-batches have one length in a step."""
        more = length - self.length
        if more == 0:
            return self
        longer: dict[str, Any] = {}
        for each in fields(self):
            if "pad" in each.metadata:
                value = getattr(self, each.name)
                sides = (0, 0) * (value.dim() - 2) + (0, more)
                longer[each.name] = F.pad(value, sides, value=each.metadata["pad"])
        return replace(self, padded=True, **longer)


def empty_rows(vocabulary: Vocabulary, rows: int, length: int) -> dict[str, np.ndarray]:
    """Arrays ``tokens``, ``segments`` and ``positions`` of a batch that is all padding, for :class:`SequenceLayout`."""
    return {
        "tokens": np.full((rows, length), vocabulary.pad_id, dtype=np.int64),
        "segments": np.full((rows, length), PADDING, dtype=np.int64),
        "positions": np.zeros((rows, length, 2), dtype=np.int64),
    }


class SequenceLayout:
    """Writes sequences into rows of arrays.

    Args:
        vocabulary: the joint ids.
        grid: rows and columns of image codes.
    """

    def __init__(self, vocabulary: Vocabulary, grid: tuple[int, int]):
        self._vocabulary, self.grid = vocabulary, grid
        self._image_positions = np.stack(np.divmod(np.arange(grid[0] * grid[1]), grid[1]), axis=1)

    def length(self, text: int) -> int:
        """Tokens of a sequence with so many text tokens and an image."""
        return text + self.grid[0] * self.grid[1] + SPECIALS_PER_SEQUENCE

    def write(self, arrays: dict[str, np.ndarray], row: int, text: np.ndarray, codes: np.ndarray) -> tuple[slice, slice]:
        """Write ``[CLS] text [SEP] image [SEP]`` into a row of :func:`empty_rows`; returns where text and image stand.

        ``text`` are int [m] ids, m may be 0; ``codes`` any integers [H, W].
        """
        ids = self._vocabulary
        text_at, _ = self.write_text(arrays, row, text)
        image_at = slice(text_at.stop + 1, text_at.stop + 1 + codes.size)
        tokens, last = arrays["tokens"][row], image_at.stop
        np.add(codes.reshape(-1), ids.image_offset, out=tokens[image_at], dtype=np.int64)
        tokens[last] = ids.sep_id
        arrays["segments"][row, image_at] = IMAGE
        arrays["segments"][row, last] = TEXT
        arrays["positions"][row, image_at] = self._image_positions
        arrays["positions"][row, last, 0] = text_at.stop + 1
        return text_at, image_at

    def write_text(self, arrays: dict[str, np.ndarray], row: int, text: np.ndarray) -> tuple[slice, int]:
        """Write ``[CLS] text [SEP]``, the beginning of a sequence or all of one; returns where the text stands, and its end."""
        ids, tokens = self._vocabulary, arrays["tokens"][row]
        text_at = slice(1, 1 + len(text))
        tokens[0], tokens[text_at], tokens[text_at.stop] = ids.cls_id, text, ids.sep_id
        end = text_at.stop + 1
        arrays["segments"][row, :end] = TEXT
        arrays["positions"][row, :end, 0] = np.arange(end)
        return text_at, end
