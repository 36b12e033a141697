"""Colour of surfaces without light, painted in rest coordinates so that it moves with the skin."""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from gptface_dist.faces.attributes import SHADE_STREAM, Attributes, stream
from gptface_dist.faces.mesh import Floats
from gptface_dist.faces.noise import bump, noise, smoothstep, strands
from gptface_dist.faces.palette import HAIR_TONES, LIP_TONES, SKIN_TONES, linear, named
from gptface_dist.faces.wardrobe import above_hairline, azimuth


class Material(IntEnum):
    """Material of a triangle, by number."""

    BODY = 0
    LEFT_EYE = 1
    RIGHT_EYE = 2
    TEETH = 3
    TONGUE = 4
    UPPER_LASH = 5
    LOWER_LASH = 6
    HAIR = 7
    FRAME = 8
    DARK_LENS = 9
    HAT = 10
    FACE_MASK = 11
    EARRING = 12


LABELS = (
    "background", "skin", "left_brow", "right_brow", "left_eye", "right_eye", "glasses", "left_ear", "right_ear", "earring",
    "nose", "mouth", "upper_lip", "lower_lip", "neck", "cloth", "hair", "hat", "face_mask",
)  # fmt: skip
LABEL = {name: number for number, name in enumerate(LABELS)}
LIPS, EYELIDS, EARS, INSIDE_MOUTH = range(4)
# Height of the seam between the closed lips on the rest mesh, by distance from the middle.
LIP_SEAM = np.array([(0, 6.606), (0.12, 6.612), (0.25, 6.613)], np.float32)


@dataclass
class Surface:
    """Positions and paint of n fragments of the skin."""

    rest: Floats
    """(n, 3) rest coordinates."""
    masks: Floats
    """(n, 4) the head's paint masks, 0..1."""


@dataclass(frozen=True)
class Shades:
    """The unnamed choices of one face's colouring."""

    skin: Floats
    """(3,) linear colour."""
    hair: Floats
    """(3,) linear colour."""
    brow_height: float
    """Brow's height over its usual place, decimetres."""
    brow_width: float
    """Half its width, decimetres."""
    brow_arch: float
    """How far its middle rises."""
    blush: float
    """Redness of cheeks and nose."""
    seed: float
    """Offset into the noise."""
    stubble: float
    """Density of stubble."""

    @classmethod
    def of(cls, face: Attributes) -> "Shades":
        """Drawn from the face's variation."""
        random = stream(face.variation, SHADE_STREAM)
        tone = np.clip(np.array(SKIN_TONES[face.skin]) * random.uniform(0.94, 1.06) + random.normal(0, 2.5, 3), 10, 250)
        hair = np.clip(np.array(HAIR_TONES[face.hair_color]) * random.uniform(0.85, 1.18), 4, 245)
        male = face.gender == "male"
        width = (0.041 if face.thick_eyebrows else 0.024) * random.uniform(0.9, 1.1) * (1.1 if male else 0.95)
        return cls(
            skin=linear(tone.astype(np.float32)),
            hair=linear(hair.astype(np.float32)),
            brow_height=float(random.uniform(-0.008, 0.012) + (0 if male else 0.012)),
            brow_width=float(width),
            brow_arch=float(random.uniform(0.02, 0.045) + (0 if male else 0.015)),
            blush=float(random.uniform(0.3, 1.0) * (0.7 if male else 1.0)),
            seed=float(random.uniform(0, 30)),
            stubble=float(random.uniform(0.28, 0.42)),
        )


def mix(color: Floats, other: Floats, share: Floats) -> Floats:
    """``share`` (n,) of ``other`` (3,) or (n, 3) laid over ``color`` (n, 3)."""
    return color + (other - color) * share[:, None]


def brow_cover(rest: Floats, shades: Shades) -> Floats:
    """Density (n,) of the eyebrows in 0..1."""
    side = np.abs(rest[:, 0])
    along = (side - 0.12) / 0.44
    middle = (
        7.492
        + shades.brow_height
        + shades.brow_arch * np.sin(np.clip(along, 0, 1.1) * 2.5)
        - 0.05 * np.maximum(along - 0.62, 0)
    )
    half = shades.brow_width * (1 - 0.55 * np.clip(along, 0, 1) ** 1.6)
    edge = smoothstep(np.abs(rest[:, 1] - middle) - half, 0.014, -0.014)
    ends = smoothstep(along, -0.08, 0.14) * smoothstep(along, 1.06, 0.85)
    hairs = noise(np.stack([side * 34 + rest[:, 1] * 18, rest[:, 1] * 9 - side * 4, np.full_like(side, shades.seed)], 1))
    return edge * ends * (rest[:, 2] > 0.9) * (0.62 + 0.5 * hairs).clip(0, 1)


