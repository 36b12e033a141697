"""How the kernels of attention are launched: tile sizes, warps, stages and the order of their products, from a table.

The table of the package is ``launches.json``; ``gptface bench attention --tune`` times :func:`candidates` on a GPU and writes
another one. Every launch computes the same but for the order of sums.
"""

import functools
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from gptface_dist.errors import UserError
from gptface_dist.kernels.attention.options import BACKWARDS, HEAD_SIZES, TILE

FORWARD, DK_DV, DQ = "forward", "dk_dv", "dq"
KERNELS = (FORWARD, DK_DV, DQ)

PACKAGED = Path(__file__).with_name("launches.json")

FORMAT = 1


class Key(NamedTuple):
    """What a launch is looked up by."""

    kernel: str
    """One of :data:`KERNELS`."""
    head_size: int
    """One of :data:`HEAD_SIZES`."""
    backward: str
    """Which products of the backward pass are in FP8 (:class:`Fp8Options`); ``any`` for the forward kernel."""
    specialize: bool
    """Whether loads and matrix products run in different warps."""

    def __str__(self) -> str:
        words = "" if self.backward == "any" else f" {self.backward}"
        return f"{self.kernel}{words} D{self.head_size}{' specialised' * self.specialize}"


def keys() -> Iterator[Key]:
    """Every key that a table has."""
    for kernel, size, specialize in itertools.product(KERNELS, HEAD_SIZES, (False, True)):
        for backward in ("any",) if kernel == FORWARD else BACKWARDS:
            yield Key(kernel, size, backward, specialize)


@dataclass(frozen=True)
class Launch:
    """One way to launch one kernel."""

    queries: int
    """Queries of a tile: 32, 64 or 128."""
    keys: int
    """Keys of a tile: 32, 64 or 128."""
    num_warps: int = 8
    """Warps of a program: 4 leave room for a second program on a multiprocessor. Specialised kernels have 4."""
    num_stages: int = 2
    """Tiles that are loaded ahead."""
    overlap: bool = False
    """Forward and dQ: the next tile's scores are computed while this one's go through the softmax. dK and dV: a tile's
    gradients are computed beside the next tile's scores, so that nothing that a product reads changes while products run."""
    persistent: bool = False
    """One program a slot of the GPU takes tiles in turn, rather than one program a tile; the forward kernel alone."""
    specialize: bool = False
    """Whether loads and matrix products run in different warps."""

    def __post_init__(self) -> None:
        for name in ("queries", "keys"):
            if getattr(self, name) not in (32, 64, TILE):
                raise ValueError(f"{name} must be 32, 64 or {TILE}, got {getattr(self, name)}")
        if self.num_warps not in (4, 8) or self.num_stages < 1:
            raise ValueError(f"num_warps must be 4 or 8 and num_stages at least 1, got {self.num_warps} and {self.num_stages}")
        # Triton 3.7.1 specialises warps for 4 of them only, and its pass fails where products are carried from tile to tile.
        if self.specialize and (self.num_warps != 4 or self.overlap or self.persistent):
            raise ValueError("specialised kernels have 4 warps, and neither overlap nor are persistent")

    def __str__(self) -> str:
        words = [f"{self.queries}x{self.keys}", f"{self.num_warps} warps", f"{self.num_stages} stages"]
        return ", ".join(words + [name for name in ("overlap", "persistent", "specialize") if getattr(self, name)])

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments that all kernels take."""
        return {
            "QUERIES": self.queries,
            "KEYS": self.keys,
            "OVERLAP": self.overlap,
            "SPECIALIZE": self.specialize,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


@dataclass(frozen=True)
class LaunchTable:
    """A launch for every key."""

    launches: dict[Key, Launch]
    """By key; all of :func:`keys`."""
    device: str | None = None
    """CUDA's name of the GPU that they were timed on; None where they were chosen by their machine code alone."""
    date: str | None = None
    """When, as YYYY-MM-DD."""
    versions: str | None = None
    """Of torch and triton."""

    def of(self, kernel: str, head_size: int, backward: str, specialize: bool) -> Launch:
        """The launch of a kernel; ``backward`` says nothing to the forward one."""
        return self.launches[Key(kernel, head_size, "any" if kernel == FORWARD else backward, specialize)]

    def changed(self, key: Key, launch: Launch) -> "LaunchTable":
        """The table with another launch for a key."""
        return replace(self, launches=self.launches | {key: launch})

    def save(self, path: Path) -> None:
        """Write the table, whole or not at all."""
        rows = [{**key._asdict(), "launch": _without_defaults(launch)} for key, launch in self.launches.items()]
        head = {"format": FORMAT, "device": self.device, "date": self.date, "versions": self.versions}
        lines = ",\n  ".join(json.dumps(row) for row in rows)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(f'{json.dumps(head)[:-1]}, "launches": [\n  {lines}\n]}}\n', encoding="utf-8")
        temporary.replace(path)


@functools.lru_cache
def load_table(path: str = "") -> LaunchTable:
    """The table in a file, the package's by default; :class:`UserError` where it cannot be used."""
    file = Path(path) if path else PACKAGED
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        if raw["format"] != FORMAT:
            raise ValueError(f"format {raw['format']}, this version reads {FORMAT}")
        launches = {}
        for row in raw["launches"]:
            key = Key(*(row[name] for name in Key._fields))
            launches[key] = Launch(**row["launch"])
            if launches[key].specialize != key.specialize:
                raise ValueError(f"{key}: the launch says specialize={launches[key].specialize}")
        missing = [str(key) for key in keys() if key not in launches]
        if missing:
            raise ValueError(f"no launch for {', '.join(missing)}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no table of launches: {error}: write one with `gptface bench attention --tune`") from error
    return LaunchTable(launches, raw["device"], raw["date"], raw["versions"])


def _without_defaults(launch: Launch) -> dict[str, Any]:
    usual = asdict(Launch(TILE, TILE))
    return {name: value for name, value in asdict(launch).items() if name in ("queries", "keys") or value != usual[name]}


def candidates(key: Key) -> list[Launch]:
    """Launches to be timed. Which of them fit the registers of a multiprocessor, :mod:`.gate` says without a GPU.

    A warpgroup (4 warps) multiplies 64 rows at a time: of queries in the forward and dQ kernels, of keys in that of dK and dV.
    """
    if key.specialize:
        tiles = {FORWARD: ((128, 128), (128, 64)), DK_DV: ((64, 128), (64, 64)), DQ: ((128, 64), (128, 128))}[key.kernel]
        return [Launch(m, n, 4, stages, specialize=True) for (m, n), stages in itertools.product(tiles, (2, 3))]
    rows = {
        FORWARD: ((128, 128, 8), (128, 64, 8), (64, 128, 4), (64, 64, 4)),
        DK_DV: ((64, 128, 8), (128, 128, 8), (64, 64, 4), (32, 128, 8), (32, 64, 4)),
        DQ: ((128, 64, 8), (128, 128, 8), (64, 64, 4), (64, 128, 4), (128, 32, 8), (64, 32, 4)),
    }[key.kernel]
    stages = (2, 3, 4) if key.kernel == FORWARD else (2, 3)
    grids = (False, True) if key.kernel == FORWARD else (False,)
    return [
        Launch(m, n, warps, count, overlap, persistent)
        for (m, n, warps), count, overlap, persistent in itertools.product(rows, stages, (True, False), grids)
    ]
