"""Glasses, hats, face masks and earrings."""

import numpy as np
from numpy.typing import NDArray

from gptface_dist.faces.attributes import Attributes
from gptface_dist.faces.head_model import HeadModel
from gptface_dist.faces.materials import Material
from gptface_dist.faces.mesh import Floats, Ints, grid_triangles
from gptface_dist.faces.noise import smoothstep
from gptface_dist.faces.scene import Keep, Piece
from gptface_dist.faces.wardrobe import Sheet, Wardrobe

RIM_POINTS = 40
# On the rest head: the lowest vertex of the left ear lobe, and where an ear joins the head at the top.
LOBE = (0.70, 6.84, 0.50)
EAR_TOP = (0.79, 7.33, 0.52)


def hat_line(rest: Floats, face: Attributes) -> Floats:
    """Height (n,) of rest points over the lower edge of the face's hat."""
    tilt = 0.20 if face.hat != "headband" else 0.30
    edge = {"cap": 7.70, "beanie": 7.60, "headband": 7.62}.get(face.hat, 99.0)
    return rest[:, 1] - (edge + tilt * (rest[:, 2] - 0.35))


def accessory_pieces(
    model: HeadModel, wardrobe: Wardrobe, face: Attributes, points: Floats, normal: Floats, moves: Floats
) -> list[Piece]:
    """Everything worn: ``points``, ``normal``, ``moves`` (v, 3) are the morphed head's vertices, normals and displacements."""
    pieces: list[Piece] = []
    if face.hat != "none":
        pieces.append(_dome(wardrobe, face, points, normal))
    if face.hat == "cap":
        pieces.append(_bound(wardrobe.brim, Material.HAT, moves))
    if face.covering == "face mask":
        pieces.append(_bound(wardrobe.mask, Material.FACE_MASK, moves))
        pieces += [_loop(model, points, side, moves, wardrobe.mask) for side in (1, -1)]
    if face.glasses != "none":
        pieces += _glasses(model, face, points)
    if face.earrings:
        pieces += [_earring(model, face, points, side) for side in (1, -1)]
    return pieces


def _bound(sheet: Sheet, material: Material, moves: Floats) -> Piece:
    return Piece.of(material, sheet.rest + sheet.binding.displacement(moves), sheet.rest, sheet.triangles)


def _dome(w: Wardrobe, face: Attributes, points: Floats, normal: Floats) -> Piece:
    vertices, rest = w.scalp_vertices, w.scalp_rest
    over = hat_line(rest, face)
    outward = normal[vertices] + w.scalp_out
    outward /= np.linalg.norm(outward, axis=1, keepdims=True)
    high = smoothstep(over, 0.0, 0.6)
    band = {"bald": 0.05, "buzz cut": 0.05, "short": 0.11, "afro": 0.3}.get(face.hair_style, 0.15)
    thickness = {"cap": 0.12 + 0.08 * high, "beanie": 0.13 + 0.10 * high, "headband": np.full(len(rest), band)}[face.hat]
    raised = points[vertices] + outward * thickness[:, None].astype(np.float32)

    def keep(rest: Floats, strand: Floats) -> NDArray[np.bool_]:
        above = hat_line(rest, face)
        return (above > 0) & ((above < 0.17) if face.hat == "headband" else (above > 0))

    rule: Keep = keep
    return Piece.of(Material.HAT, raised, rest, w.scalp_triangles, keep=rule)


