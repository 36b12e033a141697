"""Named points of the face as vertices of the mesh: exact under every shape, expression and pose.

``left`` and ``right`` are the subject's own: the left eye lies in the right half of a frontal picture.
"""

import numpy as np

from gptface_dist.faces.head_model import BODY, HeadModel
from gptface_dist.faces.mesh import Ints

# Number of the vertex in the original base mesh; of paired points, the left one.
MIDLINE = {
    "nose_bridge": 132,
    "nose_tip": 297,
    "nose_base": 343,
    "upper_lip_top": 455,
    "upper_lip_bottom": 509,
    "lower_lip_top": 493,
    "lower_lip_bottom": 492,
    "chin": 5211,
}
PAIRED_VERTICES = {
    "eye_inner": 13360,
    "eye_outer": 6808,
    "upper_lid": 6785,
    "lower_lid": 6828,
}
# Paired points found on the rest mesh: the body vertex nearest to a place (x, y, z) on the left.
PAIRED_PLACES = {
    "brow_inner": (0.13, 7.50, 1.52),
    "brow_middle": (0.34, 7.575, 1.44),
    "brow_outer": (0.54, 7.50, 1.26),
    "nose_wing": (0.19, 6.87, 1.44),
    "mouth_corner": (0.25, 6.613, 1.40),
    "cheek": (0.52, 6.90, 1.25),
    "jaw_upper": (0.68, 6.85, 0.85),
    "jaw_angle": (0.54, 6.54, 0.95),
    "jaw_middle": (0.36, 6.31, 1.12),
    "temple": (0.66, 7.45, 1.0),
}
# The eyes' centres turn with no vertex: they are the joints of the balls.
EYE_JOINTS = {"left_eye": "l-eye", "right_eye": "r-eye"}


def landmark_vertices(model: HeadModel) -> dict[str, Ints]:
    """Name -> its vertex, as an array (1,); the eyes' centres, EYE_JOINTS, are not among them."""
    body = np.unique(model.triangles[model.part == BODY])
    outside = body[model.openness[body] > 0.02]
    points = {name: np.array([model.vertex(number)]) for name, number in MIDLINE.items()}
    places = {name: model.rest[model.vertex(number)] for name, number in PAIRED_VERTICES.items()}
    places |= {name: np.array(place, np.float32) for name, place in PAIRED_PLACES.items()}
    for name, place in places.items():
        for side, sign in (("left", 1), ("right", -1)):
            distance = np.linalg.norm(model.rest[outside] - place * np.array([sign, 1, 1], np.float32), axis=1)
            points[f"{side}_{name}"] = outside[[int(distance.argmin())]]
    return points
