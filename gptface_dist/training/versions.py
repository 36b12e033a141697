"""The versions that a run was made with."""

import platform
from importlib import metadata

import gptface_dist

PACKAGES = ("torch", "deepspeed", "megatron-core", "triton", "transformer-engine", "numpy", "sentencepiece", "diffusers")


def versions() -> dict[str, str]:
    """Name -> version of ourselves, Python and the packages that numbers depend on, where installed."""
    found = {"gptface_dist": gptface_dist.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