def _glasses(model: HeadModel, face: Attributes, points: Floats) -> list[Piece]:
    """Rims as flat rings before the eyes, a bridge, arms to the ears; for sunglasses also the dark lenses."""
    eyes = [model.joint(points, name) for name in ("l-eye", "r-eye")]
    apart = float(np.linalg.norm(eyes[0] - eyes[1]))
    lid = max(points[model.vertex(number)][2] for number in (6785, 1))
    front = max(float(lid) + 0.10, float(eyes[0][2]) + 0.26 * apart / 0.62)
    angle = np.linspace(0, 2 * np.pi, RIM_POINTS, endpoint=False)
    if face.glasses == "round":
        rim = np.stack([np.cos(angle), np.sin(angle)], 1) * 0.40
    else:
        wide, high = (0.46, 0.31) if face.glasses == "square" else (0.48, 0.37)
        power = 0.5 if face.glasses == "square" else 0.72
        rim = np.stack(
            [np.sign(c) * np.abs(c) ** power * size for c, size in ((np.cos(angle), wide), (np.sin(angle), high))], 1
        )
    rim = rim * apart
    thick = 0.075 if face.variation % 3 else 0.11
    places: list[Floats] = []
    frame: list[Ints] = []
    lens: list[Ints] = []

    def add(block: Floats) -> int:
        places.append(block.astype(np.float32))
        return sum(len(p) for p in places) - len(block)

    ears = [_nearest(model, EAR_TOP, side) for side in (1, -1)]
    for side, eye, ear in zip((1, -1), eyes, ears, strict=True):
        centre = np.array([eye[0] + side * 0.025, eye[1] - 0.02, front])
        for inner, outer, curve in ((1 - thick, 1 + thick, 0.0), (1 - thick * 0.6, 1 + thick * 0.6, -0.02)):
            ring = [_ring(centre, rim * scale, curve) for scale in (inner, outer)]
            start = add(np.concatenate(ring))
            k = np.arange(RIM_POINTS)
            n = (k + 1) % RIM_POINTS
            frame.append(
                start + np.concatenate([np.stack([k, n, k + RIM_POINTS], 1), np.stack([n, n + RIM_POINTS, k + RIM_POINTS], 1)])
            )
        if face.glasses == "sunglasses":
            start = add(np.concatenate([_ring(centre, rim, 0.0), centre[None]]))
            k = np.arange(RIM_POINTS)
            lens.append(start + np.stack([k, (k + 1) % RIM_POINTS, np.full(RIM_POINTS, RIM_POINTS)], 1))
        hinge = centre + np.array([side * (np.abs(rim[:, 0]).max() + 0.01), 0.06, -0.02])
        frame.append(add(_bar(hinge, points[ear] + np.array([side * 0.02, 0.03, 0.05]), 0.03)) + BAR)
    inner = np.abs(rim[:, 0]).max()
    left, right = (
        np.array([eye[0] + s * 0.025 - s * inner, eye[1] + 0.03, front]) for eye, s in zip(eyes, (1, -1), strict=True)
    )
    frame.append(add(_bar(left, right, 0.028)) + BAR)
    everything = np.concatenate(places)
    rest = everything - np.array([0, (eyes[0][1] + eyes[1][1]) / 2 - 7.284, eyes[0][2] - 1.245], np.float32)
    pieces = [Piece.of(Material.FRAME, everything, rest, np.concatenate(frame))]
    if lens:
        pieces.append(Piece.of(Material.DARK_LENS, everything, rest, np.concatenate(lens)))
    return pieces


def _ring(centre: NDArray[np.floating], rim: NDArray[np.floating], back: float) -> Floats:
    """A rim about ``centre``, bent back a little towards the temple."""
    bend = np.full(len(rim), back) - 0.12 * np.abs(rim[:, 0] + np.sign(centre[0]) * 0.2) ** 2
    return (centre + np.concatenate([rim, bend[:, None]], 1)).astype(np.float32)


# Two crossed quads: seen from any side, a bar has width.
BAR = np.array([[0, 1, 2], [1, 3, 2], [4, 5, 6], [5, 7, 6]])


def _bar(start: NDArray[np.floating], end: NDArray[np.floating], half: float) -> Floats:
    """Corners (8, 3) of a straight bar between two points."""
    along = end - start
    up = np.array([0, half, 0])
    across = np.cross(along, up)
    across = across / (np.linalg.norm(across) + 1e-9) * half
    return np.stack([p + d for direction in (up, across) for p in (start, end) for d in (direction, -direction)]).astype(
        np.float32
    )


def _nearest(model: HeadModel, place: tuple[float, float, float], side: int) -> int:
    target = np.array(place, np.float32) * np.array([side, 1, 1], np.float32)
    distance = np.linalg.norm(model.rest - target, axis=1) + 10 * (model.openness < 0.02)
    return int(distance.argmin())


def _loop(model: HeadModel, points: Floats, side: int, moves: Floats, sheet: Sheet) -> Piece:
    """The two strings of a face mask, from its corners to behind the ear."""
    places = sheet.rest + sheet.binding.displacement(moves)
    columns = 41
    edge = columns - 1 if side > 0 else 0
    ear = points[_nearest(model, EAR_TOP, side)]
    upper = _bar(places[edge], ear + np.array([side * 0.03, 0, 0]), 0.012)
    lower = _bar(places[(len(places) // columns - 1) * columns + edge], points[_nearest(model, LOBE, side)], 0.012)
    block = np.concatenate([upper, lower])
    return Piece.of(Material.FACE_MASK, block, block - points[0] + model.rest[0], np.concatenate([BAR, BAR + 8]))


def _earring(model: HeadModel, face: Attributes, points: Floats, side: int) -> Piece:
    """A ball, or a ring that hangs, under the ear lobe."""
    vertex = _nearest(model, LOBE, side)
    lobe, rest = points[vertex], model.rest[vertex]
    if face.variation % 2:
        polar, turn = np.meshgrid(np.linspace(0, np.pi, 7), np.linspace(0, 2 * np.pi, 12), indexing="ij")
        shape = np.stack([np.sin(polar) * np.sin(turn), np.cos(polar), np.sin(polar) * np.cos(turn)], -1).reshape(-1, 3) * 0.062
        offset = np.array([side * 0.03, -0.05, 0.05])
    else:
        around, tube = np.meshgrid(np.linspace(0, 2 * np.pi, 25), np.linspace(0, 2 * np.pi, 6), indexing="ij")
        radius = 0.13 + 0.022 * np.cos(tube)
        shape = np.stack([radius * np.sin(around), radius * np.cos(around), 0.022 * np.sin(tube)], -1).reshape(-1, 3)
        offset = np.array([side * 0.05, -0.15, 0.04])
        polar = around
    return Piece.of(Material.EARRING, lobe + offset + shape, rest + offset + shape, grid_triangles(*polar.shape))
