"""Pose of the head and the shoulders, position of the camera, and projection of points into the picture."""

from dataclasses import dataclass

import numpy as np

from gptface_dist.faces.attributes import FRAME_STREAM, Attributes, stream
from gptface_dist.faces.head_model import HeadModel
from gptface_dist.faces.mesh import Floats

CAMERA_DISTANCE = 15.0
# Share of a turn that the shoulders follow.
SHOULDERS_FOLLOW = 0.3


def rotation(yaw: float, pitch: float, roll: float) -> Floats:
    """Rotation matrix (3, 3) of degrees about y, then x, then the viewing axis; signs as in :class:`Attributes`."""
    (cy, cp, cr), (sy, sp, sr) = np.cos(np.deg2rad([yaw, pitch, roll])), np.sin(np.deg2rad([yaw, pitch, roll]))
    turn = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    nod = np.array([[1, 0, 0], [0, cp, sp], [0, -sp, cp]])
    tilt = np.array([[cr, sr, 0], [-sr, cr, 0], [0, 0, 1]])
    return (tilt @ nod @ turn).astype(np.float32)


@dataclass(frozen=True)
class Pose:
    """Rotation and framing of one morphed head."""

    head: Floats
    """(3, 3) rotation of the head."""
    shoulders: Floats
    """(3, 3) rotation of the shoulders."""
    pivot: Floats
    """(3,) where neck and head meet."""
    centre: Floats
    """(3,) the point, already turned, that lies in the middle of the picture."""
    scale: float
    """Picture widths per decimetre at the head's distance."""

    @classmethod
    def of(cls, model: HeadModel, points: Floats, face: Attributes, closeness: float = 1.0) -> "Pose":
        """The pose of a face with morphed vertices (v, 3), enlarged ``closeness`` times about the picture's middle."""
        random = stream(face.variation, FRAME_STREAM)
        head = rotation(face.yaw, face.pitch, face.roll)
        shoulders = rotation(face.yaw * SHOULDERS_FOLLOW, 0, 0)
        pivot = model.joint(points, "head") + np.array([0, -0.3, 0.2], np.float32)
        eyes = (model.joint(points, "l-eye") + model.joint(points, "r-eye")) / 2
        height = float(model.joint(points, "head-2")[1] - model.joint(points, "jaw")[1])
        # Aim a little below the eyes, midway between where the turned face went and where it would be unturned.
        aim = np.array([0, eyes[1] - 0.09 * height, 0.6 * eyes[2]], np.float32)
        turned = (aim - pivot) @ head.T + pivot
        centre = (0.65 * turned + 0.35 * aim).astype(np.float32)
        centre[:2] += random.uniform(-0.05, 0.05, 2).astype(np.float32) * height
        return cls(head, shoulders, pivot, centre, closeness * float(0.665 * random.uniform(0.93, 1.06)) / height)

    def place(self, points: Floats, rest: Floats) -> Floats:
        """Turn points (n, 3); each follows the head to a degree that depends on its rest position."""
        follow = _smooth((rest[:, 1] + 0.42 * rest[:, 2] - 5.85) / 0.75)[:, None]
        local = points - self.pivot
        return follow * (local @ self.head.T) + (1 - follow) * (local @ self.shoulders.T) + self.pivot - self.centre

    def project(self, placed: Floats, width: int) -> tuple[Floats, Floats]:
        """Placed points (n, 3) -> pixel coordinates (n, 2), and depth (n,), larger is nearer.

        Depth is the reciprocal of the distance to the camera: it is what varies linearly over a triangle in the picture.
        """
        nearness = CAMERA_DISTANCE / (CAMERA_DISTANCE - placed[:, 2])
        across = width * (0.5 + self.scale * nearness * placed[:, 0])
        down = width * (0.5 - self.scale * nearness * placed[:, 1])
        return np.stack([across, down], 1).astype(np.float32), nearness.astype(np.float32)


def _smooth(value: Floats) -> Floats:
    value = np.clip(value, 0, 1)
    return value * value * (3 - 2 * value)
