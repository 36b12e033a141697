"""Defaults: of captions, and of the editing tasks in the paper's figures."""

from dataclasses import dataclass, field

from gptface_dist.errors import UserError
from gptface_dist.generation.options import GenerationOptions, Guidance, Sampling

CAPTION_LENGTHS = (6, 10, 14, 20)
"""Lengths in tokens at which captions are drawn: parallel decoding needs the length beforehand."""
CAPTION_SAMPLING = Sampling(temperature=0.5)


@dataclass(frozen=True)
class Preset:
    """Defaults of one kind of edit; a caller's own values replace them."""

    meaning: str
    """What it is for, as a user reads it."""
    region: str | None
    """Part of the face (:data:`~gptface_dist.generation.region.PLACES`) to edit; None: the caller must name one."""
    margin: int
    """Pixels by which the region grows: it then holds an occluder's edge and shadow too."""
    text_needed: bool
    """Whether an empty text is refused."""
    sampling: Sampling = field(default_factory=Sampling)
    guidance: Guidance = field(default_factory=Guidance)

    @property
    def options(self) -> GenerationOptions:
        """What `gptface edit` starts from."""
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
"""Presets by the name that `gptface edit --task` takes."""


def task(name: str) -> Preset:
    """Look a preset up; :class:`UserError` lists the names for an unknown one."""
    if name not in TASKS:
        raise UserError(f"there is no task {name!r}: choose one of {', '.join(TASKS)}")
    return TASKS[name]
