"""``manifest.json``: every file's size and SHA-256, every tensor's shape and fingerprint, and a hash of itself.

Files depend on the layout that wrote the checkpoint; entries of tensors do not: two layouts with the same values write the same
entries.
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
    """Shape and fingerprint of one tensor of a checkpoint."""

    shape: tuple[int, ...]
    """Shape of the whole tensor, as in the plain model."""
    fingerprint: str
    """16 hexadecimal digits: :func:`gptface_dist.checkpoint.fingerprint.fingerprint`."""
    dtype: str = "float32"
    """``float32`` in every checkpoint of this format."""


@dataclass(frozen=True)
class FileEntry:
    """Size and hash of one file of a checkpoint."""

    bytes: int
    """Size in bytes."""
    sha256: str
    """SHA-256 of the content, in hexadecimal."""


@dataclass(frozen=True)
class Manifest:
    """Files and tensors of a checkpoint."""

    step: int
    """Optimizer steps done."""
    files: dict[str, FileEntry]
    """By name inside the folder, with slashes."""
    tensors: dict[str, TensorEntry]
    """By key in the DCP folder: ``KIND/GLOBAL NAME``."""

    def text(self) -> str:
        """Content of ``manifest.json``, with a SHA-256 of itself."""
        raw: dict[str, Any] = {"format": MANIFEST_FORMAT, **asdict(self)}
        return _dump({**raw, "sha256": hashlib.sha256(_dump(raw).encode()).hexdigest()})

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest of a checkpoint. :class:`Damaged` if it is missing or was changed, by a single byte even."""
        path = folder / MANIFEST_NAME
        try:
            return cls.parse(path.read_text(encoding="utf-8"), path)
        except FileNotFoundError:
            raise Damaged(f"{path} is missing: the checkpoint is incomplete") from None
        except OSError as error:
            raise Damaged(f"{path} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise Damaged(f"{path} is no manifest ({error})") from None

    @classmethod
    def parse(cls, text: str, path: Path) -> "Manifest":
        """The manifest of :meth:`text`. :class:`Damaged`, which names ``path``, if it was changed."""
        try:
            raw = json.loads(text)
            if raw["format"] != MANIFEST_FORMAT:
                raise Damaged(f"{path} has the format {raw['format']!r}, not {MANIFEST_FORMAT!r}")
            manifest = cls(
                raw["step"],
                {name: FileEntry(**entry) for name, entry in raw["files"].items()},
                {
                    key: TensorEntry(tuple(entry["shape"]), entry["fingerprint"], entry["dtype"])
                    for key, entry in raw["tensors"].items()
                },
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Damaged(f"{path} is no manifest ({type(error).__name__}: {error})") from None
        if text != manifest.text():
            raise Damaged(f"{path} was changed: it does not match its own SHA-256")
        return manifest

    def problems(self, folder: Path, names: Iterable[str]) -> Iterator[str]:
        """One line for each of the named files that is missing or differs from its entry."""
        for name in names:
            path, entry = folder / name, self.files[name]
            try:
                size = path.stat().st_size
                if size != entry.bytes:
                    yield f"{path} has {size} bytes, not {entry.bytes}"
                elif (digest := sha256(path)) != entry.sha256:
                    yield f"{path} has the SHA-256 {digest[:16]}..., not {entry.sha256[:16]}..."
            except FileNotFoundError:
                yield f"{path} is missing"
            except OSError as error:
                yield f"{path} cannot be read: {error.strerror}"

    def share(self, rank: int, ranks: int) -> list[str]:
        """Names of the files that one rank checks: a partition into about equal numbers of bytes."""
        loads = [0] * ranks
        names = []
        for name, entry in sorted(self.files.items(), key=lambda item: (-item[1].bytes, item[0])):
            least = loads.index(min(loads))
            loads[least] += entry.bytes
            if least == rank:
                names.append(name)
        return names


def _dump(raw: dict[str, Any]) -> str:
    return json.dumps(raw, indent=1) + "\n"
