"""Files of torch's distributed checkpoint (DCP), written and read a chunk at a time.

The format is that of torch's own ``FileSystemWriter``, so its tools read the files. This writer hashes its output, holds one
chunk in memory at a time (torch's keeps one of each tensor until the end), and needs no pickles between ranks; the reader does
not trust the pickled metadata.
"""

import collections
import contextlib
import hashlib
import io
import os
import pickle
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from gptface_dist.checkpoint.tensor_shards import TensorShards

METADATA_NAME = ".metadata"
_METADATA_NAMES = frozenset(
    [
        ("torch", "Size"),
        ("torch", "float32"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ]
    + [
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ]
)


class HashedFile:
    """A new file that hashes its content while it is written."""

    def __init__(self, path: Path):
        self._file: BinaryIO = path.open("xb", buffering=0)
        self._hash = hashlib.sha256()
        self.size = 0
        """Bytes written."""

    def write(self, data: memoryview) -> None:
        """Write and hash all of a buffer."""
        done = 0
        while done < len(data):
            # A file system may take less than it is given.
            done += self._file.write(data[done:])
        self._hash.update(data)
        self.size += len(data)

    def finish(self) -> tuple[int, str]:
        """Flush to disk; returns size in bytes and SHA-256 of the content."""
        os.fsync(self._file.fileno())
        return self.size, self._hash.hexdigest()

    def close(self) -> None:
        """Close without flushing to disk."""
        self._file.close()


@dataclass(frozen=True)
class StoredChunk:
    """Where one chunk of a tensor is in the files of a checkpoint."""

    key: str
    """Key of the tensor."""
    offsets: list[int]
    """Index of the chunk's first element in the tensor, by axis."""
    sizes: list[int]
    """Shape of the chunk."""
    file: str
    """Name of the file."""
    start: int
    """First byte in the file."""
    length: int
    """Number of bytes."""


@dataclass(frozen=True)
class WrittenFile:
    """The file that one rank wrote, and what is in it. Its fields are JSON: ranks tell each other of it."""

    name: str
    """Name of the file."""
    size: int
    """Number of bytes."""
    sha256: str
    """SHA-256 of the content, in hexadecimal."""
    chunks: list[StoredChunk]
    """The chunks, in order."""


def write_chunks(folder: Path, rank: int, shards: Mapping[str, TensorShards]) -> WrittenFile | None:
    """Write this rank's chunks into a new file, and flush it to disk; None, and no file, where it has none."""
    if not shards:
        return None
    # The name that torch's writer gives to a rank's first file.
    name = f"__{rank}_0.distcp"
    chunks = []
    with contextlib.closing(HashedFile(folder / name)) as file:
        for key, tensor in shards.items():
            for chunk in tensor.pieces:
                # A copy, since torch.save writes the whole storage of a view; into memory first, since its archive writer would
                # hide the OSError of a full disk.
                saved = io.BytesIO()
                torch.save(torch.empty(chunk.box.sizes).copy_(chunk.memory), saved)
                start = file.size
                file.write(saved.getbuffer())
                stored = StoredChunk(key, list(chunk.box.offsets), list(chunk.box.sizes), name, start, file.size - start)
                chunks.append(stored)
        return WrittenFile(name, *file.finish(), chunks)


def metadata_of(shapes: Mapping[str, tuple[int, ...]], chunks: Iterable[StoredChunk]) -> Metadata:
    """DCP's metadata of float32 tensors of these shapes, by key, in these chunks of all ranks."""
    properties = TensorProperties(dtype=torch.float32)
    tensors = {key: TensorStorageMetadata(properties, torch.Size(shape), []) for key, shape in shapes.items()}
    stored: dict[MetadataIndex, _StorageInfo] = {}
    for chunk in chunks:
        whole = tensors[chunk.key].chunks
        index = MetadataIndex(chunk.key, chunk.offsets, len(whole))
        stored[index] = _StorageInfo(chunk.file, chunk.start, chunk.length)
        whole.append(ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)))
    # An empty StorageMeta: a checkpoint does not record the path where it was made.
    return Metadata(dict(tensors), storage_data=stored, storage_meta=StorageMeta(), version=CURRENT_DCP_VERSION)


def read_chunks(folder: Path, shards: Mapping[str, TensorShards]) -> None:
    """Read this rank's chunks into their memory; each rank by itself."""
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            # Without DCP's own collectives, which send pickles.
            state_dict_loader.load(dict(shards), storage_reader=Reader(folder), planner=LoadPieces(), no_dist=True)
    except CheckpointException as error:
        reason, _ = next(iter(error.failures.values()))
        raise reason from None


class Reader(FileSystemReader):
    """Reads saved chunks, each of them once, in the order of the file."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Unpickle DCP's own classes only (:func:`read_metadata`); called by DCP."""
        metadata = read_metadata(Path(self.path) / METADATA_NAME)
        metadata.storage_meta = StorageMeta()
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy the plan's parts of chunks into place; called by DCP."""
        wanted: dict[str, dict[int, list[ReadItem]]] = collections.defaultdict(lambda: collections.defaultdict(list))
        for item in plan.items:
            stored = self.storage_data[item.storage_index]
            wanted[stored.relative_path][stored.offset].append(item)
        for name, chunks in wanted.items():
            with (Path(self.path) / name).open("rb") as file:
                for start in sorted(chunks):
                    stored = self.storage_data[chunks[start][0].storage_index]
                    chunk = _read_chunk(file, stored.offset, stored.length)
                    for item in chunks[start]:
                        part = narrow_tensor_by_index(chunk, item.storage_offsets, item.lengths)
                        planner.resolve_tensor(item).detach().copy_(part)
                    # Free the chunk before the next one is read.
                    del chunk, part
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _read_chunk(file: BinaryIO, offset: int, length: int) -> Tensor:
    file.seek(offset)
    # torch.load expects the archive's directory at the end of its file.
    return cast(Tensor, torch.load(io.BytesIO(file.read(length)), map_location="cpu", weights_only=True))


class LoadPieces(DefaultLoadPlanner):
    """Plans the reading of :class:`TensorShards`."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """Keep the state as it is; called by DCP."""
        # The base class would drop every value that is no tensor.
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The memory to load into; called by DCP."""
        return cast(TensorShards, self.state_dict[index.fqn]).__get_tensor_shard__(index)


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles DCP's own classes only: a pickle could otherwise run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _METADATA_NAMES:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")
        return super().find_class(module, name)


def read_metadata(path: Path) -> Metadata:
    """Read a DCP metadata file of float32 tensors; ``pickle.UnpicklingError`` if it names any other class."""
    with path.open("rb") as file:
        return cast(Metadata, _MetadataUnpickler(file).load())
