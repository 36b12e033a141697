"""Pieces of a picture: meshes with what their materials need, ready to be turned and drawn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gptface_dist.faces.materials import Material
from gptface_dist.faces.mesh import Floats, Ints, normals

Keep = Callable[[Floats, Floats], NDArray[np.bool_]]
NO_STRANDS: Floats = np.zeros((0, 2), np.float32)


@dataclass
class Piece:
    """One mesh of one or more materials, in the head's own coordinates, not yet turned."""

    points: Floats
    """(n, 3) positions after morphing."""
    rest: Floats
    """(n, 3) rest coordinates, in which it is painted and by which it follows the head's turn."""
    triangles: Ints
    """(t, 3) indices into ``points``."""
    material: Ints
    """(t,) Material numbers."""
    strand: Floats = field(default_factory=lambda: NO_STRANDS)
    """(n, 2) coordinates across and along hair; empty for anything else."""
    keep: Keep | None = None
    """Rest (m, 3) and strand (m, 2) of fragments -> which of them exist; None: all."""

    @classmethod
    def of(
        cls,
        material: Material,
        points: Floats,
        rest: Floats,
        triangles: Ints,
        strand: Floats = NO_STRANDS,
        keep: Keep | None = None,
    ) -> "Piece":
        """A piece of one material."""
        number = np.full(len(triangles), int(material))
        return cls(points.astype(np.float32), rest.astype(np.float32), triangles, number, strand, keep)


@dataclass
class Scene:
    """All pieces as one mesh."""

    points: Floats
    """(v, 3) positions after morphing."""
    rest: Floats
    """(v, 3) rest coordinates."""
    strand: Floats
    """(v, 2) hair coordinates."""
    triangles: Ints
    """(t, 3) vertex indices."""
    material: Ints
    """(t,) Material numbers."""
    piece: Ints
    """(t,) which piece each triangle is of."""
    keeps: list[Keep | None]
    """The pieces' rules for their fragments."""

    @classmethod
    def of(cls, pieces: Sequence[Piece]) -> "Scene":
        """Pieces laid end to end; the first keeps its vertex numbers."""
        starts = np.cumsum([0, *(len(piece.points) for piece in pieces)])
        strands = [p.strand if len(p.strand) else np.zeros((len(p.points), 2), np.float32) for p in pieces]
        return cls(
            points=np.concatenate([p.points for p in pieces]),
            rest=np.concatenate([p.rest for p in pieces]),
            strand=np.concatenate(strands),
            triangles=np.concatenate([p.triangles + start for p, start in zip(pieces, starts, strict=False)]),
            material=np.concatenate([p.material for p in pieces]),
            piece=np.concatenate([np.full(len(p.triangles), k) for k, p in enumerate(pieces)]),
            keeps=[p.keep for p in pieces],
        )

    def normals(self, placed: Floats) -> Floats:
        """Vertex normals (v, 3) of the turned scene."""
        return normals(placed, self.triangles)
