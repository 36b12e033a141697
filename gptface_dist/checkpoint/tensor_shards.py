"""A rank's memory under global names and offsets, with the protocol of torch's distributed checkpoint (DCP)."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from gptface_dist.checkpoint.chunk_spec import ChunkSpec, chunk_specs, in_whole, rows
from gptface_dist.checkpoint.local_shard import LocalShard

BUCKET = 2**22
"""Elements of a chunk at most (16 MiB), or one row if that is longer; bounds the memory of saving and loading."""


@dataclass(frozen=True)
class TensorChunk:
    """A chunk of a tensor, with its memory."""

    box: ChunkSpec
    """Position in the whole tensor."""
    memory: Tensor
    """Float32 view of shape ``box.sizes``; loading writes to it."""


@dataclass
class TensorShards:
    """This rank's chunks of one tensor, with the methods that DCP's planners call."""

    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    pieces: list[TensorChunk] = field(default_factory=list)
    """Disjoint chunks."""

    def size(self) -> torch.Size:
        """Shape of the whole tensor; DCP compares it with the saved one."""
        return torch.Size(self.shape)

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.box.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(_metadata(chunk.box), TensorProperties(dtype=torch.float32), self.size()),
            )
            for chunk in self.pieces
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_metadata(chunk.box) for chunk in self.pieces]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        hint = index.index
        if hint is not None and hint < len(self.pieces) and self.pieces[hint].box.offsets == index.offset:
            return self.pieces[hint].memory
        return next(chunk.memory for chunk in self.pieces if chunk.box.offsets == index.offset)


def collect_shards(local_shards: Iterable[LocalShard], written: bool, bucket: int = BUCKET) -> dict[str, TensorShards]:
    """TensorShards by key, ``KIND/GLOBAL NAME``, of ``owned_range`` if ``written``, else of ``local_range``."""
    shards: dict[str, TensorShards] = {}
    for local_shard in local_shards:
        elements = local_shard.owned_range if written else local_shard.local_range
        for kind, values in local_shard.values.items():
            tensor = shards.setdefault(f"{kind}/{local_shard.entry.name}", TensorShards(local_shard.entry.shape))
            tensor.pieces += _chunks(local_shard, values, elements, bucket)
    return {key: tensor for key, tensor in shards.items() if tensor.pieces}


def _chunks(local_shard: LocalShard, values: Tensor, elements: range, bucket: int) -> Iterable[TensorChunk]:
    start = elements.start - local_shard.local_range.start
    for run in chunk_specs(elements.start, elements.stop, local_shard.shard):
        memory = values[start : start + run.numel].view(run.sizes)
        start += run.numel
        for part in rows(run, bucket):
            for local, whole in in_whole(
                part, local_shard.entry.sharding, local_shard.entry.shape, local_shard.rank, local_shard.size
            ):
                yield TensorChunk(whole, _view(memory, run, local))


def _view(memory: Tensor, run: ChunkSpec, part: ChunkSpec) -> Tensor:
    for axis, (base, start, length) in enumerate(zip(run.offsets, part.offsets, part.sizes, strict=True)):
        memory = memory.narrow(axis, start - base, length)
    return memory


def _metadata(chunk: ChunkSpec) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
