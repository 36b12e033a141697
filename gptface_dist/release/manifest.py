"""The manifest of a release: size and SHA-256 of every file in its folder, to detect damage."""

import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from gptface_dist.errors import UserError
from gptface_dist.files import sha256, write_atomically

MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = "gptface-release-manifest-2"

Known = dict[str, tuple[int, str]]
"""File name inside the folder, with slashes -> (bytes, SHA-256)."""


def make(folder: Path, hashed: dict[str, str]) -> None:
    """Write ``folder/manifest.json`` over all files in the folder; ``hashed``: name -> digest of files already hashed."""
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": hashed.get(name) or sha256(folder / name)}
        for name in _names(folder)
    }
    write_atomically(folder / MANIFEST_NAME, json.dumps({"format": MANIFEST_FORMAT, "files": files}, indent=1) + "\n")


def read(folder: Path) -> Known:
    """Read ``folder/manifest.json``; :class:`UserError` where it is missing or no manifest."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise UserError(f"{folder} holds no {MANIFEST_NAME}: it is incomplete or no release; get it again, whole")
    try:
        raw = json.loads(path.read_bytes())
        if raw["format"] != MANIFEST_FORMAT:
            raise UserError(f"{path} has the format {raw['format']!r}, not {MANIFEST_FORMAT!r}: use the gptface_dist it is of")
        return {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in raw["files"].items()}
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no manifest ({type(error).__name__}: {error}): get the release again") from None


def problems(
    folder: Path, known: Known, names: Collection[str] | None = None, done: Callable[[int], None] = lambda size: None
) -> Iterator[str]:
    """Yield one line for each file that is missing or has another size or content. ``done`` is called with bytes checked.

    ``names`` are the files to check, by default all of the manifest's. Other files in the folder are ignored.
    """
    for name in known if names is None else names:
        path = folder / name
        if name not in known:
            yield f"{path} is not in {MANIFEST_NAME}: the folder is incomplete or was changed"
            continue
        size, digest = known[name]
        if not path.is_file():
            yield f"{path} is missing"
        elif path.stat().st_size != size:
            yield f"{path} has {path.stat().st_size} bytes, not {size}: it is damaged"
        elif (actual := sha256(path)) != digest:
            yield f"{path} has the SHA-256 {actual}, not {digest}: it is damaged or was changed"
        done(size)


def _names(folder: Path) -> list[str]:
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != MANIFEST_NAME)
