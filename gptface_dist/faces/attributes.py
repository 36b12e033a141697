"""Attributes of a face: all inputs of its captions and of its rendering, drawn from (seed, number) alone."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np

GENDERS = ("female", "male")
AGES = ("child", "young", "middle-aged", "old")
HEAD_SHAPES = ("african", "asian", "caucasian")
SKINS = ("light", "medium", "tan", "brown", "dark")
HAIR_STYLES = ("bald", "buzz cut", "short", "medium", "long", "curly", "afro", "bun")
HAIR_COLORS = ("black", "brown", "blond", "red", "gray", "white")
EYE_COLORS = ("brown", "blue", "green", "gray")
BEARDS = ("none", "stubble", "moustache", "goatee", "full beard")
GLASSES = ("none", "round", "square", "sunglasses")
HATS = ("none", "cap", "beanie", "headband")
COVERINGS = ("none", "face mask")
LIPSTICKS = ("none", "red", "pink")
EXPRESSIONS = ("neutral", "happy", "sad", "angry", "surprised", "disgusted", "afraid")
CLOTHES = ("t-shirt", "v-neck", "turtleneck", "shirt")
BACKGROUNDS = ("plain", "gradient", "blurred")
COLORS = {
    "black": (24, 24, 27),
    "white": (232, 231, 227),
    "gray": (126, 128, 131),
    "red": (172, 32, 36),
    "orange": (217, 116, 30),
    "yellow": (222, 186, 52),
    "green": (44, 118, 62),
    "blue": (38, 78, 158),
    "purple": (104, 58, 138),
    "pink": (222, 134, 164),
    "brown": (102, 68, 44),
}
# Turned further than this (degrees), a face is said to look to a side, up or down; less than half of it, to look ahead.
TURNED = 18.0
RAISED = 12.0

# Random numbers are drawn from one stream a purpose, so that changing one part of a face leaves the others alone.
ATTRIBUTE_STREAM, SHAPE_STREAM, FRAME_STREAM, SHADE_STREAM = 0, 1, 2, 3
HAIR_STREAM, CAPTION_STREAM, LIGHT_STREAM, BACKGROUND_STREAM = 4, 5, 6, 7

T = TypeVar("T")


@dataclass(frozen=True)
class Attributes:
    """One face. The same attributes always make the same picture; change one field and only that changes."""

    gender: str
    """One of GENDERS."""
    age: str
    """One of AGES."""
    head_shape: str
    """One of HEAD_SHAPES: the base of the head's shape; never named in captions."""
    skin: str
    """One of SKINS."""
    hair_style: str
    """One of HAIR_STYLES."""
    hair_color: str
    """One of HAIR_COLORS."""
    fringe: bool
    """Hair falls over the forehead (styles medium and long, short)."""
    eye_color: str
    """One of EYE_COLORS."""
    thick_eyebrows: bool
    """Eyebrows clearly thicker than usual."""
    beard: str
    """One of BEARDS."""
    glasses: str
    """One of GLASSES."""
    hat: str
    """One of HATS."""
    hat_color: str
    """One of COLORS, whether or not there is a hat."""
    covering: str
    """One of COVERINGS: what hides the lower face."""
    covering_color: str
    """One of COLORS, whether or not there is a covering."""
    lipstick: str
    """One of LIPSTICKS."""
    earrings: bool
    """Earrings in both ears."""
    freckles: bool
    """Freckles on nose and cheeks."""
    clothes: str
    """One of CLOTHES."""
    clothes_color: str
    """One of COLORS."""
    background: str
    """One of BACKGROUNDS."""
    background_color: str
    """One of COLORS."""
    expression: str
    """One of EXPRESSIONS."""
    eyes_closed: bool
    """Both eyes shut."""
    yaw: float
    """Degrees the head is turned; positive towards the right edge of the picture, which is the subject's own left."""
    pitch: float
    """Degrees the head is raised; positive looks up."""
    roll: float
    """Degrees the head is tilted clockwise as the viewer sees it."""
    light_azimuth: float
    """Degrees of the main light from the camera's axis; positive from the right of the picture."""
    light_height: float
    """Degrees of the main light above the horizon."""
    variation: int
    """Seed of everything that has no name: the exact shape of the head, strands, shades, framing."""

    def to_json(self) -> dict[str, Any]:
        """Plain values by field name."""
        return asdict(self)


