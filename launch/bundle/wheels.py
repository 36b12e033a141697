"""Download or build wheels for another machine's Python with this machine's pip."""

import io
import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from gptface_dist.errors import UserError

PYTHON = "3.12"
# Platform tags of wheels that run with glibc 2.28 or later.
PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
    "manylinux2010_x86_64",
    "manylinux1_x86_64",
)
BUILT = "deepspeed"
"""Package that is published only as source. Without operators it is pure Python, the same for every machine."""


def read_requirements(path: Path) -> list[str]:
    """Lines ``name==version`` of a requirements file; :class:`UserError` for any other."""
    lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    requirements = [line for line in lines if line]
    for line in requirements:
        name, _, version = line.partition("==")
        if not name or not version or set(version) & set("=<>,*;"):
            raise UserError(f"{path}: {line!r} is not name==version: what is carried is named exactly")
    return requirements


def fetch(requirements: Sequence[str], folder: Path) -> None:
    """Make a folder hold exactly the required wheels; keep those of an earlier run, and remove others."""
    folder.mkdir(parents=True, exist_ok=True)
    there = {_pinned(path): path for path in folder.glob("*.whl")}
    for pinned, path in there.items():
        if pinned not in {_normal(line) for line in requirements}:
            path.unlink()
    missing = [line for line in requirements if _normal(line) not in there]
    built = [line for line in missing if line.startswith(f"{BUILT}==")]
    fetched = [line for line in missing if line not in built]
    if fetched:
        target = ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"]
        target += [word for platform in PLATFORMS for word in ("--platform", platform)]
        _pip("download", *target, "-d", str(folder), *fetched)
    if built:
        _pip("wheel", "--no-build-isolation", "-w", str(folder), *built)


def stored(wheel: Path) -> bytes:
    """The wheel without compression inside, so that the archive compresses across wheels, into half the space."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(buffer, "w") as target:
        for info in source.infolist():
            content = source.read(info)
            info.compress_type = zipfile.ZIP_STORED
            target.writestr(info, content)
    return buffer.getvalue()


def _pip(command: str, *arguments: str) -> None:
    words = [sys.executable, "-m", "pip", command, "-q", "--disable-pip-version-check", "--no-deps", *arguments]
    if subprocess.run(words, env={**os.environ, "DS_BUILD_OPS": "0"}, check=False).returncode:
        raise UserError(f"pip {command} failed, see above: the bundle needs an index of packages, or wheels fetched before")


def _pinned(wheel: Path) -> str:
    name, version = wheel.name.split("-")[:2]
    return _normal(f"{name}=={version}")


def _normal(line: str) -> str:
    name, _, version = line.partition("==")
    return f"{name.lower().replace('-', '_').replace('.', '_')}=={version}"
