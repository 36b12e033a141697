"""Releases through Hugging Face's auto classes; importing this module registers them. Needs the extra ``[hf]``.

``import gptface_dist.release.huggingface``, then ``transformers.AutoModel.from_pretrained(FOLDER)``.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gptface_dist.data.batch import MaskedBatch, within
from gptface_dist.errors import UserError
from gptface_dist.objectives.milm_itm import MilmItm
from gptface_dist.objectives.objective import LossSum
from gptface_dist.release.config import CONFIG_NAME, FORMAT, MODEL_TYPE, ReleaseConfig

try:
    from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
    from transformers.utils.generic import ModelOutput
except ImportError as error:
    raise ImportError("the Hugging Face classes need transformers: pip install 'gptface_dist[hf]'") from error


class GPTFaceConfig(PretrainedConfig):
    """A release's ``config.json``; its keys are attributes."""

    model_type = MODEL_TYPE

    @property
    def release(self) -> ReleaseConfig:
        """The configuration parsed and checked; :class:`UserError` where it is not a release's."""
        raw = {name: getattr(self, name, None) for name in ("format", "objective", "options", "vocabulary", "grid", "training")}
        if raw["format"] != FORMAT:
            raise UserError(f"{CONFIG_NAME} has the format {raw['format']!r}, not {FORMAT!r}: give a GPTFace release")
        return ReleaseConfig.from_json(raw | {"dtype": str(self.dtype or "float32").removeprefix("torch.")})


@dataclass
class GPTFaceOutput(ModelOutput):
    """Features and outputs for B sequences of L tokens."""

    last_hidden_state: Tensor | None = None
    """[B, L, H]: features, the input of ``model.plain.token_logits``."""
    itm_logits: Tensor | None = None
    """[B, 2]: logits of (negative, positive) image-text pairs."""
    losses: dict[str, LossSum] | None = None
    """Summed losses by term where labels were given; the mean is the sum divided by the number of items."""


class GPTFaceModel(PreTrainedModel):
    """A ``PreTrainedModel`` around the plain model, its attribute ``plain``."""

    config_class = GPTFaceConfig
    # Tensor names in a release are those of the plain model: transformers adds the prefix when it loads them.
    base_model_prefix = "plain"
    _supports_sdpa = True

    def __init__(self, config: GPTFaceConfig):
        super().__init__(config)
        release = config.release
        if release.objective.name != MilmItm.name:
            raise UserError(f"a release of the objective {release.objective.name} is none of GPTFaceModel: use release.load")
        self.objective = MilmItm()
        self.plain = self.objective.model(release.options, release.vocabulary)
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """Do nothing: weights come from a release."""

    def forward(
        self,
        tokens: Tensor,
        segments: Tensor,
        positions: Tensor,
        lengths: Tensor,
        labels: Tensor | None = None,
        itm_label: Tensor | None = None,
    ) -> GPTFaceOutput:
        """As :meth:`GPTFace.forward`, and the losses where ``labels`` and ``itm_label`` (:class:`MaskedBatch`) are given."""
        features = self.plain(tokens, segments, positions, lengths)
        losses = None
        if labels is not None and itm_label is not None:
            ids = self.plain.vocabulary
            masked = [within(labels, part).nonzero() for part in (ids.text_range, ids.image_range)]
            batch = MaskedBatch(tokens, segments, positions, lengths, True, labels, itm_label, masked[0], masked[1])
            sums = self.objective.losses(features, batch, self.plain, {})
            losses = {term.name: each for term, each in zip(self.objective.terms, sums, strict=True)}
        return GPTFaceOutput(features, self.plain.itm_logits(features), losses)


AutoConfig.register(MODEL_TYPE, GPTFaceConfig, exist_ok=True)
AutoModel.register(GPTFaceConfig, GPTFaceModel, exist_ok=True)