def beard_cover(rest: Floats, masks: Floats, face: Attributes, shades: Shades) -> Floats:
    """Density (n,) of the beard in 0..1; zero for all but faces with one."""
    if face.beard == "none":
        return np.zeros(len(rest), np.float32)
    x, y, z = np.abs(rest[:, 0]), rest[:, 1], rest[:, 2]
    lips = 1 - smoothstep(masks[:, LIPS], 0.2, 0.6)
    moustache = smoothstep(y, 6.665, 6.70) * smoothstep(y, 6.80, 6.765) * smoothstep(x, 0.31, 0.22) * smoothstep(z, 1.2, 1.3)
    goatee = smoothstep(x, 0.33, 0.23) * smoothstep(y, 6.49, 6.43) * smoothstep(z, 1.0, 1.2)
    ring = smoothstep(x, 0.38, 0.31) * smoothstep(x, 0.2, 0.27) * smoothstep(y, 6.78, 6.70) * smoothstep(z, 1.1, 1.2)
    # The cheek line falls from the sideburn to the corner of the mouth; the lower line follows the jaw, not the throat.
    cheek_line = np.interp(x, [0.0, 0.2, 0.34, 0.5, 0.66, 0.8], [6.5, 6.5, 6.72, 6.80, 6.98, 7.15]).astype(np.float32)
    jaw = smoothstep(cheek_line - y, -0.03, 0.07) * smoothstep(y + 0.5 * z, 6.74, 6.84) * smoothstep(z, 0.50, 0.62)
    if face.beard == "moustache":
        cover = moustache
    elif face.beard == "goatee":
        cover = np.maximum(np.maximum(moustache, goatee), ring)
    else:
        cover = np.maximum(np.maximum(jaw, moustache), ring)
    grain = noise(rest * np.float32(26 if face.beard == "stubble" else 17) + np.float32(shades.seed))
    if face.beard == "stubble":
        return cover * lips * shades.stubble * (0.7 + 0.6 * grain)
    return cover * lips * smoothstep(cover + 0.7 * grain, 0.35, 0.85) * 0.97


def beard_thickness(rest: Floats, face: Attributes) -> Floats:
    """How far (n,) the beard stands off the skin, decimetres."""
    if face.beard not in ("moustache", "goatee", "full beard"):
        return np.zeros(len(rest), np.float32)
    x, y, z = np.abs(rest[:, 0]), rest[:, 1], rest[:, 2]
    chin = smoothstep(y, 6.52, 6.36) * smoothstep(y, 6.05, 6.2) * smoothstep(z, 0.7, 1.1)
    if face.beard == "full beard":
        return 0.075 * chin + 0.03 * smoothstep(x, 0.3, 0.5) * smoothstep(y, 6.9, 6.7) * smoothstep(y, 6.1, 6.3) * smoothstep(
            z, 0.5, 0.8
        )
    return 0.07 * chin * smoothstep(x, 0.3, 0.1) if face.beard == "goatee" else np.zeros(len(rest), np.float32)


def below_collar(rest: Floats, face: Attributes) -> Floats:
    """How far (n,) body points lie under the neckline of the clothes, decimetres; negative where skin shows.

    A neckline is where a plane, higher at the nape than at the throat, cuts the neck; V-necks and shirts are cut out below it.
    """
    side, y, z = np.abs(rest[:, 0]), rest[:, 1], rest[:, 2]
    if face.clothes == "turtleneck":
        return 6.0 - 0.1 * z - y
    round_neck = 5.9 - 0.5 * np.maximum(z - 0.15, 0) - y
    # The tops of the shoulders lie before the plane.
    round_neck = np.maximum(round_neck, (side - 0.72) * (y < 6))
    depth = {"t-shirt": 0.0, "v-neck": 0.36, "shirt": 0.22}[face.clothes]
    if not depth:
        return round_neck
    cut_out = 5.52 - depth + (depth + 0.1) * side / 0.40 - y
    return np.where(z > 0.3, np.minimum(round_neck, cut_out), round_neck)


def hair_base(rest: Floats, face: Attributes, shades: Shades) -> Floats:
    """How much (n,) of the scalp's skin is hidden by the roots of the hair."""
    if face.hair_style == "bald":
        return np.zeros(len(rest), np.float32)
    jag = noise(np.stack([azimuth(rest) * 0.5, rest[:, 1] * 3, np.full(len(rest), shades.seed, np.float32)], 1)) - 0.5
    grown = smoothstep(above_hairline(rest) + 0.05 * jag, -0.015, 0.075)
    return grown * (0.8 if face.hair_style == "buzz cut" else 0.95)


def body_color(surface: Surface, face: Attributes, shades: Shades) -> tuple[Floats, NDArray[np.uint8], Floats]:
    """Colour (n, 3), labels (n,) and gloss (n,) of skin, lips, brows, beard, roots of hair, and clothes."""
    rest, masks = surface.rest, surface.masks
    x, y, z = rest[:, 0], rest[:, 1], rest[:, 2]
    side = np.abs(x)
    color = _skin(rest, masks, face, shades)
    gloss = np.full(len(rest), 0.06, np.float32) + 0.05 * bump(side, 0, 0.15) * smoothstep(z, 1.4, 1.6)

    lips = smoothstep(masks[:, LIPS], 0.25, 0.75)
    if face.lipstick == "none":
        lip_color = shades.skin * np.array([0.86, 0.46, 0.46], np.float32) + np.array([0.02, 0, 0], np.float32)
        color = mix(color, lip_color, 0.8 * lips)
    else:
        color = mix(color, linear(LIP_TONES[face.lipstick]), 0.95 * lips)
        gloss += 0.15 * lips
    color = mix(color, np.array([0.10, 0.018, 0.02], np.float32), smoothstep(masks[:, INSIDE_MOUTH], 0.3, 0.7))

    hair = shades.hair * np.float32(0.8)
    brows = brow_cover(rest, shades)
    brow_color = np.minimum(hair, np.float32(0.22)) * np.float32(0.75)
    color = mix(color, brow_color, 0.9 * brows)
    beard = beard_cover(rest, masks, face, shades)
    beard_color = shades.skin * np.float32(0.35) * 0.6 + hair * 0.4 if face.beard == "stubble" else hair
    color = mix(color, beard_color, beard)
    roots = hair_base(rest, face, shades)
    grain = 0.75 + 0.5 * noise(rest * np.float32(30))
    color = mix(color, shades.hair * (0.55 if face.hair_style != "buzz cut" else 0.8) * grain[:, None], roots)
    gloss *= 1 - 0.9 * np.maximum(np.maximum(beard, roots), brows)

    label = np.full(len(rest), LABEL["skin"], np.uint8)
    neck = (y + 0.30 * z < 6.47) & (z < 1.25)
    label[neck] = LABEL["neck"]
    ear = masks[:, EARS] > 0.5
    label[ear] = np.where(x[ear] > 0, LABEL["left_ear"], LABEL["right_ear"])
    nose = (side < 0.05 + 0.19 * smoothstep(y, 7.33, 6.95)) & (y < 7.34) & (y > 6.795) & (z > 1.36)
    label[nose] = LABEL["nose"]
    brow = brows > 0.4
    label[brow] = np.where(x[brow] > 0, LABEL["left_brow"], LABEL["right_brow"])
    seam = np.interp(side, LIP_SEAM[:, 0], LIP_SEAM[:, 1])
    lip = masks[:, LIPS] > 0.5
    label[lip] = np.where(y[lip] > seam[lip], LABEL["upper_lip"], LABEL["lower_lip"])
    label[masks[:, INSIDE_MOUTH] > 0.5] = LABEL["mouth"]
    label[(roots > 0.5) & ~neck] = LABEL["hair"]

    below = below_collar(rest, face)
    cloth = below > 0
    color[cloth] = _cloth(rest[cloth], below[cloth], face, shades)
    label[cloth] = LABEL["cloth"]
    gloss[cloth] = 0.01
    return color, label, gloss


def _skin(rest: Floats, masks: Floats, face: Attributes, shades: Shades) -> Floats:
    x, y, z = rest[:, 0], rest[:, 1], rest[:, 2]
    side = np.abs(x)
    mottled = noise(rest * np.float32(4.5) + np.float32(shades.seed)) - 0.5
    fine = noise(rest * np.float32(22) + np.float32(shades.seed)) - 0.5
    color = shades.skin * (1 + 0.07 * mottled + 0.05 * fine)[:, None]
    # Blood shows at cheeks, nose tip, ears and chin; the sockets are darker and cooler.
    cheek = np.exp(-0.5 * (((side - 0.47) / 0.17) ** 2 + ((y - 6.98) / 0.15) ** 2)) * (z > 0.7)
    nose = np.exp(-0.5 * ((side / 0.16) ** 2 + ((y - 6.93) / 0.11) ** 2)) * (z > 1.4)
    red = shades.blush * (0.55 * cheek + 0.5 * nose) + 0.4 * masks[:, EARS] + 0.2 * bump(y, 6.3, 0.1) * bump(side, 0, 0.2)
    color = color * (1 + red[:, None] * np.array([0.06, -0.20, -0.20], np.float32))
    socket = np.exp(-0.5 * (((side - 0.31) / 0.14) ** 2 + ((y - 7.26) / 0.10) ** 2)) * (z > 1.0)
    tired = {"child": 0.05, "young": 0.12, "middle-aged": 0.2, "old": 0.28}[face.age]
    color = color * (1 - tired * socket[:, None] * np.array([0.8, 1.0, 0.8], np.float32))
    if face.freckles:
        spots = noise(rest * np.float32(37) + np.float32(7 + shades.seed))
        where = np.exp(-0.5 * ((y - 7.02) / 0.16) ** 2) * smoothstep(side, 0.75, 0.5) * (z > 0.8)
        color = mix(color, shades.skin * np.array([0.55, 0.4, 0.32], np.float32), 0.6 * where * smoothstep(spots, 0.68, 0.8))
    if face.age in ("middle-aged", "old"):
        color = color * (1 - _wrinkles(rest, 1.0 if face.age == "old" else 0.45))[:, None]
    return color


