"""Split the run's blocks over data-parallel ranks and worker processes; keep the position to resume from.

The global batch of a step is a row of consecutive blocks. Rank ``r`` of ``R`` takes the ``r``-th part of the row and cuts
it into micro-batches; worker processes prepare them in turn. What a step holds depends on none of this.
"""

import itertools
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

import torch.utils.data

from gptface_dist.data.pool import when_parent_ends
from gptface_dist.data.stream import Block, BlockReader, Substitution
from gptface_dist.errors import UserError

T = TypeVar("T")
Item = TypeVar("Item")

log = logging.getLogger(__name__)

BAD_COUNTED_FROM = 1000
"""The share of bad samples is taken of at least this many, so that an early bad sample does not stop the run."""


@dataclass(frozen=True)
class BatchSharding:
    """How the global batch is split over data-parallel ranks and micro-batches."""

    global_batch: int
    """Samples of one optimizer step, over all ranks."""
    micro_batch: int
    """Samples of one forward pass on one rank."""
    block: int
    """Consecutive samples that stay in one micro-batch."""
    rank: int = 0
    """This data-parallel rank."""
    ranks: int = 1
    """Number of data-parallel ranks."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.ranks:
            raise UserError(f"rank {self.rank} is not one of {self.ranks} ranks")
        if self.block < 1 or self.micro_batch < 1 or self.micro_batch % self.block:
            nearest = max(1, round(self.micro_batch / max(1, self.block))) * max(1, self.block)
            raise UserError(f"micro_batch {self.micro_batch} must be a multiple of block {self.block}: nearest is {nearest}")
        step = self.micro_batch * self.ranks
        if self.global_batch < 1 or self.global_batch % step:
            nearest = max(1, round(self.global_batch / step)) * step
            raise UserError(
                f"global_batch {self.global_batch} must be a multiple of micro_batch {self.micro_batch} x {self.ranks} ranks: "
                f"nearest is {nearest}"
            )

    @property
    def blocks(self) -> int:
        """Blocks of one step, over all ranks."""
        return self.global_batch // self.block

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one step on this rank."""
        return self.global_batch // (self.micro_batch * self.ranks)

    def blocks_of(self, start: int, number: int) -> range:
        """Blocks of this rank's micro-batch ``number`` (0, 1, ...), counted from a step that begins at block ``start``."""
        step, micro_batch = divmod(number, self.micro_batches)
        size = self.micro_batch // self.block
        first = start + step * self.blocks + self.rank * (self.blocks // self.ranks) + micro_batch * size
        return range(first, first + size)


@dataclass(frozen=True)
class Position:
    """The position of a run in its data; valid on any number of ranks and workers."""

    block: int
    """First block of the next step."""
    order_id: str
    """Hash of what the order depends on: :attr:`BlockReader.order_id`."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, as a checkpoint stores them."""
        return asdict(self)


class _MicroBatches(torch.utils.data.Dataset[tuple[Item, list[Substitution]] | UserError], Generic[T, Item]):
    """This rank's micro-batches by number; every worker process opens its own reader.

    A :class:`UserError` is returned as an item: torch would wrap a raised one into a traceback of many lines.
    """

    def __init__(
        self,
        reader: Callable[[], BlockReader[T]],
        collate: Callable[[list[Block[T]]], Item],
        sharding: BatchSharding,
        start: int,
    ):
        self._make_reader, self._collate, self._sharding, self._start = reader, collate, sharding, start
        self._reader: BlockReader[T] | None = None

    def __getitem__(self, number: int) -> tuple[Item, list[Substitution]] | UserError:
        if self._reader is None:
            self._reader = self._make_reader()
        try:
            blocks = [self._reader.read(block) for block in self._sharding.blocks_of(self._start, number)]
            return self._collate(blocks), [replaced for block in blocks for replaced in block.replaced]
        except UserError as error:
            return error


def _end_with_parent(_worker: int) -> None:
    """End a worker process when its rank is killed.

    The watchdog of torch's workers (2.13) notices that the parent is gone, but the worker then blocks for ever on the pipe
    that it writes a batch into.
    """
    when_parent_ends(lambda: os._exit(1))


class Loader(Generic[T, Item]):
    """Steps of micro-batches for one rank.

    Args:
        reader: makes the reader of blocks; called once in each worker process, so it must be picklable.
        collate: makes a micro-batch of blocks; must be picklable, too.
        sharding: this rank's part of the global batch.
        workers: worker processes; 0 prepares batches in the calling process.
        max_bad_fraction: share of unreadable samples past which the run stops.
    """

    def __init__(
        self,
        reader: Callable[[], BlockReader[T]],
        collate: Callable[[list[Block[T]]], Item],
        sharding: BatchSharding,
        workers: int = 0,
        max_bad_fraction: float = 0.01,
    ):
        if workers < 0:
            raise UserError(f"workers must be 0 or more, got {workers}")
        if not 0 <= max_bad_fraction <= 1:
            raise UserError(f"max_bad_fraction must lie between 0 and 1, got {max_bad_fraction}")
        self._reader, self._collate, self._sharding = reader, collate, sharding
        self._workers, self._max_bad_fraction = workers, max_bad_fraction
        self.seen = 0
        """Samples delivered to this rank since it started."""
        self.bad = 0
        """How many of ``seen`` replace unreadable samples."""
        self.skipped = 0
        """How many of ``seen`` replace samples on the skip list."""

    def steps(self, start: Position | None = None) -> Iterator[tuple[list[Item], Position]]:
        """Yield each step's micro-batches of this rank and the position after it, without end.

        ``start`` is the position after the last step of an earlier run; :class:`UserError` when its data or order differ.
        """
        reader = self._reader()
        order_id = reader.order_id
        reader.close()
        if start is not None and start.order_id != order_id:
            raise UserError(
                f"the run's position belongs to other data or another order ({start.order_id}, now {order_id}): sources, "
                "weights, seed, block, streams and window must be those it began with"
            )
        first = 0 if start is None else start.block
        dataset = _MicroBatches(self._reader, self._collate, self._sharding, first)
        context = multiprocessing.get_context("spawn") if self._workers else None
        batches: Any = torch.utils.data.DataLoader(
            dataset,
            batch_size=None,
            sampler=_Count(),
            num_workers=self._workers,
            multiprocessing_context=context,
            collate_fn=_as_is,
            worker_init_fn=_end_with_parent,
            # Its own generator: torch would draw worker seeds from the global one, and dropout would depend on the loader.
            generator=torch.Generator(),
        )
        prepared = iter(batches)
        for step in itertools.count(1):
            items = []
            for _ in range(self._sharding.micro_batches):
                item = next(prepared)
                if isinstance(item, UserError):
                    raise item
                item, replaced = item
                self._count(replaced)
                items.append(item)
            yield items, Position(first + step * self._sharding.blocks, order_id)

    def read(self, step: int) -> tuple[list[Item], list[Substitution]]:
        """Micro-batches and substitutions of this rank in one step, counted from the run's beginning."""
        dataset = _MicroBatches(self._reader, self._collate, self._sharding, step * self._sharding.blocks)
        items, replaced = [], []
        for number in range(self._sharding.micro_batches):
            loaded = dataset[number]
            if isinstance(loaded, UserError):
                raise loaded
            items.append(loaded[0])
            replaced += loaded[1]
        return items, replaced

    def _count(self, replaced: list[Substitution]) -> None:
        self.seen += self._sharding.micro_batch
        for substitution in replaced:
            if substitution.skipped:
                self.skipped += 1
                continue
            self.bad += 1
            log.warning("bad sample %s: %s; in its place: %s", substitution.origin, substitution.reason, substitution.by)
        allowed = self._max_bad_fraction * max(self.seen, BAD_COUNTED_FROM)
        if self.bad > allowed:
            last = next(substitution for substitution in reversed(replaced) if not substitution.skipped)
            raise UserError(
                f"{self.bad} of {self.seen} samples could not be read, more than max_bad_fraction {self._max_bad_fraction:g} "
                f"allows; the last one is {last.origin}: {last.reason}. `gptface data verify` lists them all"
            )


class _Count(torch.utils.data.Sampler[int]):
    """0, 1, 2, ... without end."""

    def __iter__(self) -> Iterator[int]:
        return itertools.count()


def _as_is(item: T) -> T:
    """Keep batches as ``collate`` made them; torch's default would turn arrays into tensors in shared memory."""
    return item
