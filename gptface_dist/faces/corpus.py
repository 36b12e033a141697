"""Captioned rendered faces as picture shards: members and meaning of every sample, and the making of a folder of them.

Sample ``number`` is a function of (generator, seed, number, size, closeness, prominent, format) alone; which shard it lies
in, how many others there are and how many processes drew them changes none of its bytes. (Across machines the last bit of a
sum may differ with the processor and the version of numpy, and a pixel with it.) Its members, under the key
``f"{number:09d}"``:

- the picture, ``png`` by default: lossless, so that editing can keep pixels exactly;
- ``txt``: one caption;
- ``json``: all ``captions`` (the first one is that of ``txt``), ``attributes``, ``expression``, ``pose`` in degrees,
  ``landmarks`` (name -> [x, y, seen], in pixels), ``seed``, ``number``, ``size``, ``generator``;
- ``mask.png``: the parsing mask, eight-bit numbers of the classes listed in the index's ``meta.labels``.
"""

import errno
import functools
import io
import json
import re
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from gptface_dist.data.pool import ordered
from gptface_dist.data.shards import INDEX_NAME, ShardWriter, Sidecar, sidecar_path, write_index
from gptface_dist.errors import UserError
from gptface_dist.faces.attributes import CAPTION_STREAM, draw_attributes, stream
from gptface_dist.faces.captions import captions
from gptface_dist.faces.facts import hidden
from gptface_dist.faces.head_model import load_head
from gptface_dist.faces.materials import LABELS
from gptface_dist.faces.render import LARGEST, SMALLEST, Renderer
from gptface_dist.files import write_atomically
from gptface_dist.folder_lock import FolderLock

GENERATOR = "gptface-faces-1"
"""Changes whenever the same (seed, number) would give other members: attributes, captions, pictures."""
RECIPE_NAME = "render.json"
CAPTIONS = 5
FORMATS: dict[str, tuple[str, dict[str, int]]] = {
    "png": ("PNG", {}),
    "jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    "webp": ("WEBP", {"quality": 95}),
}
"""Extension -> Pillow's name of the format and its settings."""

_CHUNK = 16
_SHARD_NAME = re.compile(r"\d{5,}\.tar")
_LARGEST_COUNT = 10**9


