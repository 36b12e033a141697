"""Versions of the software that a run uses."""

import platform
from importlib import metadata

import gptface_dist

PACKAGES = ("torch", "deepspeed", "megatron-core", "triton", "transformer-engine", "numpy", "sentencepiece", "diffusers")


def versions() -> dict[str, str]:
    """Name -> version of gptface_dist, Python and the installed ones of :data:`PACKAGES`."""
    installed = {"gptface_dist": gptface_dist.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed
