"""The part of a picture that an edit may change: as a box, a mask, a class of a parsing mask, or a part of the face by name."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

from gptface_dist.errors import UserError
from gptface_dist.generation.pictures import open_image

LABELS = (
    "background", "skin", "left_brow", "right_brow", "left_eye", "right_eye", "glasses", "left_ear", "right_ear", "earring",
    "nose", "mouth", "upper_lip", "lower_lip", "neck", "cloth", "hair", "hat", "face_mask",
)  # fmt: skip
"""Classes of parsing masks, by number: those of `gptface faces render`."""
GROUPS = {
    "brows": ("left_brow", "right_brow"),
    "eyes": ("left_eye", "right_eye", "glasses"),
    "lips": ("mouth", "upper_lip", "lower_lip"),
    "ears": ("left_ear", "right_ear", "earring"),
    "face": ("skin", "left_brow", "right_brow", "left_eye", "right_eye", "glasses", "nose", "mouth", "upper_lip", "lower_lip",
             "face_mask"),
}  # fmt: skip
"""Names for several classes of a parsing mask together."""
PLACES = {
    "hair": (0.14, 0.02, 0.86, 0.46),
    "hat": (0.14, 0.00, 0.86, 0.36),
    "brows": (0.26, 0.30, 0.74, 0.48),
    "eyes": (0.22, 0.34, 0.78, 0.56),
    "nose": (0.32, 0.42, 0.68, 0.66),
    "lips": (0.32, 0.58, 0.68, 0.78),
    "lower face": (0.24, 0.50, 0.76, 0.86),
    "face": (0.22, 0.26, 0.78, 0.86),
    "cloth": (0.00, 0.80, 1.00, 1.00),
}
"""Boxes of parts in an upright portrait with some room around the head: left, top, right, bottom as shares of the side."""
_BOX = re.compile(r"\s*(-?\d+)\s*,\s*(-?\d+)\s*,\s*(-?\d+)\s*,\s*(-?\d+)\s*")


def region(described: str, size: int, parsing: Path | None = None) -> np.ndarray:
    """Turn a description into bool [size, size]: true where pixels may change.

    Args:
        described: ``left,top,right,bottom`` in pixels of the model's picture (right and bottom outside); or the file of a
            mask, white where the picture may change; or, with ``parsing``, a class of LABELS or GROUPS; or, without, a part
            of PLACES.
        size: pixels of a side of the model's pictures.
        parsing: picture of class numbers, as ``mask.png`` of rendered faces.

    :class:`UserError` for an unknown description, an empty region, or a box that reaches outside the picture.
    """
    if box := _BOX.fullmatch(described):
        chosen = _box(described, tuple(int(number) for number in box.groups()), size)
    elif parsing is not None:
        chosen = _class(described, parsing, size)
    elif described in PLACES:
        left, top, right, bottom = (round(share * size) for share in PLACES[described])
        chosen = np.zeros((size, size), dtype=bool)
        chosen[top:bottom, left:right] = True
    elif Path(described).is_file():
        chosen = _resized(np.asarray(open_image(Path(described)).convert("L")) >= 128, size)
    else:
        raise UserError(
            f"region {described!r} is no box (left,top,right,bottom), no file and no part of the face ({', '.join(PLACES)})"
        )
    if not chosen.any():
        raise UserError(f"region {described!r} is empty: nothing would be edited")
    return chosen


def _box(described: str, box: tuple[int, ...], size: int) -> np.ndarray:
    left, top, right, bottom = box
    if not (0 <= left < right <= size and 0 <= top < bottom <= size):
        raise UserError(f"region {described!r} is no box inside the picture, which is {size}x{size}: left,top,right,bottom")
    chosen = np.zeros((size, size), dtype=bool)
    chosen[top:bottom, left:right] = True
    return chosen


def _class(described: str, parsing: Path, size: int) -> np.ndarray:
    names = GROUPS.get(described, (described,))
    if unknown := [name for name in names if name not in LABELS]:
        raise UserError(f"no class {unknown[0]!r} in parsing masks: use one of {', '.join([*LABELS, *GROUPS])}")
    classes = open_image(parsing)
    if classes.mode not in ("L", "P"):
        raise UserError(f"{parsing} has the mode {classes.mode}: a parsing mask holds a class number a pixel, in 8 bits")
    numbers = np.asarray(classes)
    if numbers.max() >= len(LABELS):
        raise UserError(f"{parsing} holds the number {numbers.max()}: classes of parsing masks are 0 to {len(LABELS) - 1}")
    chosen = np.isin(numbers, [LABELS.index(name) for name in names])
    if not chosen.any():
        raise UserError(f"{parsing} shows no {described}: give another class, or a box")
    return _resized(chosen, size)


def _resized(mask: np.ndarray, size: int) -> np.ndarray:
    """Cut the middle square of a mask and scale it to ``size``, as pictures are cut."""
    height, width = mask.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    cut = Image.fromarray(mask[top : top + side, left : left + side])
    return np.asarray(cut.resize((size, size), Image.Resampling.NEAREST))


def grown(chosen: np.ndarray, by: int) -> np.ndarray:
    """Add a margin of ``by`` pixels (steps to the four neighbours) around a region."""
    for _ in range(by):
        chosen = np.logical_or.reduce(_neighbourhood(np.pad(chosen, 1)))
    return chosen


def tokens_of(chosen: np.ndarray, factor: int) -> np.ndarray:
    """bool [h, w]: true for image tokens whose patch of ``factor`` x ``factor`` pixels holds a pixel of the region."""
    side = len(chosen) // factor
    patches: np.ndarray = np.logical_or.reduce(chosen.reshape(side, factor, side, factor), axis=(1, 3))
    return patches


def feathered(original: np.ndarray, drawn: np.ndarray, chosen: np.ndarray, width: int) -> np.ndarray:
    """Lay a region of a drawn picture over the original: uint8 [S, S, 3] of both, bool [S, S] of the region.

    Outside the region the original's pixels stay exactly. Inside, the weight of the drawn picture rises linearly with the
    distance (in steps to the four neighbours) from the region's edge, to 1 after ``width`` pixels. The picture's border is
    no edge.
    """
    inside = chosen
    weight = np.zeros(chosen.shape)
    for _ in range(width + 1):
        weight += inside
        inside = np.logical_and.reduce(_neighbourhood(np.pad(inside, 1, constant_values=True)))
    share = (weight / (width + 1))[..., None]
    mixed = np.rint(share * drawn + (1 - share) * original).astype(np.uint8)
    return np.where(chosen[..., None], mixed, original)


def _neighbourhood(padded: np.ndarray) -> list[np.ndarray]:
    """Five views [S, S] of a mask padded by 1: each pixel, and its four neighbours."""
    return [padded[1:-1, 1:-1], padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]
