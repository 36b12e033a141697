"""GPTFace's objective: masked image and language modelling, and image-text matching (Li et al., arXiv 2510.18345).

Text and image tokens are masked in spans and predicted from both; [CLS] says whether image and text belong together. Half of
the images are another sample's (``data.batch.itm_negative_ratio``), and nothing is predicted in such pairs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from gptface_dist.data.batch import BatchBuilder, MaskedBatch
from gptface_dist.data.options import DataConfig
from gptface_dist.data.stream import Block
from gptface_dist.model.options import ModelOptions
from gptface_dist.model.plain import GPTFace, summed_cross_entropy
from gptface_dist.model.reference_batch import ReferenceBatch
from gptface_dist.objectives.objective import Heads, LossSum, Objective, Term
from gptface_dist.sequence import IGNORE
from gptface_dist.tokenizers.vocabulary import Vocabulary


@dataclass(frozen=True)
class MilmItm(Objective):
    """Masked image and language modelling, and image-text matching."""

    name: ClassVar[str] = "milm_itm"
    terms: ClassVar[tuple[Term, ...]] = (
        Term("text", "masked text tokens"),
        Term("image", "masked image tokens"),
        Term("itm", "pairs"),
    )

    def collate(self, data: DataConfig, vocabulary: Vocabulary, grid: tuple[int, int]) -> Callable[[list[Block[Any]]], Any]:
        """Pairs drawn, tokens masked, padded."""
        return BatchBuilder(vocabulary, grid, data.order.seed, data.masking, data.batch)

    def counts(self, batch: MaskedBatch[Any]) -> list[int]:  # type: ignore[override]
        """Masked text tokens, masked image tokens, pairs."""
        return [len(batch.masked_text), len(batch.masked_image), batch.rows]

    def targets(self, batch: MaskedBatch[np.ndarray], vocabulary: Vocabulary) -> np.ndarray:  # type: ignore[override]
        """Int64 [ids + 2]: of each id, and of (negative, matched)."""
        ids = np.bincount(batch.labels[batch.labels != IGNORE], minlength=vocabulary.size)
        return np.concatenate([ids, np.bincount(batch.itm_label, minlength=2)])

    def constant_guess(self, targets: np.ndarray, vocabulary: Vocabulary) -> dict[str, float]:
        """The unigram entropies of masked text and image tokens, and that of the pairs' labels."""
        ids, labels = targets[: vocabulary.size], targets[vocabulary.size :]
        parts = (ids[_slice(vocabulary.text_range)], ids[_slice(vocabulary.image_range)], labels)
        return {term.name: entropy(part) for term, part in zip(self.terms, parts, strict=True)}

    def describe(self, batch: MaskedBatch[np.ndarray]) -> list[dict[str, object]]:  # type: ignore[override]
        """Where text and image come from, and what is masked."""
        rows: list[dict[str, object]] = []
        for row, (text, image) in enumerate(zip(batch.text_origins, batch.image_origins, strict=True)):
            masked = {f"{name} masked": int((at[:, 0] == row).sum()) for name, at in self._masked(batch).items()}
            rows.append(
                {
                    "text shard": f"{text.source}/{text.shard}",
                    "text key": text.key,
                    "epoch": text.epoch,
                    "image shard": f"{image.source}/{image.shard}",
                    "image key": image.key,
                    "itm": batch.itm_label[row],
                    "tokens": batch.lengths[row],
                    **masked,
                }
            )
        return rows

    @staticmethod
    def _masked(batch: MaskedBatch[Any]) -> dict[str, Any]:
        return {"text": batch.masked_text, "image": batch.masked_image}

    def heads(self, options: ModelOptions) -> dict[str, nn.Module]:
        """The ITM head."""
        return GPTFace.heads(options)

    def model(self, options: ModelOptions, vocabulary: Vocabulary) -> GPTFace:
        """GPTFace."""
        return GPTFace(options, vocabulary)

    def losses(
        self,
        x_BLH: Tensor,
        batch: MaskedBatch[Tensor],  # type: ignore[override]
        heads: Heads,
        constants: Mapping[str, Tensor],
    ) -> list[LossSum]:
        """Cross-entropies of masked tokens, each over the ids of its modality, and of the pairs' labels."""
        sums = []
        for places, ids in self._modalities(batch, heads):
            # By indices, whose number the host knows, and not by a mask on the device, whose sum it would wait for.
            chosen = places.unbind(1)
            sums.append(LossSum(*heads.token_loss(x_BLH[chosen], batch.labels[chosen], ids), len(places)))
        logits = heads.get_submodule("itm_head")(x_BLH[:, 0])
        return [*sums, LossSum(*summed_cross_entropy(logits, batch.itm_label), batch.rows)]

    def _modalities(self, batch: MaskedBatch[Tensor], heads: Heads) -> list[tuple[Tensor, range]]:
        ids = heads.vocabulary
        return [(batch.masked_text, ids.text_range), (batch.masked_image, ids.image_range)]

    def reference_outputs(self, x_BLH: Tensor, batch: ReferenceBatch, heads: Heads) -> dict[str, Tensor]:
        """Logits of the batch's rows of each modality, and of the pairs."""
        ids = heads.vocabulary
        logits = [heads.token_logits(x_BLH[batch.recorded(part)], part) for part in (ids.text_range, ids.image_range)]
        logits.append(heads.get_submodule("itm_head")(x_BLH[:, 0]))
        return {term.name: each.float() for term, each in zip(self.terms, logits, strict=True)}

    def head_flops(self, options: ModelOptions, vocabulary: Vocabulary, counts: Sequence[int]) -> int:
        """Per masked token ``2 H^2 + 2 H V`` with V the ids of its modality; per pair ``2 H^2 + 4 H``."""
        hidden, (text, image, pairs) = options.hidden, counts
        products = text * len(vocabulary.text_range) + image * len(vocabulary.image_range)
        return (text + image) * 2 * hidden**2 + 2 * hidden * products + pairs * (2 * hidden**2 + 4 * hidden)


def entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution that ``counts`` [K] are proportional to; 0 of no counts."""
    shares = counts[counts > 0] / max(1, counts.sum())
    return float(-(shares * np.log(shares)).sum())


def _slice(ids: range) -> slice:
    return slice(ids.start, ids.stop)