@dataclass(frozen=True)
class Recipe:
    """Options that all shards of one folder share, stored in ``render.json``; a run with others may not add to the folder."""

    seed: int
    """Seed of the collection; another seed gives other faces."""
    size: int
    """Side of the square pictures, in pixels."""
    format: str = "png"
    """One of FORMATS."""
    shard_size: int = 1000
    """Samples of every shard but the last."""
    generator: str = GENERATOR
    """Version of the generator that maps (seed, number) to samples."""
    closeness: float = 1.0
    """Magnification of the head: 1 shows head and shoulders, 1.3 the head, 1.7 the face."""
    prominent: float = 0.0
    """Share of captions that name hair, expression and glasses before anything else; the others choose at random."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 64:
            raise UserError(f"the seed must be within 0 and 2**64 - 1, not {self.seed}")
        if not SMALLEST <= self.size <= LARGEST:
            raise UserError(f"faces are drawn {SMALLEST} to {LARGEST} pixels wide, not {self.size}")
        if self.format not in FORMATS:
            raise UserError(f"no picture format {self.format!r}: use {', '.join(FORMATS)}")
        if self.shard_size < 1:
            raise UserError(f"a shard must hold at least 1 face, not {self.shard_size}")
        if not 0.5 <= self.closeness <= 3:
            raise UserError(f"the closeness must be within 0.5 and 3, not {self.closeness:g}")
        if not 0 <= self.prominent <= 1:
            raise UserError(f"the prominent share must be within 0 and 1, not {self.prominent:g}")


@dataclass(frozen=True)
class _Chunk:
    recipe: Recipe
    numbers: range


class Rendering:
    """A folder of rendered faces in the making. All that can be refused is refused when it is constructed.

    ``00000.tar`` holds the samples 0 to ``shard_size - 1``, and so on. Finished shards are kept by a later run, which draws
    what is missing; a last shard that is not full is drawn again when ``count`` grows. ``index.json`` is written last: where
    it is missing beside ``render.json``, a run was interrupted.

    Args:
        out: the folder; it may hold shards of the same recipe.
        count: samples that it shall hold in all.
        recipe: what to draw.
        workers: spawned processes that draw (1: this one). Each should compute with one thread: set OMP_NUM_THREADS=1.
    """

    def __init__(self, out: Path, count: int, recipe: Recipe, workers: int = 1):
        if not 1 <= count <= _LARGEST_COUNT:
            raise UserError(f"the count of faces must be within 1 and {_LARGEST_COUNT}, not {count}")
        if workers < 1:
            raise UserError(f"at least 1 worker process is needed, not {workers}")
        self._out, self._recipe, self._workers = out, recipe, workers
        self.count = count
        """Samples that the folder shall hold."""
        self._shards = {
            out / f"{shard:05d}.tar": range(start, min(start + recipe.shard_size, count))
            for shard, start in enumerate(range(0, count, recipe.shard_size))
        }
        try:
            self._refuse_other_content()
            self._missing = {path: numbers for path, numbers in self._shards.items() if not _holds(path, numbers)}
        except OSError as error:
            raise _unusable(out, error) from None
        self.kept = count - sum(len(numbers) for numbers in self._missing.values())
        """Number of samples that the folder holds already."""
        if self._missing:
            # Where its data is not installed, this says so before a folder is made; and it is built once, not by each worker.
            load_head()

    def run(self) -> Iterator[int]:
        """Draw what is missing, then write the index. Yields, every few samples, how many more there are."""
        try:
            with FolderLock(self._out, "folder") as lock:
                try:
                    # Of a run that was killed.
                    self._remove_leftovers(lock.locked)
                    yield from self._draw()
                finally:
                    # On a full disk a file cannot even be closed properly, and stays.
                    self._remove_leftovers(lock.locked)
        except OSError as error:
            raise _unusable(self._out, error) from None

    def _remove_leftovers(self, locked: bool) -> None:
        """Remove temporary files; not without a lock, for they may be those of another run."""
        for left in self._out.glob(".*.tmp") if locked else ():
            left.unlink()

    def _draw(self) -> Iterator[int]:
        recipe_path, index_path = self._out / RECIPE_NAME, self._out / INDEX_NAME
        if not recipe_path.exists():
            write_atomically(recipe_path, json.dumps(asdict(self._recipe), indent=1) + "\n")
        if self._missing:
            # It describes the shards as they were before.
            index_path.unlink(missing_ok=True)
        chunks = [
            _Chunk(self._recipe, numbers[start : start + _CHUNK])
            for numbers in self._missing.values()
            for start in range(0, len(numbers), _CHUNK)
        ]
        drawn = ordered(_draw_chunk, chunks, self._workers)
        assert isinstance(drawn, Generator)
        with closing(drawn):
            for path, numbers in self._missing.items():
                with ShardWriter(path) as shard:
                    for _ in range(0, len(numbers), _CHUNK):
                        samples = next(drawn)
                        for key, members in samples:
                            shard.write(key, members)
                        yield len(samples)
        if not index_path.exists():
            meta = {**asdict(self._recipe), "labels": list(LABELS)}
            write_index(self._out, "pictures", meta, self._shards)

    def _refuse_other_content(self) -> None:
        """:class:`UserError` where the folder holds what this run would mix with other faces, or remove."""
        out = self._out
        if out.exists() and not out.is_dir():
            raise UserError(f"{out} is a file: give a folder")
        shards = sorted(out.glob("*.tar"))
        recipe_path = out / RECIPE_NAME
        if recipe_path.exists():
            try:
                made = Recipe(**json.loads(recipe_path.read_bytes()))
            except (ValueError, TypeError):
                raise UserError(f"{recipe_path} cannot be read as a rendering's parameters: give another folder") from None
            theirs, ours = asdict(made), asdict(self._recipe)
            differences = ", ".join(f"{name} {theirs[name]} (now {ours[name]})" for name in ours if theirs[name] != ours[name])
            if differences:
                raise UserError(f"{out} holds faces rendered with {differences}: give another folder, or the same parameters")
        elif shards or (out / INDEX_NAME).exists():
            raise UserError(f"{out} holds shards that `gptface faces render` did not make: give another folder")
        for path in shards:
            if not _SHARD_NAME.fullmatch(path.name):
                raise UserError(f"{path} was not made by `gptface faces render`: remove it, or give another folder")
            numbers = self._shards.get(path)
            if numbers is None or _samples(path) > len(numbers):
                raise UserError(
                    f"{path} holds faces beyond --count {self.count}, and none are removed: give a larger count or folder"
                )


def sample(renderer: Renderer, recipe: Recipe, number: int) -> tuple[str, dict[str, bytes]]:
    """Key and members of one sample."""
    face = draw_attributes(recipe.seed, number)
    picture = renderer.draw(face, recipe.size, recipe.closeness)
    random = stream(recipe.seed, number, CAPTION_STREAM)
    said = captions(face, random, CAPTIONS, hidden(picture.labels), recipe.prominent)
    described = {
        "captions": said,
        "attributes": face.to_json(),
        "expression": face.expression,
        "pose": {"yaw": face.yaw, "pitch": face.pitch, "roll": face.roll},
        "landmarks": picture.landmarks,
        "seed": recipe.seed,
        "number": number,
        "size": recipe.size,
        "generator": recipe.generator,
    }
    return f"{number:09d}", {
        recipe.format: _encoded(picture.pixels, recipe.format),
        "txt": said[0].encode(),
        "json": json.dumps(described, separators=(",", ":")).encode(),
        "mask.png": _encoded(picture.labels, "png"),
    }


def _encoded(pixels: np.ndarray, extension: str) -> bytes:
    name, settings = FORMATS[extension]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, name, **settings)
    return buffer.getvalue()


def _draw_chunk(chunk: _Chunk) -> list[tuple[str, dict[str, bytes]]]:
    return [sample(_renderer(), chunk.recipe, number) for number in chunk.numbers]


@functools.cache
def _renderer() -> Renderer:
    """One in each process."""
    return Renderer()


def _holds(path: Path, numbers: range) -> bool:
    """Whether a shard is finished and holds these samples."""
    return _samples(path) == len(numbers)


def _samples(path: Path) -> int:
    """Number of samples in a finished shard, judged by its sidecar; 0 where there is none or the shard is not whole."""
    try:
        sidecar = Sidecar.from_json(sidecar_path(path).read_bytes(), str(path))
        return len(sidecar.samples) if path.stat().st_size == sidecar.size else 0
    except (OSError, UserError):
        return 0


def _unusable(folder: Path, error: OSError) -> UserError:
    advice = "free some space and run again: finished shards are kept" if error.errno == errno.ENOSPC else "give another folder"
    return UserError(f"cannot write to {folder}: {error.strerror}: {advice}")
