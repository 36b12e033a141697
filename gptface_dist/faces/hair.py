"""Hair: shells that grow out of the scalp, and sheets that hang, cut to strands where they end."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gptface_dist.faces.attributes import HAIR_STREAM, Attributes, stream
from gptface_dist.faces.materials import Material
from gptface_dist.faces.mesh import Floats, grid_triangles
from gptface_dist.faces.noise import noise, smoothstep
from gptface_dist.faces.scene import Keep, Piece
from gptface_dist.faces.wardrobe import Sheet, Wardrobe, above_hairline, azimuth

# Azimuth of the front edge of hanging hair, by height on the rest head.
FRONT_EDGE = np.array(
    [(5.0, 40), (6.0, 47), (6.5, 52), (7.0, 57), (7.4, 55), (7.65, 47), (7.85, 38), (8.05, 24), (8.2, 0)], np.float32
)


@dataclass(frozen=True)
class Cut:
    """One head of hair: lengths in decimetres on the rest head."""

    top: float
    """How far hair stands off the crown."""
    sides: float
    """How far it stands off the sides."""
    shells: tuple[float, ...] = (1.0,)
    """Heights of the shells as shares of the full one; more than one makes curls."""
    hangs_to: float | None = None
    """Height where hanging hair ends; None: none hangs."""
    fringe_to: float | None = None
    """Height where the fringe ends; None: no fringe."""
    opening: float = 0.0
    """Degrees by which hanging hair leaves more of the cheeks free."""
    wave: float = 0.0
    """How far hanging hair waves."""
    parting: float | None = None
    """x of the parting; None: none is seen."""


def cut_of(face: Attributes) -> Cut | None:
    """The cut of a face's hair; None where no hair stands off the head."""
    random = stream(face.variation, HAIR_STREAM)
    size, length, wave, parting = (
        random.uniform(0.8, 1.2),
        random.random(),
        random.uniform(0, 0.05),
        random.choice([-0.3, 0.0, 0.3]),
    )
    female = face.gender == "female"
    fringe = float(7.62 + 0.10 * random.random()) if face.fringe else None
    if face.hat not in ("none", "headband"):
        size, fringe = size * 0.6, None
    if face.hair_style == "short":
        return Cut(top=0.17 * size, sides=0.06 * size, fringe_to=fringe + 0.1 if fringe else None)
    if face.hair_style == "medium":
        return Cut(
            0.17 * size, 0.13, hangs_to=5.95 + 0.45 * length, fringe_to=fringe, opening=4 * length, wave=wave, parting=parting
        )
    if face.hair_style == "long":
        return Cut(
            0.16 * size,
            0.13,
            hangs_to=5.0 + 0.45 * length,
            fringe_to=fringe,
            opening=2 + 5 * length,
            wave=wave,
            parting=parting,
        )
    if face.hair_style == "curly":
        hangs = 6.0 + 0.5 * length if female else None
        return Cut(
            0.30 * size, 0.24 * size if female else 0.14 * size, shells=(0.45, 0.65, 0.82, 1.0), hangs_to=hangs, wave=0.06
        )
    if face.hair_style == "afro":
        return Cut(0.62 * size, 0.50 * size, shells=(0.5, 0.65, 0.8, 0.9, 1.0))
    if face.hair_style == "bun":
        return Cut(0.07, 0.05)
    return None


def hair_pieces(wardrobe: Wardrobe, face: Attributes, points: Floats, normal: Floats, moves: Floats) -> list[Piece]:
    """The hair of a face: ``points``, ``normal`` and ``moves`` (v, 3) are the morphed head's vertices, their normals, and
    their displacements from rest, the expression's left out.
    """
    cut = cut_of(face)
    if cut is None:
        return []
    seed = float(face.variation % 29)
    pieces = [_shell(wardrobe, face, cut, points, normal, share, seed) for share in cut.shells]
    if cut.hangs_to is not None:
        pieces.append(_hanging(wardrobe.curtain, face, cut, moves, seed))
    if cut.fringe_to is not None:
        pieces.append(_fringe(wardrobe.fringe, cut, moves, seed))
    if face.hair_style == "bun" and face.hat in ("none", "headband"):
        pieces.append(_bun(wardrobe, face, points))
    return pieces


