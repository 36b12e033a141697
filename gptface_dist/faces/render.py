"""One face to one picture, its parsing mask and its landmarks."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gptface_dist.faces.accessories import accessory_pieces, hat_line
from gptface_dist.faces.attributes import SHADE_STREAM, Attributes, stream
from gptface_dist.faces.background import background
from gptface_dist.faces.hair import hair_pieces
from gptface_dist.faces.head_model import BODY, HeadModel, load_head
from gptface_dist.faces.landmarks import EYE_JOINTS, landmark_vertices
from gptface_dist.faces.light import Light, shade
from gptface_dist.faces.materials import (
    LABEL,
    LABELS,
    Material,
    Shades,
    Surface,
    beard_thickness,
    body_color,
    eye_color,
    hair_color,
)
from gptface_dist.faces.mesh import Floats, Ints, normals, unit
from gptface_dist.faces.noise import noise, smoothstep
from gptface_dist.faces.occlusion import harmonics
from gptface_dist.faces.palette import EYE_TONES, linear, named, to_bytes
from gptface_dist.faces.pose import Pose
from gptface_dist.faces.raster import Fragments, facing, fragments, nearest
from gptface_dist.faces.scene import Piece, Scene
from gptface_dist.faces.shape import morph
from gptface_dist.faces.wardrobe import Wardrobe, above_hairline

SMALLEST, LARGEST = 32, 512
# A point counts as seen if nothing lies more than this (in units of nearness) before it: a tenth of a decimetre.
SEEN_SLACK = 0.006
FACE_LABELS = tuple(
    LABEL[n] for n in LABELS if n not in ("background", "glasses", "earring", "cloth", "hair", "hat", "face_mask")
)


@dataclass(frozen=True)
class Picture:
    """A rendered face."""

    pixels: NDArray[np.uint8]
    """(size, size, 3) sRGB."""
    labels: NDArray[np.uint8]
    """(size, size) numbers of LABELS."""
    landmarks: dict[str, tuple[float, float, bool]]
    """Name -> x, y in pixels (x right, y down, the centre of the first pixel is 0.5, 0.5) and whether it is seen."""


class Renderer:
    """Draws faces; holds what all of them share."""

    def __init__(self, model: HeadModel | None = None):
        self.model = load_head() if model is None else model
        self.wardrobe = Wardrobe.of(self.model)
        self.landmarks = landmark_vertices(self.model)
        body = self.model.triangles[self.model.part == BODY]
        self._body = body
        self._left_eye = self.model.joint(self.model.rest, "l-eye")

    def draw(self, face: Attributes, size: int, closeness: float = 1.0) -> Picture:
        """The picture of a face, ``size`` pixels wide and high; ``closeness`` enlarges it about the middle."""
        model = self.model
        points = morph(model, face)
        still = morph(model, face, expression=False)
        normal = normals(points, self._body)
        grown = points + normal * beard_thickness(model.rest, face)[:, None]
        pieces = [Piece(grown, model.rest, model.triangles, model.part)]
        pieces += hair_pieces(self.wardrobe, face, still, normal, still - model.rest)
        pieces += accessory_pieces(model, self.wardrobe, face, points, normal, points - model.rest)
        scene = Scene.of(pieces)
        pose = Pose.of(model, still, face, closeness)
        placed = pose.place(scene.points, scene.rest)
        finer = oversampling(size)
        width = size * finer
        flat, depth = pose.project(placed, width)
        visible = self._visible(scene, face, flat, depth, width)
        light = Light.of(face)
        color, label = self._paint(scene, face, visible, scene.normals(placed), light, pose)
        picture = background(face, width).reshape(-1, 3)
        picture[visible.pixel] = color
        labels = np.zeros(width * width, np.uint8)
        labels[visible.pixel] = label
        nearness = np.zeros(width * width, np.float32)
        nearness[visible.pixel] = visible.depth
        small = picture.reshape(size, finer, size, finer, 3).mean((1, 3))
        return Picture(
            pixels=to_bytes(small),
            labels=_most_common(labels, size, finer),
            landmarks=self._landmarks(points, pose, size, finer, labels, nearness),
        )

    def _visible(self, scene: Scene, face: Attributes, flat: Floats, depth: Floats, width: int) -> Fragments:
        closed = scene.material <= Material.TONGUE
        drawn = ~closed | (facing(flat, scene.triangles) < 0)
        visible = fragments(flat, depth, scene.triangles, drawn, width)
        piece = scene.piece[visible.triangle]
        kept = np.ones(len(visible.pixel), bool)
        for number, rule in enumerate(scene.keeps):
            if rule is not None:
                indices = np.flatnonzero(piece == number)
                part = visible.take(indices)
                kept[indices] = rule(
                    part.interpolate(scene.triangles, scene.rest), part.interpolate(scene.triangles, scene.strand)
                )
        material = scene.material[visible.triangle]
        if face.hat in ("cap", "beanie"):
            hair = np.flatnonzero(material == Material.HAIR)
            kept[hair] &= hat_line(visible.take(hair).interpolate(scene.triangles, scene.rest), face) < 0.03
        elif face.hat == "headband":
            hair = np.flatnonzero(material == Material.HAIR)
            kept[hair] &= np.abs(hat_line(visible.take(hair).interpolate(scene.triangles, scene.rest), face) - 0.085) > 0.07
        lash = np.flatnonzero((material == Material.UPPER_LASH) | (material == Material.LOWER_LASH))
        kept[lash] &= _lashes(visible.take(lash).interpolate(scene.triangles, scene.rest), self._left_eye, material[lash], face)
        visible = visible.take(kept)
        return visible.take(nearest(visible))

    def _paint(
        self, scene: Scene, face: Attributes, visible: Fragments, normal: Floats, light: Light, pose: Pose
    ) -> tuple[Floats, NDArray[np.uint8]]:
        model = self.model
        shades = Shades.of(face)
        material = scene.material[visible.triangle]
        rest = visible.interpolate(scene.triangles, scene.rest)
        facing_out = unit(visible.interpolate(scene.triangles, normal))
        facing_out = np.where(facing_out[:, 2:] < 0, -facing_out, facing_out)
        vertices = np.ones((len(scene.rest), 2), np.float32)
        head_light = pose.head.T @ light.direction
        vertices[: len(model.rest), 0] = np.clip(model.visibility @ harmonics(head_light[None])[0], 0, 1)
        vertices[: len(model.rest), 1] = model.openness
        seen = visible.interpolate(scene.triangles, vertices)
        shadow, openness = seen[:, 0], seen[:, 1]
        color = np.zeros((len(material), 3), np.float32)
        label = np.zeros(len(material), np.uint8)
        gloss = np.zeros(len(material), np.float32)
        soft = np.zeros(len(material), np.float32)

        body = np.flatnonzero(material == Material.BODY)
        surface = Surface(rest[body], self._masks(visible.take(body)))
        color[body], label[body], gloss[body] = body_color(surface, face, shades)
        soft[body] = label[body] != LABEL["cloth"]
        openness[body] *= _under_hair(rest[body], face)
        for kind, joint, name in ((Material.LEFT_EYE, "l-eye", "left_eye"), (Material.RIGHT_EYE, "r-eye", "right_eye")):
            chosen = np.flatnonzero(material == kind)
            gaze = unit(np.array([*stream(face.variation, SHADE_STREAM, 1).normal(0, 0.06, 2), 1.0], np.float32))
            centre = model.joint(model.rest, joint)
            color[chosen], gloss[chosen] = eye_color(rest[chosen], centre, gaze, linear(EYE_TONES[face.eye_color]))
            label[chosen] = LABEL[name]
            openness[chosen] = 0.55 + 0.4 * smoothstep(7.335 - rest[chosen, 1], 0.0, 0.05)
            shadow[chosen] = np.maximum(shadow[chosen], 0.6)
        _flat(color, label, material, Material.TEETH, np.array([0.74, 0.70, 0.62], np.float32), "mouth")
        _flat(color, label, material, Material.TONGUE, np.array([0.36, 0.11, 0.11], np.float32), "mouth")
        inside = (material == Material.TEETH) | (material == Material.TONGUE)
        openness[inside] = 0.35 + 0.5 * smoothstep(rest[inside, 2], 1.25, 1.5)
        shadow[inside] = 0.6
        for kind in (Material.UPPER_LASH, Material.LOWER_LASH):
            lash = np.flatnonzero(material == kind)
            color[lash] = 0.012
            label[lash] = np.where(rest[lash, 0] > 0, LABEL["left_eye"], LABEL["right_eye"])
        hair = np.flatnonzero(material == Material.HAIR)
        strand = visible.take(hair).interpolate(scene.triangles, scene.strand)
        color[hair] = hair_color(rest[hair], strand[:, 0], strand[:, 1], face, shades)
        label[hair] = LABEL["hair"]
        openness[hair] = 0.6 + 0.4 * smoothstep(rest[hair, 1], 6.6, 7.9)
        frame = linear((22, 20, 20) if face.variation % 5 < 3 else (96, 60, 34) if face.variation % 5 == 3 else (120, 120, 124))
        _flat(color, label, material, Material.FRAME, frame, "glasses")
        _flat(color, label, material, Material.DARK_LENS, linear((20, 19, 22)), "glasses")
        _flat(
            color,
            label,
            material,
            Material.EARRING,
            linear((212, 176, 88) if face.variation % 4 < 2 else (198, 198, 204)),
            "earring",
        )
        gloss[material == Material.FRAME] = 0.2
        gloss[material == Material.DARK_LENS] = 0.04
        gloss[material == Material.EARRING] = 0.9
        hat = material == Material.HAT
        _flat(color, label, material, Material.HAT, named(face.hat_color), "hat")
        color[hat] *= _knit(rest[hat], face)[:, None]
        worn = material == Material.FACE_MASK
        _flat(color, label, material, Material.FACE_MASK, named(face.covering_color), "face_mask")
        color[worn] *= (1 - 0.18 * (np.abs(np.sin(rest[worn, 1] * 13)) > 0.96))[:, None]
        return shade(light, color, facing_out, shadow, openness, gloss, soft, material == Material.HAIR), label

    def _masks(self, visible: Fragments) -> Floats:
        """Paint masks (n, 4) in 0..1 at fragments of the head."""
        size = len(self.model.paint)
        uv = np.einsum("nc,nck->nk", visible.weights, self.model.uv[visible.triangle])
        column = np.clip((uv[:, 0] * size).astype(int), 0, size - 1)
        row = np.clip(((1 - uv[:, 1]) * size).astype(int), 0, size - 1)
        return self.model.paint[row, column].astype(np.float32) / np.float32(255)

    def _landmarks(
        self, points: Floats, pose: Pose, size: int, finer: int, labels: NDArray[np.uint8], nearness: Floats
    ) -> dict[str, tuple[float, float, bool]]:
        places = {name: points[vertices].mean(0) for name, vertices in self.landmarks.items()}
        rest = {name: self.model.rest[vertices].mean(0) for name, vertices in self.landmarks.items()}
        for name, joint in EYE_JOINTS.items():
            # The middle of the pupil, not of the ball.
            radius = np.array([0, 0, 0.15], np.float32)
            places[name] = self.model.joint(points, joint) + radius
            rest[name] = self.model.joint(self.model.rest, joint) + radius
        flat, depth = pose.project(pose.place(np.stack(list(places.values())), np.stack(list(rest.values()))), size)
        grid = (size * finer, size * finer)
        shows_face, nearness = np.isin(labels, FACE_LABELS).reshape(grid), nearness.reshape(grid)
        result = {}
        for name, (x, y), near in zip(places, flat, depth, strict=True):
            seen = False
            if 0 <= x < size and 0 <= y < size:
                column, row = int(x * finer), int(y * finer)
                covered = nearness[row, column] - near > SEEN_SLACK
                # Points on the outline may fall just beside it.
                around = np.s_[max(row - finer, 0) : row + finer + 1, max(column - finer, 0) : column + finer + 1]
                seen = not covered and bool((shows_face[around] & (np.abs(nearness[around] - near) < 2 * SEEN_SLACK)).any())
            result[name] = (round(float(x), 3), round(float(y), 3), seen)
        return result


def oversampling(size: int) -> int:
    """Samples a pixel along each axis."""
    return 3 if size <= 96 else 2


def _flat(color: Floats, label: NDArray[np.uint8], material: Ints, kind: Material, tone: Floats, name: str) -> None:
    """One colour and label for all of one material."""
    chosen = material == kind
    color[chosen] = tone
    label[chosen] = LABEL[name]


def _lashes(rest: Floats, left_eye: Floats, material: Ints, face: Attributes) -> NDArray[np.bool_]:
    """Which fragments of the lash sheets are lashes: a dense root that thins out away from the ball; less of it on men."""
    folded = np.stack([np.abs(rest[:, 0]), rest[:, 1], rest[:, 2]], 1)
    out = (np.linalg.norm(folded - left_eye, axis=1) - 0.15) / 0.05
    tooth = noise(np.stack([rest[:, 0] * 60, np.zeros(len(rest), np.float32), np.full(len(rest), 2.5, np.float32)], 1))
    reach = np.where(material == Material.UPPER_LASH, 1.15, 0.5) * (1.0 if face.gender == "female" else 0.55)
    return out < reach * (0.5 + 0.7 * tooth)


def _under_hair(rest: Floats, face: Attributes) -> Floats:
    """Darkening (n,) of skin close to hair or under a hat's edge."""
    shade = np.ones(len(rest), np.float32)
    if face.hair_style not in ("bald", "buzz cut"):
        shade *= 1 - 0.35 * smoothstep(above_hairline(rest), -0.16, 0.0) * (rest[:, 2] > 0.2)
    if face.hat in ("cap", "beanie"):
        shade *= 1 - 0.45 * smoothstep(hat_line(rest, face), -0.28 if face.hat == "cap" else -0.12, 0.0)
    return shade


def _knit(rest: Floats, face: Attributes) -> Floats:
    """Light and dark (n,) of a hat's cloth."""
    if face.hat == "beanie":
        fold = hat_line(rest, face)
        return (
            1
            - 0.3 * np.exp(-0.5 * ((fold - 0.24) / 0.02) ** 2)
            + 0.10 * np.sin(np.arctan2(rest[:, 0], rest[:, 2] - 0.35) * 40) * (fold < 0.24)
        )
    return 0.95 + 0.1 * noise(rest * np.float32(20))


def _most_common(labels: NDArray[np.uint8], size: int, finer: int) -> NDArray[np.uint8]:
    """The label that covers most of each pixel (the smaller number on a tie), (size, size)."""
    blocks = labels.reshape(size, finer, size, finer).transpose(0, 2, 1, 3).reshape(size * size, -1)
    flat = np.repeat(np.arange(size * size) * len(LABELS), blocks.shape[1]) + blocks.ravel()
    votes = np.bincount(flat, minlength=size * size * len(LABELS)).reshape(size * size, len(LABELS))
    return votes.argmax(1).astype(np.uint8).reshape(size, size)
