"""Light: one soft main light, sky and ground, and a faint light from behind; colours in linear light."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gptface_dist.faces.attributes import LIGHT_STREAM, Attributes, stream
from gptface_dist.faces.mesh import Floats, unit

# Light enters skin and leaves it elsewhere, red farthest: how far past the edge of the light each channel still glows.
SKIN_WRAP = np.array([0.42, 0.24, 0.16], np.float32)
PLAIN_WRAP = np.array([0.1, 0.1, 0.1], np.float32)


@dataclass(frozen=True)
class Light:
    """Lights of one picture, in camera coordinates."""

    direction: Floats
    """(3,) unit vector towards the main light."""
    main: Floats
    """(3,) its linear colour."""
    sky: Floats
    """(3,) light from above."""
    ground: Floats
    """(3,) light from below."""
    rim: float
    """Strength of the light from behind."""

    @classmethod
    def of(cls, face: Attributes) -> "Light":
        """Direction from the face's attributes, strengths and tints from its variation."""
        random = stream(face.variation, LIGHT_STREAM)
        turn, height = np.deg2rad([face.light_azimuth, face.light_height])
        direction = np.array([np.sin(turn) * np.cos(height), np.sin(height), np.cos(turn) * np.cos(height)], np.float32)
        warm = float(random.uniform(-0.07, 0.09))
        tint = np.array([1 + warm, 1, 1 - warm], np.float32)
        ambient = float(random.uniform(0.34, 0.55))
        strength = float(random.uniform(0.62, 0.85))
        return cls(direction, strength * tint, ambient / tint, 0.7 * ambient * tint, float(random.uniform(0, 0.25)))


def shade(
    light: Light,
    color: Floats,
    normal: Floats,
    shadow: Floats,
    openness: Floats,
    gloss: Floats,
    soft: Floats,
    hair: NDArray[np.bool_],
) -> Floats:
    """Light (n, 3) that leaves surfaces towards the camera.

    ``color`` and ``normal`` (n, 3); ``shadow``, ``openness`` (n,): main light and sky that arrive, 0..1; ``gloss`` (n,) mirror
    share; ``soft`` (n,) 1 for skin; ``hair`` (n,) has its highlight along strands (Kajiya and Kay 1989).
    """
    cosine = normal @ light.direction
    wrap = np.where(soft[:, None] > 0.5, SKIN_WRAP, PLAIN_WRAP)
    lit = np.clip((cosine[:, None] + wrap) / (1 + wrap), 0, 1)
    lit *= lit * 0.35 + 0.65
    # What shadow remains on skin is tinted: red light gets through.
    open_to_light = shadow[:, None] ** np.where(soft[:, None] > 0.5, np.array([0.75, 1.0, 1.1], np.float32), 1)
    up = 0.5 + 0.5 * normal[:, 1:2]
    ambient = (light.ground + (light.sky - light.ground) * up) * openness[:, None] ** np.array([0.85, 1.0, 1.0], np.float32)
    arrived = light.main * lit * open_to_light + ambient
    edge = np.clip(1 - normal[:, 2], 0, 1) ** 3
    arrived += light.rim * edge[:, None] * openness[:, None]
    half = unit(light.direction + np.array([0, 0, 1], np.float32))
    sharp = np.where(gloss > 0.3, 90.0, 14.0)
    mirror = gloss * np.clip(normal @ half, 0, 1) ** sharp * (0.3 + 0.7 * shadow)
    mirror += 0.25 * gloss * edge * (gloss < 0.3)
    if hair.any():
        down = np.array([0, -1, 0], np.float32)
        across = normal[hair]
        tangent = unit(down - across * (across @ down)[:, None])
        sine = np.sqrt(np.clip(1 - (tangent @ half) ** 2, 0, 1))
        mirror[hair] = 0.22 * np.sqrt(color[hair].mean(1)) * sine**28 * np.clip(0.3 + cosine[hair], 0, 1)
    return color * arrived + mirror[:, None] * light.main
