"""Colours of skin, hair, eyes and things, as sRGB bytes, and the step to and from linear light."""

import numpy as np
from numpy.typing import NDArray

from gptface_dist.faces.attributes import COLORS
from gptface_dist.faces.mesh import Floats

SKIN_TONES = {
    "light": (233, 190, 168),
    "medium": (214, 165, 133),
    "tan": (182, 130, 96),
    "brown": (132, 86, 60),
    "dark": (84, 54, 42),
}
HAIR_TONES = {
    "black": (26, 21, 20),
    "brown": (78, 49, 31),
    "blond": (196, 156, 98),
    "red": (150, 66, 32),
    "gray": (138, 136, 134),
    "white": (222, 220, 216),
}
EYE_TONES = {"brown": (86, 52, 28), "blue": (76, 122, 172), "green": (84, 122, 72), "gray": (126, 136, 142)}
LIP_TONES = {"red": (178, 24, 40), "pink": (222, 96, 130)}
GAMMA = 2.2


def linear(color: tuple[int, int, int] | Floats) -> Floats:
    """sRGB bytes -> linear light in 0..1."""
    return (np.asarray(color, np.float32) / np.float32(255)) ** np.float32(GAMMA)


def to_bytes(light: Floats) -> NDArray[np.uint8]:
    """Linear light -> sRGB bytes; what exceeds 0.8 is eased into white instead of being cut."""
    eased = np.where(light > 0.8, 0.8 + 0.2 * (1 - np.exp(-(np.maximum(light, 0.8) - 0.8) / 0.2)), light)
    return (np.clip(eased, 0, 1) ** np.float32(1 / GAMMA) * 255 + 0.5).astype(np.uint8)


def named(color: str) -> Floats:
    """A colour of COLORS in linear light."""
    return linear(COLORS[color])
