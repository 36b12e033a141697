"""What the figures of a file were measured on, with what, and when."""

import os
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from gptface_dist.errors import UserError
from gptface_dist.training.versions import versions


@dataclass(frozen=True)
class Provenance:
    """Stands at the head of every file of records, so that figures of two machines are never mixed unseen."""

    device: str
    """CUDA's name of the GPU; of a dry run the CPU."""
    dry: bool
    """Whether nothing was measured: toy sizes on a CPU."""
    commit: str | None
    """Git's commit of the checkout, ``-dirty`` where files differ from it; None where there is no repository."""
    versions: dict[str, str]
    """Package -> version, Python's included."""


def find(checkout: Path, dry: bool) -> Provenance:
    """The origin of what this machine will measure; :class:`UserError` where it has no GPU and this is no dry run."""
    return Provenance(f"{os.cpu_count()}-core CPU" if dry else _gpu(), dry, _commit(checkout), versions())


def now() -> str:
    """Date and time in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            "bench gpu needs a CUDA GPU: none was found, so nothing was measured; --dry runs every part at toy sizes on the CPU"
        )
    return torch.cuda.get_device_name()


def _commit(checkout: Path) -> str | None:
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
