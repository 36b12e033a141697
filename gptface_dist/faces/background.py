"""Background behind the head: one colour, a gradient, or a room out of focus."""

import numpy as np

from gptface_dist.faces.attributes import BACKGROUND_STREAM, Attributes, stream
from gptface_dist.faces.mesh import Floats
from gptface_dist.faces.noise import noise, smoothstep
from gptface_dist.faces.palette import named


def background(face: Attributes, width: int) -> Floats:
    """Linear light (width, width, 3)."""
    random = stream(face.variation, BACKGROUND_STREAM)
    base = named(face.background_color) * np.float32(random.uniform(0.8, 1.15))
    y, x = np.meshgrid(*[(np.arange(width, dtype=np.float32) + 0.5) / width] * 2, indexing="ij")
    fall = float(random.uniform(0.0, 0.25))
    light = 1 - fall * ((x - 0.5) ** 2 + (y - 0.45) ** 2) * 2
    if face.background == "plain":
        share: Floats = np.zeros_like(x)
    elif face.background == "gradient":
        angle = float(random.uniform(0, 2 * np.pi))
        share = smoothstep((x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle), -0.6, 0.6)
    else:
        shift = random.uniform(0, 30, 3).astype(np.float32)
        points = np.stack([x * 2.6, y * 2.2, np.zeros_like(x)], -1).reshape(-1, 3) + shift
        share = smoothstep(noise(points), 0.35, 0.75).reshape(width, width)
    other = base * random.uniform(0.25, 0.7) if random.random() < 0.5 else base * 0.6 + 0.4 * random.uniform(0.5, 1.0)
    other = other * (1 + random.uniform(-0.12, 0.12, 3))
    return ((base + (other - base).astype(np.float32) * share[..., None]) * light[..., None]).astype(np.float32)
