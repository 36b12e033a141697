"""Pieces: a rank's memory under global names and places, in the form that torch's distributed checkpoint (DCP) asks for."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from gptface_dist.checkpoint.box import Box, boxes, in_whole, rows
from gptface_dist.checkpoint.local_shard import Region

BUCKET = 2**22
"""Elements of a piece at most (16 MiB), but for a row that is longer: what passes through memory at a time."""


@dataclass(frozen=True)
class Piece:
    """A box of a tensor, and the memory it is in."""

    box: Box
    """Where it is in the whole tensor."""
    memory: Tensor
    """Float32 view of the box's shape; loading writes to it."""


@dataclass
class Pieces:
    """What this rank has of one tensor, with the methods that DCP's planners look for."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    pieces: list[Piece] = field(default_factory=list)
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


def collect(regions: Iterable[Region], written: bool, bucket: int = BUCKET) -> dict[str, Pieces]:
    """Pieces by key, ``KIND/GLOBAL NAME``: of what this rank writes, or of all that it holds."""
    found: dict[str, Pieces] = {}
    for region in regions:
        elements = region.written if written else region.held
        for kind, values in region.values.items():
            here = found.setdefault(f"{kind}/{region.entry.name}", Pieces(region.entry.shape))
            here.pieces += _pieces(region, values, elements, bucket)
    return {key: pieces for key, pieces in found.items() if pieces.pieces}


def _pieces(region: Region, values: Tensor, elements: range, bucket: int) -> Iterable[Piece]:
    place = elements.start - region.held.start
    for run in boxes(elements.start, elements.stop, region.shard):
        memory = values[place : place + run.numel].view(run.sizes)
        place += run.numel
        for part in rows(run, bucket):
            for here, whole in in_whole(part, region.entry.cut, region.entry.shape, region.rank, region.size):
                yield Piece(whole, _view(memory, run, here))


def _view(memory: Tensor, run: Box, part: Box) -> Tensor:
    for axis, (base, start, length) in enumerate(zip(run.offsets, part.offsets, part.sizes, strict=True)):
        memory = memory.narrow(axis, start - base, length)
    return memory


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))
