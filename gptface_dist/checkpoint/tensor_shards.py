"""A rank's memory under global names and offsets, in the form that torch's distributed checkpoint (DCP) asks for."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from gptface_dist.checkpoint.chunk_spec import ChunkSpec, chunk_specs, in_whole, rows
from gptface_dist.checkpoint.local_shard import LocalShard

BUCKET = 2**22
"""Elements of a piece at most (16 MiB), but for a row that is longer: what passes through memory at a time."""


@dataclass(frozen=True)
class TensorChunk:
    """A box of a tensor, and the memory it is in."""

    box: ChunkSpec
    """Where it is in the whole tensor."""
    memory: Tensor
    """Float32 view of the box's shape; loading writes to it."""


@dataclass
class TensorShards:
    """What this rank has of one tensor, with the methods that DCP's planners look for."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    pieces: list[TensorChunk] = field(default_factory=list)
    """Disjoint."""

    def size(self) -> torch.Size:
        """Shape of the whole; DCP compares it with the saved one."""
        return torch.Size(self.shape)

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, piece.box.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(_chunk(piece.box), TensorProperties(dtype=torch.float32), self.size()),
            )
            for piece in self.pieces
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(piece.box) for piece in self.pieces]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        hint = index.index
        if hint is not None and hint < len(self.pieces) and self.pieces[hint].box.offsets == index.offset:
            return self.pieces[hint].memory
        return next(piece.memory for piece in self.pieces if piece.box.offsets == index.offset)


def collect_shards(local_shards: Iterable[LocalShard], written: bool, bucket: int = BUCKET) -> dict[str, TensorShards]:
    """TensorShards by key, ``KIND/GLOBAL NAME``: of what this rank writes, or of all that it holds."""
    found: dict[str, TensorShards] = {}
    for local_shard in local_shards:
        elements = local_shard.owned_range if written else local_shard.local_range
        for kind, values in local_shard.values.items():
            here = found.setdefault(f"{kind}/{local_shard.entry.name}", TensorShards(local_shard.entry.shape))
            here.pieces += _pieces(local_shard, values, elements, bucket)
    return {key: pieces for key, pieces in found.items() if pieces.pieces}


def _pieces(local_shard: LocalShard, values: Tensor, elements: range, bucket: int) -> Iterable[TensorChunk]:
    place = elements.start - local_shard.local_range.start
    for run in chunk_specs(elements.start, elements.stop, local_shard.shard):
        memory = values[place : place + run.numel].view(run.sizes)
        place += run.numel
        for part in rows(run, bucket):
            for here, whole in in_whole(
                part, local_shard.entry.sharding, local_shard.entry.shape, local_shard.rank, local_shard.size
            ):
                yield TensorChunk(whole, _view(memory, run, here))


def _view(memory: Tensor, run: ChunkSpec, part: ChunkSpec) -> Tensor:
    for axis, (base, start, length) in enumerate(zip(run.offsets, part.offsets, part.sizes, strict=True)):
        memory = memory.narrow(axis, start - base, length)
    return memory


def _chunk(box: ChunkSpec) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))
