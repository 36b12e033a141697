"""Files of torch's distributed checkpoint (DCP), written and read a piece at a time.

The files are those of torch's own ``FileSystemWriter``, so its tools read them. Ours hashes what it writes, holds one piece
in memory at a time (torch's keeps one of each tensor until the end), and reads metadata without trusting it.
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
    """A new file whose SHA-256 is known when it is finished."""

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
        """Flush to disk. Bytes and SHA-256 of what was written."""
        os.fsync(self._file.fileno())
        return self.size, self._hash.hexdigest()

    def close(self) -> None:
        """Without a word about what was written."""
        self._file.close()


class Writer(FileSystemWriter):
    """Writes this rank's pieces into one file."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.written: dict[str, tuple[int, str]] = {}
        """Bytes and SHA-256 of the files that this rank wrote, by name."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Called by DCP."""
        results = []
        if plan.items:
            name = f"{plan.storage_data.prefix}0.distcp"
            with contextlib.closing(HashedFile(Path(self.path) / name)) as file:
                for item in plan.items:
                    memory = cast(Tensor, planner.resolve_data(item))
                    # A copy: torch.save would write all of the memory that a view looks at. And first into memory: its
                    # archive's writer turns a full disk into an error of its own.
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
        """Without the folder's path: a checkpoint does not say where it was made."""
        return StorageMeta()


class Reader(FileSystemReader):
    """Reads pieces, each saved one once, in the order of the file."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Called by DCP. Nothing but DCP's own classes is taken from the file."""
        metadata = read_metadata(Path(self.path) / METADATA_NAME)
        metadata.storage_meta = StorageMeta()
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Called by DCP."""
        wanted: dict[str, dict[int, list[ReadItem]]] = collections.defaultdict(lambda: collections.defaultdict(list))
        for item in plan.items:
            stored = self.storage_data[item.storage_index]
            wanted[stored.relative_path][stored.offset].append(item)
        for name, places in wanted.items():
            with (Path(self.path) / name).open("rb") as file:
                for start in sorted(places):
                    stored = self.storage_data[places[start][0].storage_index]
                    piece = _piece(file, stored.offset, stored.length)
                    for item in places[start]:
                        part = narrow_tensor_by_index(piece, item.storage_offsets, item.lengths)
                        planner.resolve_tensor(item).detach().copy_(part)
                    # The next one is read into other memory.
                    del piece, part
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _piece(file: BinaryIO, offset: int, length: int) -> Tensor:
    file.seek(offset)
    # torch.load looks for an archive's directory at the end of the file.
    return cast(Tensor, torch.load(io.BytesIO(file.read(length)), map_location="cpu", weights_only=True))


class SavePieces(DefaultSavePlanner):
    """Plans the writing of :class:`TensorShards`."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """Called by DCP."""
        return cast(TensorShards, self.state_dict[index.fqn]).__get_tensor_shard__(index)


class LoadPieces(DefaultLoadPlanner):
    """Plans the reading of :class:`TensorShards`."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """Called by DCP."""
        # The base class would drop what is no tensor.
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Called by DCP."""
        return cast(TensorShards, self.state_dict[index.fqn]).__get_tensor_shard__(index)


class _MetadataUnpickler(pickle.Unpickler):
    """DCP's metadata is a pickle, and a pickle may run any code: this one makes nothing but DCP's own classes."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _METADATA_NAMES:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")
        return super().find_class(module, name)


def read_metadata(path: Path) -> Metadata:
    """Metadata of a DCP folder whose tensors are float32."""
    with path.open("rb") as file:
        return cast(Metadata, _MetadataUnpickler(file).load())
