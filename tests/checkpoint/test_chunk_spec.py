"""Flat ranges of shards -> chunk_specs of the whole, against brute force over every element."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from gptface_dist.checkpoint.chunk_spec import ChunkSpec, chunk_specs, in_whole, rows
from gptface_dist.checkpoint.fingerprint import fingerprint
from gptface_dist.checkpoint.local_shard import LocalShard
from gptface_dist.checkpoint.tensor_shards import collect_shards
from gptface_dist.model.parameters import ParameterSpec, TensorParallelSharding

shapes = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)


def at(tensor: torch.Tensor, box: ChunkSpec) -> torch.Tensor:
    for axis, (start, length) in enumerate(zip(box.offsets, box.sizes, strict=True)):
        tensor = tensor.narrow(axis, start, length)
    return tensor


@given(shapes, st.data())
def test_a_range_is_its_boxes_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    whole = torch.arange(numel).view(shape)
    found = list(chunk_specs(start, stop, shape))
    assert [x for box in found for x in at(whole, box).flatten().tolist()] == list(range(start, stop))
    assert all(box.numel for box in found)
    assert len(found) <= 2 * len(shape) - 1
    limit = data.draw(st.integers(1, 20))
    for box in found:
        parts = list(rows(box, limit))
        assert [x for part in parts for x in at(whole, part).flatten().tolist()] == at(whole, box).flatten().tolist()
        longest = next((axis for axis, size in enumerate(box.sizes) if size > 1), 0)
        assert all(part.numel <= limit or part.sizes[longest] == 1 for part in parts)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[tuple[int, ...], TensorParallelSharding | None, int]:
    """A parameter's shape, how it is cut, and the tensor-parallel size."""
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=2).map(tuple))
    size = draw(st.integers(1, 4))
    axis = draw(st.integers(0, len(shape) - 1))
    parts = draw(st.sampled_from((1, 2)))
    if parts == 2:
        # The fused halves are equal, and each is divided evenly: layouts see to that.
        shape = tuple(2 * size * n if i == axis else n for i, n in enumerate(shape))
    return shape, draw(st.sampled_from((None, TensorParallelSharding(axis, parts)))), size


@given(cuts(), st.integers(1, 4), st.integers(1, 30), st.data())
def test_all_ranks_pieces_are_the_whole_once(
    cut: tuple[tuple[int, ...], TensorParallelSharding | None, int], replicas: int, bucket: int, data: st.DataObject
) -> None:
    """Tensor-parallel shards, divided among data-parallel ranks: pieces fit together, and writing to them works."""
    shape, how, size = cut
    whole = torch.randn(shape)
    entry = ParameterSpec("p", shape, None, how, None, 0.0, False, False)
    covered, rebuilt, parts = torch.zeros(shape, dtype=torch.int), torch.zeros(shape), []
    for rank in range(size if how else 1):
        shard = how.shard(whole, rank, size) if how else whole
        flat = shard.flatten()
        each = -(-len(flat) // replicas)
        for replica in range(replicas):
            held = range(min(replica * each, len(flat)), min((replica + 1) * each, len(flat)))
            values = {"weights": flat[held.start : held.stop]}
            local_shard = LocalShard(entry, tuple(shard.shape), rank, size if how else 1, held, held, values)
            for one in collect_shards([local_shard], written=True, bucket=bucket).values():
                for piece in one.pieces:
                    at(covered, piece.box).add_(1)
                    at(rebuilt, piece.box).copy_(piece.memory)
                    parts.append((piece.box, piece.memory))
                    assert piece.memory.data_ptr() >= flat.data_ptr(), "a view of the memory itself"
    assert torch.equal(covered, torch.ones_like(covered))
    assert torch.equal(rebuilt, whole)
    data.draw(st.randoms(use_true_random=False)).shuffle(parts)
    everything = ChunkSpec((0,) * len(shape), shape)
    assert fingerprint(parts, shape) == fingerprint([(everything, whole)], shape)


@given(cuts())
def test_padding_is_in_no_box(cut: tuple[tuple[int, ...], TensorParallelSharding | None, int]) -> None:
    shape, how, size = cut
    for rank in range(size if how else 1):
        shard = how.shard(torch.ones(shape), rank, size) if how else torch.ones(shape)
        whole = ChunkSpec((0,) * len(shape), tuple(shard.shape))
        inside = sum(here.numel for here, _ in in_whole(whole, how, shape, rank, size))
        assert inside == int(shard.sum())


@given(shapes, st.data())
def test_fingerprints_tell_values_and_places_apart(shape: tuple[int, ...], data: st.DataObject) -> None:
    tensor = torch.randn(shape)
    everything = ChunkSpec((0,) * len(shape), shape)
    before = fingerprint([(everything, tensor)], shape)
    changed = tensor.flatten().clone()
    place = data.draw(st.integers(0, len(changed) - 1))
    bit = data.draw(st.integers(0, 31))
    changed.view(torch.int32)[place] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
    assert fingerprint([(everything, changed.view(shape))], shape) != before
    swapped = tensor.flatten().roll(1)
    if not torch.equal(swapped, tensor.flatten()):
        assert fingerprint([(everything, swapped.view(shape))], shape) != before


def test_fingerprints_of_blocks_and_of_large_places() -> None:
    """More elements than a block, and places beyond 2**31."""
    wide, tall = torch.randn(3, 70_000), torch.randn(50_000, 3)
    for tensor in (wide, tall):
        shape = tuple(tensor.shape)
        halves = [(ChunkSpec((0, 0), (2, shape[1])), tensor[:2]), (ChunkSpec((2, 0), (shape[0] - 2, shape[1])), tensor[2:])]
        assert fingerprint(halves, shape) == fingerprint([(ChunkSpec((0, 0), shape), tensor)], shape)
    far, near = ChunkSpec((2**20, 2**12), (1, 1)), ChunkSpec((0, 2**12), (1, 1))
    one = torch.ones(1, 1)
    assert fingerprint([(far, one)], (2**21, 2**13)) != fingerprint([(near, one)], (2**21, 2**13))
