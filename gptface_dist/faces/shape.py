"""The morphed head: age, gender, base shape, individual features, expression."""

import numpy as np

from gptface_dist.faces.attributes import SHAPE_STREAM, Attributes, stream
from gptface_dist.faces.head_model import SHAPE_FOLDERS, HeadModel
from gptface_dist.faces.mesh import Floats

AGE_WEIGHTS = {
    "child": {"child": 0.72, "young": 0.28},
    "young": {"young": 1.0},
    "middle-aged": {"young": 0.6, "old": 0.4},
    "old": {"old": 0.9, "young": 0.1},
}
FEATURES = 30
# Targets that move the head as a whole, that look like injuries, or that look like an expression stay out.
UNWANTED = (
    "head-trans", "head-age", "neck-", "asym-top", "asymm-", "head-angle", "eye-push", "eye-corner", "mouth-trans-forward",
    "mouth-angles", "eyebrows-angle", "eyebrows-trans-down", "asym-brown", "asym-mouth", "lip-ext", "lip-middle",
)  # fmt: skip

# Facial actions (the 52 of ARKit) and their strengths; names without a side stand for both.
ACTIONS: dict[str, dict[str, float]] = {
    # The mesh's own lids and corners of the mouth rest low: an attentive, calm face has them a little higher.
    "neutral": {"eyeWide": 0.35, "mouthSmile": 0.12, "browOuterUp": 0.1},
    "happy": {"mouthSmile": 1.2, "cheekSquint": 0.7, "mouthUpperUp": 0.45, "jawOpen": 0.12, "mouthDimple": 0.2, "eyeWide": 0.4},
    "sad": {
        "mouthFrown": 1.2,
        "browInnerUp": 1.4,
        "mouthShrugLower": 0.7,
        "eyeSquint": 0.2,
        "eyeLookDown": 0.25,
        "eyeWide": 0.2,
    },
    "angry": {"browDown": 1.5, "noseSneer": 0.65, "mouthPress": 0.7, "eyeSquint": 0.35, "mouthFrown": 0.7, "eyeWide": 0.25},
    "surprised": {"browInnerUp": 1.0, "browOuterUp": 1.15, "eyeWide": 1.0, "jawOpen": 0.6, "mouthFunnel": 0.25},
    "disgusted": {
        "noseSneer": 1.35,
        "mouthUpperUp": 1.0,
        "browDown": 0.6,
        "eyeSquint": 0.6,
        "mouthFrown": 0.4,
        "mouthShrugLower": 0.3,
    },
    "afraid": {
        "browInnerUp": 1.4,
        "browOuterUp": 0.25,
        "eyeWide": 1.1,
        "mouthStretch": 1.1,
        "jawOpen": 0.24,
        "mouthLowerDown": 0.4,
    },
}
BOTH_SIDES = ("Left", "Right")


def morph(model: HeadModel, face: Attributes, expression: bool = True) -> Floats:
    """Vertex positions (v, 3) of the face in the mesh's own coordinates, before posing; with a blank face on request."""
    points = model.rest.copy()
    random = stream(face.variation, SHAPE_STREAM)
    weight = ("averageweight", "maxweight", "minweight")[int(random.choice(3, p=[0.6, 0.2, 0.2]))]
    for age, share in AGE_WEIGHTS[face.age].items():
        _add(points, model, f"macro/{face.head_shape}-{face.gender}-{age}", share)
        _add(points, model, f"macro/universal-{face.gender}-{age}-averagemuscle-{weight}", share)
    features = [key for key in model.targets if key.split("/")[0] in SHAPE_FOLDERS and not any(w in key for w in UNWANTED)]
    for chosen in random.choice(len(features), FEATURES, replace=False):
        _add_both(points, model, features[chosen], float(random.uniform(0, 0.5)))
    strength = float(random.uniform(0.85, 1.05))
    for action, share in expression_actions(face).items() if expression else ():
        _add(points, model, f"face/{action}", share * strength)
    return points


def expression_actions(face: Attributes) -> dict[str, float]:
    """Facial actions of the expression by full name (``mouthSmileLeft``)."""
    actions = dict(ACTIONS[face.expression])
    if face.eyes_closed:
        actions = {name: share for name, share in actions.items() if not name.startswith("eye")} | {"eyeBlink": 1.0}
    full: dict[str, float] = {}
    for name, share in actions.items():
        sides = ("",) if name in ("jawOpen", "browInnerUp", "mouthShrugLower", "mouthFunnel") else BOTH_SIDES
        full |= {name + side: share for side in sides}
    return full


def _add_both(points: Floats, model: HeadModel, key: str, share: float) -> None:
    """Features of one side come on both, but for the deliberate asymmetries."""
    _add(points, model, key, share)
    folder, _, name = key.partition("/")
    if name.startswith(("l-", "r-")):
        other = "r-" if name.startswith("l-") else "l-"
        _add(points, model, f"{folder}/{other}{name[2:]}", share)


def _add(points: Floats, model: HeadModel, key: str, share: float) -> None:
    vertices, moves = model.targets[key]
    points[vertices] += np.float32(share) * moves
