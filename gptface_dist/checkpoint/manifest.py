"""``manifest.json``: every file's size and SHA-256, every tensor's shape and fingerprint, and a hash of itself.

What depends on the layout that wrote the checkpoint are the files; the tensors' entries do not: two layouts that hold the
same numbers write the same ones.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gptface_dist.errors import Damaged
from gptface_dist.files import sha256

MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = "gptface-manifest-2"


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of the checkpoint."""

    shape: tuple[int, ...]
    """Of the whole tensor, as in the plain model."""
    fingerprint: str
    """16 hexadecimal digits: :func:`gptface_dist.checkpoint.fingerprint.fingerprint`."""
    dtype: str = "float32"
    """Always."""


@dataclass(frozen=True)
class FileEntry:
    """A file of the checkpoint."""

    bytes: int
    """Its size."""
    sha256: str
    """Of its bytes."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of."""

    step: int
    """Optimizer steps done."""
    files: dict[str, FileEntry]
    """By name inside the folder, with slashes."""
    tensors: dict[str, TensorEntry]
    """By key in the DCP folder: ``KIND/GLOBAL NAME``."""

    def text(self) -> str:
        """Content of the file."""
        raw: dict[str, Any] = {"format": MANIFEST_FORMAT, **asdict(self)}
        return _dump({**raw, "sha256": hashlib.sha256(_dump(raw).encode()).hexdigest()})

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Of a checkpoint. :class:`Damaged` where it is missing or not what was written, to the byte."""
        path = folder / MANIFEST_NAME
        try:
            text = path.read_text(encoding="utf-8")
            raw = json.loads(text)
            if raw["format"] != MANIFEST_FORMAT:
                raise Damaged(f"{path} has the format {raw['format']!r}, not {MANIFEST_FORMAT!r}")
            manifest = cls(
                raw["step"],
                {name: FileEntry(**entry) for name, entry in raw["files"].items()},
                {
                    key: TensorEntry(tuple(one["shape"]), one["fingerprint"], one["dtype"])
                    for key, one in raw["tensors"].items()
                },
            )
        except FileNotFoundError:
            raise Damaged(f"{path} is missing: the checkpoint is incomplete") from None
        except OSError as error:
            raise Damaged(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Damaged(f"{path} is no manifest ({type(error).__name__}: {error})") from None
        if text != manifest.text():
            raise Damaged(f"{path} was changed: it does not match its own SHA-256")
        return manifest

    def problems(self, folder: Path, names: Iterable[str]) -> Iterator[str]:
        """One line for each of the named files that is missing or not what was written."""
        for name in names:
            path, entry = folder / name, self.files[name]
            try:
                size = path.stat().st_size
                if size != entry.bytes:
                    yield f"{path} has {size} bytes, not {entry.bytes}"
                elif (found := sha256(path)) != entry.sha256:
                    yield f"{path} has the SHA-256 {found[:16]}..., not {entry.sha256[:16]}..."
            except FileNotFoundError:
                yield f"{path} is missing"
            except OSError as error:
                yield f"{path} cannot be read: {error.strerror}"

    def share(self, rank: int, ranks: int) -> list[str]:
        """The files that one rank should look at: all ranks get about the same number of bytes."""
        loads = [0] * ranks
        mine = []
        for name, entry in sorted(self.files.items(), key=lambda item: (-item[1].bytes, item[0])):
            least = loads.index(min(loads))
            loads[least] += entry.bytes
            if least == rank:
                mine.append(name)
        return mine


def _dump(raw: dict[str, Any]) -> str:
    return json.dumps(raw, indent=1) + "\n"