def _shell(w: Wardrobe, face: Attributes, cut: Cut, points: Floats, normal: Floats, share: float, seed: float) -> Piece:
    vertices = w.scalp_vertices
    rest = np.float32(0) + w.scalp_rest
    over = above_hairline(rest)
    on_top = smoothstep(rest[:, 1], 7.5, 8.15)
    # Under hanging hair the shell does not thin out at the sides.
    thin = smoothstep(over, -0.02, 0.34)
    if cut.hangs_to is not None:
        thin = np.maximum(thin, smoothstep(np.abs(azimuth(rest)), 40, 62) * (over > -0.1))
    thickness = (cut.sides + (cut.top - cut.sides) * on_top) * (0.12 + 0.88 * thin)
    curls = len(cut.shells) > 1
    if not curls:
        thickness = thickness * (0.85 + 0.3 * noise(rest * np.float32(2.3) + np.float32(seed)))
    raised = points[vertices] + _smoothed(w, normal[vertices]) * (thickness * share + 0.01)[:, None].astype(np.float32)
    keep = _curl_keep(cut, share, seed) if curls else _edge_keep(cut, seed)
    strand = _combed(rest, cut)
    return Piece.of(Material.HAIR, raised, rest, w.scalp_triangles, strand=strand, keep=keep)


def _smoothed(w: Wardrobe, normal: Floats) -> Floats:
    """Scalp normals evened out, so that thick hair neither crosses itself nor shows the skull's bumps."""
    even = normal + 1.2 * w.scalp_out
    return (even / np.linalg.norm(even, axis=1, keepdims=True)).astype(np.float32)


def _combed(rest: Floats, cut: Cut) -> Floats:
    """Strand coordinates on the scalp: down from a parting, or out from the crown."""
    if cut.parting is not None:
        down = np.abs(np.arctan2(rest[:, 0] - cut.parting, rest[:, 1] - 7.3))
        return np.stack([rest[:, 2], down], 1).astype(np.float32)
    out = np.hypot(rest[:, 0], rest[:, 2] - 0.2)
    return np.stack([np.arctan2(rest[:, 0], rest[:, 2] - 0.2) * 0.9, out - rest[:, 1]], 1).astype(np.float32)


def _edge_keep(cut: Cut, seed: float) -> Keep:
    """Hair begins at the hairline, strand by strand."""

    def keep(rest: Floats, strand: Floats) -> NDArray[np.bool_]:
        jag = noise(np.stack([strand[:, 0] * 30, strand[:, 1] * 2, np.full(len(rest), seed, np.float32)], 1)) - 0.5
        kept = above_hairline(rest) + 0.10 * jag > 0.02
        if cut.parting is not None:
            width = 0.012 + 0.012 * jag
            kept &= (np.abs(rest[:, 0] - cut.parting) > width) | (rest[:, 2] < 0.2)
        return kept

    return keep


def _curl_keep(cut: Cut, share: float, seed: float) -> Keep:
    """Curls: the farther out a shell lies, the less of it exists."""

    def keep(rest: Floats, strand: Floats) -> NDArray[np.bool_]:
        lumps = 0.6 * noise(rest * np.float32(11) + np.float32(seed)) + 0.4 * noise(rest * np.float32(27) + np.float32(seed))
        edge = above_hairline(rest) + 0.16 * (lumps - 0.5)
        return (edge > 0.02 + 0.10 * share) & (lumps > 0.5 * (share - 0.42))

    return keep


