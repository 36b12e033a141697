"""Image-text contrast of the whole global batch (InfoNCE; Radford et al. 2021, arXiv 2103.00020) in the one transformer.

A sample is two rows, ``[CLS] text [SEP]`` and ``[CLS] [SEP] image [SEP]``; their [CLS] features are projected, normalised and
compared with all others of the global batch: ``z_ij = s a_i.b_j`` for images a, texts b and a learned scale s = exp(t). The
loss of pair i is ``(lse_j z_ij + lse_j z_ji) / 2 - z_ii``. Two samples of the same caption are no negatives of each other.

Every pair's loss depends on every feature, so it is computed in two passes: the survey gathers the features, ``constants``
derives ``dL/da_i``, ``dL/db_i`` and ``dL/dt`` in closed form, and the second pass back-propagates ``sum_i <a_i, dL/da_i>`` and
so on, which is a sum over samples, whatever rank and micro-batch they are in.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptface_dist.data.options import DataConfig
from gptface_dist.data.order import keyed_generator
from gptface_dist.data.stream import Block
from gptface_dist.data.tokens import TokenSample
from gptface_dist.errors import UserError
from gptface_dist.model.options import ModelOptions
from gptface_dist.model.precision import at_least_float32
from gptface_dist.model.reference_batch import ReferenceBatch
from gptface_dist.objectives.objective import CoupledObjective, Heads, LossSum, Term
from gptface_dist.sequence import Array, PaddedBatch, SequenceLayout, empty_rows
from gptface_dist.tokenizers.vocabulary import Vocabulary

LARGEST_LOG_SCALE = math.log(100)
"""As of CLIP: t is kept within 0 and this."""
CHUNK = 1024
"""Rows of the similarity matrix at a time."""


@dataclass(frozen=True)
class PairBatch(PaddedBatch[Array]):
    """Rows of text and of image in turn: rows 2 i and 2 i + 1 are sample i."""

    caption_id: Array = field()
    """int64 [samples]: equal for equal captions."""

    @property
    def samples(self) -> int:
        """Half of the rows."""
        return self.rows // 2


class LogitScale(nn.Module):
    """The logarithm of the learned scale."""

    initial_values: ClassVar[dict[str, float]] = {"log_scale": math.log(1 / 0.07)}

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((1,), self.initial_values["log_scale"]))

    def forward(self) -> Tensor:
        """Float32 [1], within 0 and :data:`LARGEST_LOG_SCALE`; a gradient that would lead out of that is dropped."""
        value: Tensor = _Clamp.apply(at_least_float32(self.log_scale))
        return value


class _Clamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        ctx.save_for_backward(t)
        return t.clamp(0, LARGEST_LOG_SCALE)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (t,) = ctx.saved_tensors
        outward = ((t >= LARGEST_LOG_SCALE) & (gradients[0] < 0)) | ((t <= 0) & (gradients[0] > 0))
        return gradients[0].masked_fill(outward, 0)


@dataclass(frozen=True)
class Contrastive(CoupledObjective):
    """InfoNCE between text-only and image-only rows."""

    name: ClassVar[str] = "contrastive"
    terms: ClassVar[tuple[Term, ...]] = (Term("itc", "pairs"),)
    predicts_tokens: ClassVar[bool] = False

    projection: int = 128
    """Width of the space in which texts and images are compared."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.projection < 1:
            raise UserError(f"objective.options.projection must be at least 1, got {self.projection}")

    def collate(self, data: DataConfig, vocabulary: Vocabulary, grid: tuple[int, int]) -> Callable[[list[Block[Any]]], Any]:
        """Captions drawn, two rows a sample."""
        return PairBuilder(data, vocabulary, grid)

    def counts(self, batch: PaddedBatch[Any]) -> list[int]:
        """Pairs."""
        return [batch.samples]

    def heads(self, options: ModelOptions) -> dict[str, nn.Module]:
        """A projection each, and the scale."""
        projections = {
            f"{name}_projection": nn.Linear(options.hidden, self.projection, bias=False) for name in ("text", "image")
        }
        return {**projections, "logit_scale": LogitScale()}

    def survey(self, x_BLH: Tensor, batch: PairBatch[Tensor], heads: Heads) -> dict[str, Tensor]:  # type: ignore[override]
        """Features of both kinds float32 [samples, P], t [samples] and what captions are equal."""
        text, image = (_project(x_BLH[row::2, 0], heads, name) for row, name in enumerate(("text", "image")))
        log_scale = heads.get_submodule("logit_scale")().expand(len(text))
        return {"text": text, "image": image, "log_scale": log_scale, "caption_id": batch.caption_id}

    def constants(self, surveyed: Mapping[str, Tensor], own: slice) -> dict[str, Tensor]:
        """Each own pair's loss and share of dL/dt [own], its gradients [own, P], and how far it is predicted right [own].

        In float64: near the optimum the gradients are small differences of large terms.
        """
        text, image, same = surveyed["text"].double(), surveyed["image"].double(), surveyed["caption_id"]
        scale = surveyed["log_scale"][0].double().exp()
        # Of each image over all texts, and of each text over all images.
        image_lse, text_lse = (_log_sum_exp(a, b, scale, same) for a, b in ((image, text), (text, image)))
        gradients, right, log_scale = [], torch.zeros_like(image_lse[own]), torch.zeros_like(image_lse[own])
        for a, b, a_lse, b_lse in ((image, text, image_lse, text_lse), (text, image, text_lse, image_lse)):
            chunks = [_gradient(a, b, a_lse, b_lse, scale, same, rows) for rows in _chunks(own)]
            gradient, hits, products = (torch.cat(parts) for parts in zip(*chunks, strict=True))
            gradients.append(gradient.float())
            # Both directions see each pair of the matrix once, in rows that belong to some rank.
            right, log_scale = right + hits / 2, log_scale + products / 2
        loss = (image_lse[own] + text_lse[own]) / 2 - scale * (image[own] * text[own]).sum(-1)
        constants = {"image": gradients[0], "text": gradients[1], "log_scale": log_scale, "loss": loss, "right": right}
        return {name: value.float() for name, value in constants.items()}

    def losses(
        self,
        x_BLH: Tensor,
        batch: PairBatch[Tensor],  # type: ignore[override]
        heads: Heads,
        constants: Mapping[str, Tensor],
    ) -> list[LossSum]:
        """The pairs' loss, as known from the survey; its gradient goes through what the survey gathered."""
        own, names = self.survey(x_BLH, batch, heads), ("text", "image", "log_scale")
        surrogate = sum(((own[name] * constants[name]).sum() for name in names), x_BLH.new_zeros(()))
        loss = constants["loss"].sum() + (surrogate - surrogate.detach())
        return [LossSum(loss, constants["right"].sum(), batch.samples)]

    def coupled_losses(self, surveyed: Mapping[str, Tensor]) -> list[LossSum]:
        """The mean of two cross-entropies of the similarity matrix, summed over pairs."""
        z = surveyed["log_scale"][0].double().exp() * surveyed["image"].double() @ surveyed["text"].double().T
        same = surveyed["caption_id"]
        z = z.masked_fill((same[:, None] == same) & ~torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
        pairs = torch.arange(len(z), device=z.device)
        loss = (F.cross_entropy(z, pairs, reduction="sum") + F.cross_entropy(z.T, pairs, reduction="sum")) / 2
        right = ((z.argmax(1) == pairs).sum() + (z.argmax(0) == pairs).sum()) / 2
        return [LossSum(loss, right, len(z))]

    def reference_outputs(self, x_BLH: Tensor, batch: ReferenceBatch, heads: Heads) -> dict[str, Tensor]:
        """Both projections of [CLS], and the scale."""
        outputs = {name: _project(x_BLH[:, 0], heads, name) for name in ("text", "image")}
        return {**outputs, "log_scale": heads.get_submodule("logit_scale")()}

    def head_flops(self, options: ModelOptions, vocabulary: Vocabulary, counts: Sequence[int]) -> int:
        """Per pair two projections, ``4 H P``, and a row of the similarity matrix, ``2 N P``."""
        (pairs,) = counts
        return pairs * self.projection * (4 * options.hidden + 2 * pairs)


@dataclass(frozen=True)
class PairBuilder:
    """Builds batches of pairs; a function of the blocks, the seed and nothing else."""

    data: DataConfig
    """Seed, longest caption, and what lengths are padded to."""
    vocabulary: Vocabulary
    """The joint ids."""
    grid: tuple[int, int]
    """Rows and columns of image codes."""

    def __call__(self, blocks: list[Block[TokenSample]]) -> PairBatch[np.ndarray]:
        """Two rows of each sample, in their order."""
        samples = [sample for block in blocks for sample in block.samples]
        layout = SequenceLayout(self.vocabulary, self.grid)
        captions = []
        for sample in samples:
            rng = keyed_generator("sample", self.data.order.seed, sample.origin.epoch, sample.origin.key)
            number = int(rng.random() * len(sample.value.captions))
            captions.append(sample.value.caption(number)[: self.data.batch.text_length])
        needed = max(layout.length(0), *(len(caption) + 2 for caption in captions))
        length = next(length for length in self.data.batch.lengths(self.grid[0] * self.grid[1]) if length >= needed)
        arrays = empty_rows(self.vocabulary, 2 * len(samples), length)
        lengths = np.zeros(2 * len(samples), dtype=np.int64)
        for number, (sample, caption) in enumerate(zip(samples, captions, strict=True)):
            _, lengths[2 * number] = layout.write_text(arrays, 2 * number, caption)
            layout.write(arrays, 2 * number + 1, caption[:0], sample.value.codes)
            lengths[2 * number + 1] = layout.length(0)
        ids = [hashlib.blake2b(np.ascontiguousarray(caption, "<i4").tobytes(), digest_size=8) for caption in captions]
        caption_id = np.array([int.from_bytes(digest.digest(), "little", signed=True) for digest in ids])
        return PairBatch(**arrays, lengths=lengths, padded=bool(lengths.min() < length), caption_id=caption_id)


def _project(cls: Tensor, heads: Heads, name: str) -> Tensor:
    """[CLS] features [N, H] -> unit vectors float32 [N, P]."""
    return F.normalize(at_least_float32(heads.get_submodule(f"{name}_projection")(cls)), dim=-1)


def _numbers(rows: slice, like: Tensor) -> Tensor:
    return torch.arange(rows.start, rows.stop, device=like.device)


def _chunks(rows: slice) -> list[slice]:
    return [slice(start, min(start + CHUNK, rows.stop)) for start in range(rows.start, rows.stop, CHUNK)]


def _logits(a: Tensor, b: Tensor, scale: Tensor, same: Tensor, rows: slice) -> Tensor:
    """[rows, N]: ``s a_i.b_j``, and minus infinity where another sample has the same caption."""
    z = scale * a[rows] @ b.T
    others = torch.arange(len(b), device=z.device)[None, :] != _numbers(rows, z)[:, None]
    return z.masked_fill((same[rows, None] == same[None, :]) & others, -torch.inf)


def _gradient(
    a: Tensor, b: Tensor, a_lse: Tensor, b_lse: Tensor, scale: Tensor, same: Tensor, rows: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """dL/da [rows, P] of the loss summed over pairs; 1 where a row's largest logit is its own; dL/dz . z [rows]."""
    z = _logits(a, b, scale, same, rows)
    own = _numbers(rows, z)
    # dL/dz of both directions' cross-entropies.
    gradient = ((z - a_lse[rows, None]).exp() + (z - b_lse[None, :]).exp()) / 2
    gradient[torch.arange(len(z), device=z.device), own] -= 1
    products = (gradient * z.masked_fill(z.isinf(), 0)).sum(1)
    return scale * gradient @ b, (z.argmax(1) == own).double(), products


def _log_sum_exp(a: Tensor, b: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """[N]: of each row of the similarity matrix."""
    return torch.cat([_logits(a, b, scale, same, rows).logsumexp(1) for rows in _chunks(slice(0, len(a)))])
