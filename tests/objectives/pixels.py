"""An objective whose batch carries more than tokens: masked modelling that also sees a picture's pixels."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from gptface_dist.data.batch import BatchBuilder, MaskedBatch
from gptface_dist.data.options import DataConfig
from gptface_dist.data.stream import Block
from gptface_dist.model.options import ModelOptions
from gptface_dist.objectives.milm_itm import MilmItm
from gptface_dist.sequence import IMAGE, Array, PaddedBatch
from gptface_dist.tokenizers.vocabulary import Vocabulary


@dataclass(frozen=True)
class PixelBatch(MaskedBatch[Array]):
    """With the colour of each image token."""

    pixels: Array = field(kw_only=True)
    """float32 [B, image tokens, 3]."""


@dataclass(frozen=True)
class PixelBuilder:
    """Adds made-up colours to masked batches."""

    build: BatchBuilder
    tokens: int

    def __call__(self, blocks: list[Block[Any]]) -> PixelBatch[np.ndarray]:
        batch = self.build(blocks)
        rng = np.random.default_rng([block.number for block in blocks])
        pixels = rng.standard_normal((batch.rows, self.tokens, 3)).astype(np.float32)
        return PixelBatch(**{each.name: getattr(batch, each.name) for each in fields(batch)}, pixels=pixels)


@dataclass(frozen=True)
class PixelMilm(MilmItm):
    """Masked modelling with pixels added to the embeddings of image tokens."""

    name: ClassVar[str] = "pixels"

    def collate(self, data: DataConfig, vocabulary: Vocabulary, grid: tuple[int, int]) -> Callable[[list[Block[Any]]], Any]:
        build = BatchBuilder(vocabulary, grid, data.order.seed, data.masking, data.batch)
        return PixelBuilder(build, grid[0] * grid[1])

    def inputs(self, options: ModelOptions) -> dict[str, nn.Module]:
        return {"patches": nn.Linear(3, options.hidden)}

    def model(self, options: ModelOptions, vocabulary: Vocabulary) -> Any:
        # Not GPTFace, which has no input of this kind.
        return super(MilmItm, self).model(options, vocabulary)

    def embed(self, embeddings: nn.Module, batch: PaddedBatch[Tensor]) -> Tensor:
        x_BLH = super().embed(embeddings, batch)
        patches = embeddings.get_submodule("patches")(batch.pixels.to(x_BLH.dtype))  # type: ignore[attr-defined]
        return x_BLH.masked_scatter(
            (batch.segments == IMAGE).unsqueeze(-1), x_BLH[batch.segments == IMAGE] + patches.flatten(0, 1)
        )


def unseen(objective: PixelMilm, embeddings: nn.Module, batch: Any) -> Tensor:
    """What the input would be without pixels."""
    return torch.as_tensor(super(PixelMilm, objective).embed(embeddings, batch))
