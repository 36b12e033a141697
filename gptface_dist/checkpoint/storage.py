"""Files of torch's distributed checkpoint (DCP), written and read a chunk at a time.

The format is that of torch's own ``FileSystemWriter``, so its tools read the files. This writer hashes its output and holds one
chunk in memory at a time (torch's keeps one of each tensor until the end); the reader does not trust the pickled metadata.
"""

import collections
import contextlib
import hashlib
import io
import os
import pickle
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
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


class Writer(FileSystemWriter):
    """Writes this rank's chunks into one file."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.written: dict[str, tuple[int, str]] = {}
        """Size in bytes and SHA-256 of the files that this rank wrote, by name."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the plan's chunks, in order; called by DCP."""
        results = []
        if plan.items:
            name = f"{plan.storage_data.prefix}0.distcp"
            with contextlib.closing(HashedFile(Path(self.path) / name)) as file:
                for item in plan.items:
                    memory = cast(Tensor, planner.resolve_data(item))
                    # A copy, since torch.save writes the whole storage of a view; into memory first, since its archive
                    # writer would hide the OSError of a full disk.
                    saved = io.BytesIO()
                    torch.save(torch.empty(memory.shape, dtype=memory.dtype).copy_(memory), saved)
                    start = file.size
                    file.write(saved.getbuffer())
                    results.append(WriteResult(item.index, file.size - start, _StorageInfo(name, start, file.size - start)))
                self.written[name] = file.finish()
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def storage_meta(self) -> StorageMeta:
        """Empty: a checkpoint does not record the path where it was made."""
        return StorageMeta()


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


class SavePieces(DefaultSavePlanner):
    """Plans the writing of :class:`TensorShards`."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The memory to save; called by DCP."""
        return cast(TensorShards, self.state_dict[index.fqn]).__get_tensor_shard__(index)


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
