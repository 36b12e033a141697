"""Captions: how often they name a trait, and how often they are right."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gptface_dist.generation import Generator
from gptface_dist.generation.presets import CAPTION_SAMPLING
from gptface_dist.generation.study.judge import Face, some
from gptface_dist.generation.study.statistics import Mean, Share, chance, mean, share
from gptface_dist.generation.study.traits import TRAITS

WORDS: dict[str, tuple[str, ...]] = {
    "gender": ("woman|girl|she|her", "man|boy|he|his"),
    "hair": ("black", "brown", "blond|blonde|golden", "red|ginger", "gray|grey|white"),
    "expression": (
        "neutral", "happy|smiling|smile", "sad|unhappy", "angry", "surprised|astonished", "disgusted", "scared|frightened",
    ),
}  # fmt: skip
"""How the captions of `gptface faces render` name the values of a trait, in the order of TRAITS. Without glasses: captions
name them only where there are some."""
_HAIR = r"\b(?:{0}) (?:hair|afro|buzz cut)\b|\bhair is (?:[\w-]+ (?:and )?)?(?:{0})\b"
"""Pattern around a colour: clothes and backgrounds have colours too."""


@dataclass(frozen=True)
class CaptionResult:
    """Captions compared with the faces in one trait."""

    named: Share
    """Captions that name a value of the trait."""
    right: Share | None
    """Of those, the ones that name the true value and no other; None if no caption names a value."""
    chance: Mean | None
    """Expected :attr:`right` of captions independent of their faces; None likewise."""


def said(text: str, trait: str) -> set[int]:
    """Find the values of a trait that a caption names."""
    form = _HAIR if trait == "hair" else r"\b(?:{0})\b"
    return {value for value, words in enumerate(WORDS[trait]) if re.search(form.format(words), text.lower())}


def measure_captions(
    generator: Generator, faces: Sequence[Face], captions: int, seeds: int, on_caption: Callable[[], None]
) -> dict[str, CaptionResult]:
    """Caption ``captions`` faces with each seed, among those that show all traits, and compare by trait."""
    fit = [face for face in faces if face.whole]
    named: dict[str, list[list[float]]] = {name: [[] for _ in range(seeds)] for name in WORDS}
    right: dict[str, list[list[float]]] = {name: [[] for _ in range(seeds)] for name in WORDS}
    by_chance: dict[str, list[float]] = {name: [] for name in WORDS}
    for seed in range(seeds):
        chosen = some(fit, captions, np.random.default_rng(seed))
        texts = []
        for number, face in enumerate(chosen):
            sampling = replace(CAPTION_SAMPLING, seed=seed * len(faces) + number)
            texts.append(generator.caption(face.pixels, 1, sampling)[0].text)
            on_caption()
        for name in WORDS:
            pairs = [(said(text, name), face.values[name]) for text, face in zip(texts, chosen, strict=True)]
            spoken = [(values, truth) for values, truth in pairs if values]
            named[name][seed] = [float(bool(values)) for values, _ in pairs]
            right[name][seed] = [float(values == {truth}) for values, truth in spoken]
            if spoken:
                # A caption that names two values is right for no face: it counts as one more value.
                seen = [next(iter(values)) if len(values) == 1 else len(TRAITS[name]) for values, _ in spoken]
                by_chance[name].append(chance([truth for _, truth in spoken], seen))
    return {
        name: CaptionResult(
            share(named[name]),
            share(right[name]) if any(right[name]) else None,
            mean(by_chance[name]) if by_chance[name] else None,
        )
        for name in WORDS
    }
