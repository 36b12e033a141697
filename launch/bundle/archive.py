"""Write the archive: files in a fixed order with fixed times and owners, up to a limit of its size."""

import io
import lzma
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

from gptface_dist.errors import UserError
from gptface_dist.launch.bundle.contents import FOLDER, Member

MIB = 1 << 20


def write(members: Sequence[Member], path: Path, limit: int) -> int:
    """Write a ``.tar.xz``, whole or not at all; returns its size in bytes.

    :class:`UserError`, with no file written, where it has more than ``limit`` bytes.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("wb") as raw:
            with lzma.open(raw, "wb") as packed, tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
                for member in members:
                    _add(archive, member)
            size = raw.tell()
        if size > limit:
            raise UserError(
                f"the bundle has {size / MIB:.1f} MiB, more than {limit / MIB:g}: before compression {account(members)}; "
                "carry fewer wheels (requirements-gpu.txt) or raise --limit"
            )
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return size


def account(members: Sequence[Member]) -> str:
    """Size of each part of the bundle before compression, the largest first, as text."""
    sizes: dict[str, int] = {}
    for member in members:
        sizes[member.part] = sizes.get(member.part, 0) + member.size
    return ", ".join(f"{part} {size / MIB:.1f} MiB" for part, size in sorted(sizes.items(), key=lambda item: -item[1]))


def _add(archive: tarfile.TarFile, member: Member) -> None:
    content = member.source if isinstance(member.source, bytes) else member.source.read_bytes()
    info = tarfile.TarInfo(f"{FOLDER}/{member.name}")
    info.size = len(content)
    runnable = isinstance(member.source, Path) and os.access(member.source, os.X_OK)
    info.mode = 0o755 if runnable else 0o644
    archive.addfile(info, io.BytesIO(content))