def _wrinkles(rest: Floats, depth: float) -> Floats:
    """Darkening (n,) by three lines of the forehead, crow's feet, and the folds beside the mouth."""
    side, y, z = np.abs(rest[:, 0]), rest[:, 1], rest[:, 2]
    wave = 0.018 * np.sin(rest[:, 0] * 9) + 0.025 * side
    lines = sum(bump(y + wave, level, 0.011) for level in (7.70, 7.79, 7.875)) * smoothstep(side, 0.48, 0.3) * (z > 1.0)
    fold = (
        bump(side - (0.19 + 0.16 * np.clip((6.90 - y) / 0.35, 0, 1)), 0.0, 0.016)
        * smoothstep(y, 6.5, 6.6)
        * smoothstep(y, 6.93, 6.85)
    )
    feet = sum(bump(y - 7.285 - slope * (side - 0.5), 0.0, 0.008) for slope in (-0.35, 0.1, 0.5))
    feet = feet * smoothstep(side, 0.47, 0.51) * smoothstep(side, 0.62, 0.55) * (z > 0.7)
    return np.float32(depth) * (0.16 * lines + 0.2 * fold * (z > 1.0) + 0.13 * feet)


def _cloth(rest: Floats, below: Floats, face: Attributes, shades: Shades) -> Floats:
    """Colour (n, 3) of clothes at body points ``below`` (n,) the neckline."""
    color = named(face.clothes_color) * (0.94 + 0.12 * noise(rest * np.float32(14)))[:, None]
    side, y = np.abs(rest[:, 0]), rest[:, 1]
    if face.clothes == "turtleneck":
        return color * (1 - 0.25 * bump(y, 5.66, 0.03) + 0.05 * np.sin(azimuth(rest) * 0.8) * (y > 5.66))[:, None]
    if face.clothes == "shirt":
        # A collar a shade apart, its shadow on the cloth, and the placket's edges.
        collar = smoothstep(below, 0.17, 0.15) * (side < 0.75)
        edge = bump(below, 0.185, 0.015) * (side < 0.75)
        placket = bump(side, 0.07, 0.012) * (rest[:, 2] > 0.3)
        return color * (1 + 0.15 * collar - 0.4 * edge - 0.3 * placket * (1 - collar))[:, None]
    # The sewn border of a T-shirt or a V-neck.
    return color * (1 - 0.3 * bump(below, 0.06, 0.008) * (side < 0.75))[:, None]


def eye_color(rest: Floats, centre: Floats, gaze: Floats, tone: Floats) -> tuple[Floats, Floats]:
    """Colour (n, 3) and gloss (n,) of an eyeball: white, limbal ring, iris, pupil, by angle from its gaze."""
    direction = rest - centre
    direction /= np.linalg.norm(direction, axis=1, keepdims=True) + 1e-9
    angle = np.arccos(np.clip(direction @ gaze, -1, 1))
    around = np.arctan2(direction[:, 1], direction[:, 0])
    rays = 0.75 + 0.5 * noise(np.stack([around * 5, np.zeros_like(around), angle * 6], 1))
    iris = tone * (rays * (0.65 + 0.9 * smoothstep(angle, 0.12, 0.4)))[:, None]
    white = np.array([0.78, 0.74, 0.71], np.float32) * (1 - 0.25 * smoothstep(angle, 0.6, 1.1))[:, None]
    color = mix(white, iris, smoothstep(angle, 0.455, 0.415))
    color = color * (1 - 0.55 * bump(angle, 0.43, 0.03))[:, None]
    color = mix(color, np.array([0.008, 0.007, 0.006], np.float32), smoothstep(angle, 0.205, 0.165))
    return color, np.full(len(rest), 0.5, np.float32)


def hair_color(rest: Floats, across: Floats, along: Floats, face: Attributes, shades: Shades) -> Floats:
    """Colour (n, 3) of hair by its strands."""
    curly = face.hair_style in ("curly", "afro")
    if curly:
        shade = 0.45 + 1.0 * noise(rest * np.float32(15) + np.float32(shades.seed))
    else:
        shade = 0.5 + 0.95 * strands(across + np.float32(shades.seed), along, 24.0)
    return shades.hair * shade[:, None]
