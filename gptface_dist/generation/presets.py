"""Starting points: how captions are drawn, and the editing tasks of the paper's figures, with region and drawing."""

from dataclasses import dataclass, field

from gptface_dist.errors import UserError
from gptface_dist.generation.options import GenerationOptions, Guidance, Sampling

CAPTION_LENGTHS = (6, 10, 14, 20)
"""Tokens of the captions that are tried: decoding in parallel needs a length beforehand."""
CAPTION_SAMPLING = Sampling(temperature=0.5)


@dataclass(frozen=True)
class Preset:
    """Defaults of one kind of edit; whatever a caller gives goes before them."""

    meaning: str
    """What it is for, in words."""
    region: str | None
    """Part of the face (:data:`~gptface_dist.generation.region.PLACES`) that is edited; None: the caller names one."""
    margin: int
    """Pixels by which the region is grown: an occluder's edge and shadow go with it."""
    text_needed: bool
    """Whether there must be a text."""
    sampling: Sampling = field(default_factory=Sampling)
    """How tokens are drawn."""
    guidance: Guidance = field(default_factory=Guidance)
    """What pulls them towards the text."""

    @property
    def options(self) -> GenerationOptions:
        """The options that `gptface edit` starts from."""
        return GenerationOptions(self.sampling, self.guidance)


TASKS = {
    "attribute": Preset(
        "change what the text names: hair, brows, glasses, clothes",
        region=None, margin=0, text_needed=True, guidance=Guidance(classifier_free=2.0, rerank=4),
    ),
    "expression": Preset(
        "another expression of the same face",
        region="face", margin=0, text_needed=True, guidance=Guidance(classifier_free=2.0, rerank=4),
    ),
    "occluder": Preset(
        "remove what covers the face and draw what could be there",
        region="lower face", margin=2, text_needed=True, guidance=Guidance(classifier_free=1.0, rerank=2),
    ),
    "inpainting": Preset(
        "fill a region so that it fits the rest; a text is welcome, not needed",
        region=None, margin=0, text_needed=False, sampling=Sampling(temperature=0.7),
    ),
}  # fmt: skip
"""By the name that `gptface edit --task` takes."""


def task(name: str) -> Preset:
    """The preset of this name; :class:`UserError` for another."""
    if name not in TASKS:
        raise UserError(f"there is no task {name!r}: choose one of {', '.join(TASKS)}")
    return TASKS[name]
