"""The four traits of rendered faces that the study prompts and judges: values, labels and their words in a prompt."""

from collections.abc import Mapping
from typing import Any

import numpy as np

TRAITS: dict[str, tuple[str, ...]] = {
    "gender": ("female", "male"),
    "glasses": ("no", "yes"),
    "hair": ("black", "brown", "blond", "red", "gray"),
    "expression": ("neutral", "happy", "sad", "angry", "surprised", "disgusted", "afraid"),
}
"""Values of each trait; gray hair includes white."""
UNKNOWN = -1
"""Stands for a trait that a picture does not show: hair under a hat, an expression behind a mask."""

Values = dict[str, int]
"""Trait -> index of its value in TRAITS, or UNKNOWN."""

_ADJECTIVES = ("", "smiling", "sad", "angry", "surprised", "disgusted", "scared")
_LEAST_HAIR = 0.03
"""Share of the picture that hair must cover to be judged."""


def values_of(attributes: Mapping[str, Any], hair_share: float) -> Values:
    """Label a rendered face by its attributes and the share of the picture that its parsing mask calls hair."""
    color = {"white": "gray"}.get(attributes["hair_color"], attributes["hair_color"])
    masked = attributes["covering"] != "none"
    return {
        "gender": TRAITS["gender"].index(attributes["gender"]),
        "glasses": int(attributes["glasses"] != "none"),
        "hair": TRAITS["hair"].index(color) if hair_share >= _LEAST_HAIR else UNKNOWN,
        "expression": UNKNOWN if masked else TRAITS["expression"].index(attributes["expression"]),
    }


def random_values(count: int, rng: np.random.Generator) -> list[Values]:
    """Draw independent traits, each value equally often (to within one, if ``count`` does not divide).

    Whatever pictures show, chance then agrees with the prompts in a share of 1 / (number of values).
    """
    drawn = {name: rng.permutation(np.arange(count) % len(values)).tolist() for name, values in TRAITS.items()}
    return [dict(zip(drawn, row, strict=True)) for row in zip(*drawn.values(), strict=True)]


def changed(values: Values, trait: str, rng: np.random.Generator) -> Values:
    """Copy ``values`` with another value of one trait."""
    step = 1 + int(rng.integers(len(TRAITS[trait]) - 1))
    return {**values, trait: (values[trait] + step) % len(TRAITS[trait])}


def prompt(values: Values) -> str:
    """``A smiling woman with red hair, wearing glasses.``, ``A man with black hair and a neutral expression.``"""
    adjective, noun = _ADJECTIVES[values["expression"]], ("woman", "man")[values["gender"]]
    subject = f"{adjective} {noun}".strip()
    article = "An" if subject[0] in "aeiou" else "A"
    face = "" if adjective else " and a neutral expression"
    worn = ", wearing glasses" if values["glasses"] else ""
    return f"{article} {subject} with {TRAITS['hair'][values['hair']]} hair{face}{worn}."