def stream(*key: int) -> np.random.Generator:
    """A generator of random numbers that depends on the integers of ``key`` alone."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def draw_attributes(seed: int, number: int) -> Attributes:
    """Face ``number`` of the collection ``seed``: attributes go together loosely as in the world, none is impossible."""
    return _Draw(stream(seed, number, ATTRIBUTE_STREAM)).attributes()


class _Draw:
    """The choices in their order; each may lean on those before it."""

    def __init__(self, random: np.random.Generator):
        self.random = random

    def one(self, options: Sequence[T], *weights: float) -> T:
        """One option, with the given weights (all equal when none are given)."""
        if not weights:
            return options[int(self.random.integers(len(options)))]
        edges = np.cumsum(weights)
        return options[min(int(np.searchsorted(edges, self.random.random() * edges[-1], side="right")), len(options) - 1)]

    def happens(self, probability: float) -> bool:
        """True with this probability."""
        return bool(self.random.random() < probability)

    def attributes(self) -> Attributes:
        """Draw all fields of a face, in a fixed order of draws."""
        one, happens = self.one, self.happens
        gender = one(GENDERS)
        male = gender == "male"
        age = one(AGES, 0.1, 0.45, 0.27, 0.18)
        adult = age != "child"
        head_shape = one(HEAD_SHAPES)
        skin = {
            "african": lambda: one(SKINS, 0.01, 0.04, 0.2, 0.45, 0.3),
            "asian": lambda: one(SKINS, 0.35, 0.37, 0.22, 0.05, 0.01),
            "caucasian": lambda: one(SKINS, 0.55, 0.28, 0.12, 0.04, 0.01),
        }[head_shape]()
        hair_style = self._hair_style(male, age, head_shape)
        hair_color = self._hair_color(age, head_shape)
        fringe = hair_style in ("short", "medium", "long") and happens(0.2 if male else 0.38)
        eye_color = (
            one(EYE_COLORS, 0.35, 0.33, 0.18, 0.14) if head_shape == "caucasian" else one(EYE_COLORS, 0.92, 0.03, 0.03, 0.02)
        )
        thick_eyebrows = happens(0.3 if male else 0.14)
        beard = one(BEARDS, 0.45, 0.17, 0.1, 0.1, 0.18) if male and adult else "none"
        glasses = one(GLASSES, 0.86, 0.05, 0.05, 0.04) if not adult else one(GLASSES, 0.68, 0.11, 0.12, 0.09)
        hat = one(HATS, 0.84, 0.06, 0.05, 0.05)
        hat_color = one(tuple(COLORS))
        covering = one(COVERINGS, 0.95, 0.05)
        covering_color = one(tuple(COLORS), 5, 4, 1, 1, 1, 1, 1, 5, 1, 1, 1)
        lipstick = one(LIPSTICKS, 0.52, 0.3, 0.18) if adult and not male else one(LIPSTICKS, 0.99, 0.006, 0.004)
        earrings = happens(0.04 if male else 0.36 if adult else 0.12)
        freckles = skin in ("light", "medium") and happens(0.25 if hair_color == "red" else 0.08)
        expression = one(EXPRESSIONS, 0.3, 0.28, 0.09, 0.09, 0.1, 0.07, 0.07)
        normal = self.random.normal
        return Attributes(
            gender=gender,
            age=age,
            head_shape=head_shape,
            skin=skin,
            hair_style=hair_style,
            hair_color=hair_color,
            fringe=fringe,
            eye_color=eye_color,
            thick_eyebrows=thick_eyebrows,
            beard=beard,
            glasses=glasses,
            hat=hat,
            hat_color=hat_color,
            covering=covering,
            covering_color=covering_color,
            lipstick=lipstick,
            earrings=earrings,
            freckles=freckles,
            clothes=one(CLOTHES, 0.4, 0.22, 0.13, 0.25),
            clothes_color=one(tuple(COLORS)),
            background=one(BACKGROUNDS, 0.3, 0.35, 0.35),
            background_color=one(tuple(COLORS), 0.6, 2, 2, 0.7, 0.7, 0.8, 1.2, 1.5, 0.8, 0.8, 1),
            expression=expression,
            eyes_closed=expression in ("neutral", "happy") and happens(0.04),
            yaw=round(float(np.clip(normal(0, 16), -40, 40)), 2),
            pitch=round(float(np.clip(normal(0, 6), -16, 16)), 2),
            roll=round(float(np.clip(normal(0, 4), -12, 12)), 2),
            light_azimuth=round(float(np.clip(normal(0, 32), -70, 70)), 2),
            light_height=round(float(self.random.uniform(8, 52)), 2),
            variation=int(self.random.integers(1 << 31)),
        )

    def _hair_style(self, male: bool, age: str, head_shape: str) -> str:
        bald = {"child": 0.0, "young": 0.04, "middle-aged": 0.16, "old": 0.26}[age]
        african = head_shape == "african"
        if male:
            weights = (bald, 0.18, 0.48, 0.07, 0.04, 0.1, 0.12 if african else 0.01, 0.01)
        else:
            weights = (0.006, 0.03, 0.14, 0.24, 0.33, 0.12, 0.16 if african else 0.01, 0.11)
        return self.one(HAIR_STYLES, *weights)

    def _hair_color(self, age: str, head_shape: str) -> str:
        if age == "old" and self.happens(0.78):
            return self.one(("gray", "white"))
        if age == "middle-aged" and self.happens(0.14):
            return "gray"
        if head_shape == "caucasian":
            return self.one(HAIR_COLORS, 0.17, 0.4, 0.27, 0.13, 0.015, 0.015)
        return self.one(HAIR_COLORS, 0.7, 0.24, 0.02, 0.02, 0.01, 0.01)