def _hanging(sheet: Sheet, face: Attributes, cut: Cut, moves: Floats, seed: float) -> Piece:
    rest = sheet.rest
    degrees = azimuth(rest)
    points = rest + sheet.binding.displacement(moves)
    if face.hat not in ("none", "headband"):
        points = points - 0.05 * np.stack([np.sin(np.deg2rad(degrees)), 0 * degrees, np.cos(np.deg2rad(degrees))], 1)
    if cut.wave:
        phase = rest[:, 1] * 9 + 2.5 * noise(
            np.stack([degrees * 0.06, rest[:, 1], np.full(len(rest), seed)], 1).astype(np.float32)
        )
        swing = cut.wave * np.sin(phase) * smoothstep(rest[:, 1], 7.6, 6.6)
        angle = np.deg2rad(degrees)
        points = points + swing[:, None] * np.stack([np.sin(angle), 0 * angle, np.cos(angle)], 1)
    across = np.deg2rad(degrees) * 0.95
    ends = float(cut.hangs_to or 0)

    def keep(rest: Floats, strand: Floats) -> NDArray[np.bool_]:
        lock = noise(np.stack([strand[:, 0] * 9, rest[:, 1] * 0.5, np.full(len(rest), seed, np.float32)], 1)) - 0.5
        fine = noise(np.stack([strand[:, 0] * 40, rest[:, 1] * 0.8, np.full(len(rest), seed + 3, np.float32)], 1)) - 0.5
        edge = np.interp(rest[:, 1], FRONT_EDGE[:, 0], FRONT_EDGE[:, 1]) + cut.opening + 7 * lock * (rest[:, 1] < 7.6)
        edge = edge + 5 * (noise(np.stack([rest[:, 1] * 6, strand[:, 0], np.full(len(rest), seed, np.float32)], 1)) - 0.5)
        return (np.abs(azimuth(rest)) > edge) & (rest[:, 1] > ends + 0.22 * lock + 0.16 * fine)

    return Piece.of(
        Material.HAIR, points, rest, sheet.triangles, strand=np.stack([across, -rest[:, 1]], 1).astype(np.float32), keep=keep
    )


def _fringe(sheet: Sheet, cut: Cut, moves: Floats, seed: float) -> Piece:
    rest = sheet.rest
    sweep = np.deg2rad(azimuth(rest)) * 0.95 + 0.25 * (8.3 - rest[:, 1])
    ends = float(cut.fringe_to or 0)

    def keep(rest: Floats, strand: Floats) -> NDArray[np.bool_]:
        lock = (
            noise(np.stack([strand[:, 0] * 9, np.full(len(rest), 1.5, np.float32), np.full(len(rest), seed, np.float32)], 1))
            - 0.5
        )
        fine = noise(np.stack([strand[:, 0] * 36, rest[:, 1] * 0.8, np.full(len(rest), seed, np.float32)], 1)) - 0.5
        return (rest[:, 1] > ends + 0.16 * lock + 0.14 * fine - 0.1 * np.abs(rest[:, 0])) & (np.abs(rest[:, 0]) < 0.78)

    points = rest + sheet.binding.displacement(moves)
    return Piece.of(
        Material.HAIR, points, rest, sheet.triangles, strand=np.stack([sweep, -rest[:, 1]], 1).astype(np.float32), keep=keep
    )


def _bun(w: Wardrobe, face: Attributes, points: Floats) -> Piece:
    random = stream(face.variation, HAIR_STREAM, 1)
    top = w.scalp_vertices[w.scalp_rest[:, 1].argmax()]
    centre = points[top] + np.array([0, 0.16, -0.2], np.float32)
    radius = float(random.uniform(0.30, 0.40))
    polar, turn = np.meshgrid(np.linspace(0, np.pi, 12), np.linspace(0, 2 * np.pi, 22), indexing="ij")
    ball = np.stack([np.sin(polar) * np.sin(turn), 0.85 * np.cos(polar), np.sin(polar) * np.cos(turn)], -1).reshape(-1, 3)
    places = (centre + radius * ball).astype(np.float32)
    rest = np.array([0, 8.6, 0.3], np.float32) + radius * ball
    strand = np.stack([np.sin(polar + 0.6 * turn).ravel() * 0.5, polar.ravel() * 0.3], 1).astype(np.float32)
    return Piece.of(Material.HAIR, places, rest, grid_triangles(*polar.shape), strand=strand)
