"""Write and read a model's weights as safetensors files in Hugging Face's convention, one tensor at a time.

One file ``model.safetensors``, or ``model-00001-of-0000n.safetensors`` and ``model.safetensors.index.json``. The library
writes a file from tensors that are all in memory; here only one is in memory at a time. Format:
https://huggingface.co/docs/safetensors (8 bytes of header length, JSON header, the tensors' bytes without gaps).
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptface_dist.errors import UserError, one_line
from gptface_dist.files import write_atomically

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
"""Hugging Face's customary file size in bytes."""
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}

Table = Mapping[str, tuple[int, ...]]
"""Tensor name -> shape, in the order of writing."""


def check_table(names: Mapping[str, object], table: Table, origin: str) -> None:
    """Raise :class:`UserError`, with ``origin`` in its message, unless ``names`` are exactly those of the table."""
    for what, differing in (("lacks", table.keys() - names.keys()), ("has unknown tensors:", names.keys() - table.keys())):
        if differing:
            shown = ", ".join(sorted(differing)[:3]) + (f" and {len(differing) - 3} more" if len(differing) > 3 else "")
            raise UserError(f"{origin} {what} {shown}: it is not of this model or this version")


def write(
    folder: Path,
    table: Table,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
    done: Callable[[int], None] = lambda values: None,
) -> dict[str, str]:
    """Write the table's tensors as ``dtype``; each is read once, in the table's order, and then freed.

    Args:
        folder: folder of the files; must exist.
        table: names and shapes of the tensors to write.
        tensors: the tensors, of any floating dtype and device.
        dtype: float32 or bfloat16 (rounded to nearest, ties to even).
        shard_bytes: a file ends before it becomes larger, unless one tensor alone is.
        done: called with the number of values of each tensor written.

    Returns:
        SHA-256 of each file, by name.
    """
    if sys.byteorder != "little":
        raise UserError("safetensors are little-endian: write them on another machine than this big-endian one")
    files = _plan(table, dtype.itemsize, shard_bytes)
    hashes = {name: _write_file(folder / name, part, tensors, dtype, done) for name, part in files.items()}
    if len(files) > 1:
        total = dtype.itemsize * sum(math.prod(shape) for shape in table.values())
        where = {tensor: name for name, part in files.items() for tensor in part}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_atomically(folder / INDEX_NAME, json.dumps(index, indent=1) + "\n")
    return hashes


def _plan(table: Table, itemsize: int, shard_bytes: int) -> dict[str, Table]:
    """File name -> table of the tensors in it, in order."""
    files: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in table.items():
        size = itemsize * math.prod(shape)
        if files[-1] and filled + size > shard_bytes:
            files.append({})
            filled = 0
        files[-1][name] = shape
        filled += size
    if len(files) == 1:
        return {SINGLE_NAME: files[0]}
    return {f"model-{i:05d}-of-{len(files):05d}.safetensors": part for i, part in enumerate(files, 1)}


def _write_file(
    path: Path, table: Table, tensors: Mapping[str, Tensor], dtype: torch.dtype, done: Callable[[int], None]
) -> str:
    # transformers refuses files without the framework's name in the header.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in table.items():
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            file.write(part)
            digest.update(part)
        for name, shape in table.items():
            _write_tensor(file, digest, name, shape, tensors, dtype)
            done(math.prod(shape))
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _write_tensor(
    file: BinaryIO,
    digest: "hashlib._Hash",
    name: str,
    shape: tuple[int, ...],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> None:
    """Write one tensor; in a function of its own, so that the tensor is freed before the next is read."""
    tensor = tensors[name].detach()
    if tuple(tensor.shape) != shape:
        raise UserError(f"{name} has the shape {tuple(tensor.shape)}, the model wants {shape}: it is another's")
    data = tensor.to("cpu", dtype).contiguous().view(torch.uint8).numpy().data
    file.write(data)
    digest.update(data)


class Weights(Mapping[str, Tensor]):
    """The tensors of a release by name, each read at access.

    A tensor is mapped from its file, so a rank that copies only its shard of it reads only those pages. It has the stored
    dtype and is on the CPU; changes to it do not reach the file.
    """

    def __init__(self, folder: Path):
        """Read names, shapes and dtypes; :class:`UserError` where a file is missing or damaged."""
        self.files = _files(folder)
        """Names of the files: safetensors, and the index where there are several."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Tensor name -> shape."""
        self.dtypes: dict[str, str] = {}
        """Tensor name -> dtype in safetensors' notation: F32, BF16."""
        self._where: dict[str, Path] = {}
        for path in (folder / name for name in self.files if name != INDEX_NAME):
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                        part = file.get_slice(name)
                        self.shapes[name], self.dtypes[name] = tuple(part.get_shape()), part.get_dtype()
                        self._where[name] = path
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is no whole safetensors file ({one_line(error)}): get the release again") from None

    def file(self, name: str) -> str:
        """Name of the file that holds a tensor."""
        return self._where[name].name

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Entries ``[start, stop)`` of a tensor's first axis."""
        return self._read(name, lambda file: file.get_slice(name)[start:stop])

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name, lambda file: file.get_tensor(name))

    def _read(self, name: str, read: Callable[[Any], Tensor]) -> Tensor:
        path = self._where[name]
        try:
            # Opened anew for each tensor: the mapping is freed together with the tensor.
            with safe_open(path, framework="pt") as file:
                return read(file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read ({one_line(error)}): get the release again") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def _files(folder: Path) -> list[str]:
    index = folder / INDEX_NAME
    if not index.is_file():
        if not (folder / SINGLE_NAME).is_file():
            raise UserError(f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}: its weights are missing, get it again")
        return [SINGLE_NAME]
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is no index ({type(error).__name__}: {error}): get the release again") from None
    for name in names:
        if not isinstance(name, str) or "/" in name or not (folder / name).is_file():
            raise UserError(f"{folder / str(name)} is missing, but {INDEX_NAME} names it: get the release again")
    return [*names, INDEX_NAME]
