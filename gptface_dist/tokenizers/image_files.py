"""Read configuration and identity of an image tokenizer's folder, without torch.

The folder is what diffusers writes for a ``VQModel``: ``config.json`` and one safetensors file. Workers that only need
sizes and hashes read them here and do not pay for importing torch and diffusers.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from gptface_dist.errors import UserError
from gptface_dist.files import sha256

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
CLASS_NAME = "VQModel"


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a ``VQModel`` folder, underscore keys (class and library version) left out.

    :class:`UserError` where the folder or one of its two files is missing, or it holds something else than a ``VQModel``.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise UserError(f"{folder} holds no {CONFIG_NAME}: give the folder of an image tokenizer (a diffusers {CLASS_NAME})")
    try:
        raw = json.loads(path.read_bytes())
        name = raw.get("_class_name")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is no configuration ({error}): give the folder of a diffusers {CLASS_NAME}") from None
    if name != CLASS_NAME:
        raise UserError(f"{path} describes a {name}, not a {CLASS_NAME}: give the folder of a diffusers {CLASS_NAME}")
    if not weights_path(folder).is_file():
        raise UserError(
            f"{folder} holds no {WEIGHTS_NAME} (pickled weights are not read): save the model again with safetensors, "
            "`VQModel.save_pretrained(folder, safe_serialization=True)`"
        )
    return {key: value for key, value in raw.items() if not key.startswith("_")}


def weights_path(folder: Path) -> Path:
    """Path of the weights of a ``VQModel`` folder."""
    return folder / WEIGHTS_NAME


def codebook_size(folder: Path) -> int:
    """Number of codes, from the configuration (256 where it is silent, as in diffusers)."""
    codes = read_config(folder).get("num_vq_embeddings", 256)
    if not isinstance(codes, int) or codes < 1:
        raise UserError(f"{folder / CONFIG_NAME} says num_vq_embeddings = {codes!r}: it must be a positive whole number")
    return codes


def image_sha256(folder: Path) -> str:
    """Identity of an image tokenizer: SHA-256 over its configuration (keys sorted) and the SHA-256 of its weights' file.

    The class name and the diffusers version in the file do not count: they change no code of any picture.
    """
    config = json.dumps(read_config(folder), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(f"{config}\n{sha256(weights_path(folder))}\n".encode()).hexdigest()
