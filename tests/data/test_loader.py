"""The loader: the same global batches on any number of ranks and workers, from any position on."""

import contextlib
import functools
import logging
import multiprocessing
import os
import select
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptface_dist.data.batch import BatchBuilder, BatchOptions, MaskedBatch
from gptface_dist.data.loader import BatchSharding, Loader, Position
from gptface_dist.data.masking import MaskingOptions
from gptface_dist.data.stream import BlockReader, StreamOptions
from gptface_dist.data.tokens import TokenDecoder, TokenSample
from gptface_dist.errors import UserError
from tests.corpus import GRID, VOCABULARY, source, write_tokens

BLOCK = 2


def make_loader(
    folders: list[Path], rank: int = 0, ranks: int = 1, workers: int = 0, micro: int = BLOCK, **more: object
) -> Loader:
    skip = more.pop("skip", frozenset())
    reader = functools.partial(
        BlockReader[TokenSample],
        [source(folder, weight) for folder, weight in zip(folders, (2.0, 1.0), strict=False)],
        TokenDecoder(VOCABULARY),
        StreamOptions(seed=1, block=BLOCK, streams=3, window=8),
        skip,
    )
    build = BatchBuilder(VOCABULARY, GRID, 1, MaskingOptions(), BatchOptions(text_length=32))
    return Loader(reader, build, BatchSharding(16, micro, BLOCK, rank, ranks), workers, **more)  # type: ignore[arg-type]


def content(batch: MaskedBatch) -> list[bytes]:
    """Every sequence of a batch as bytes, padding left out: ids, labels, places, pair, origins."""
    rows = []
    for i, length in enumerate(batch.lengths.tolist()):
        arrays = (batch.tokens, batch.labels, batch.segments, batch.positions)
        parts = [array[i, :length].tobytes() for array in arrays]
        rows.append(
            b"".join([*parts, bytes([batch.itm_label[i]]), repr((batch.text_origins[i], batch.image_origins[i])).encode()])
        )
    return rows


def take(steps: Iterator[tuple[list[MaskedBatch], Position]], count: int) -> tuple[list[list[bytes]], Position]:
    """``count`` steps of one rank: the sequences of each, and the position after them."""
    taken, position = [], None
    for _ in range(count):
        batches, position = next(steps)
        taken.append([row for batch in batches for row in content(batch)])
    assert position is not None
    return taken, position


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    write_tokens(first, [25, 17, 30])
    write_tokens(second, [40], seed=1)
    # A sample that cannot be read: replaced wherever it is met.
    opened = source(first).folder
    shard = first / "00001.tar"
    data = bytearray(shard.read_bytes())
    data[opened.sidecar(1).samples[4][1]["codes.npy"].offset + 130] ^= 0xFF
    shard.write_bytes(data)
    return [first, second]


@pytest.fixture(scope="module")
def truth(folders: list[Path]) -> list[list[bytes]]:
    return take(make_loader(folders).steps(), 16)[0]


def test_steps_have_the_whole_global_batch(truth: list[list[bytes]]) -> None:
    assert [len(step) for step in truth] == [16] * 16
    assert len({row for step in truth for row in step}) > 100


@pytest.mark.parametrize(
    ("ranks", "workers", "micro"),
    [(1, 0, 4), (1, 0, 16), (2, 0, 2), (2, 0, 8), (4, 0, 2), (4, 0, 4), (1, 1, 2), (1, 3, 4), (2, 3, 2), (4, 1, 2)],
)
def test_identical_on_any_number_of_ranks_and_workers(
    folders: list[Path], truth: list[list[bytes]], ranks: int, workers: int, micro: int
) -> None:
    steps = 6
    parts = [take(make_loader(folders, rank, ranks, workers, micro).steps(), steps)[0] for rank in range(ranks)]
    assert [[row for part in parts for row in part[step]] for step in range(steps)] == truth[:steps]


@pytest.mark.parametrize(
    ("before", "after", "stop"), [((1, 0), (4, 0), 1), ((4, 0), (1, 3), 5), ((1, 3), (2, 1), 9), ((1, 1), (1, 0), 13)]
)
def test_resumes_on_another_number_of_ranks(
    folders: list[Path], truth: list[list[bytes]], before: tuple[int, int], after: tuple[int, int], stop: int
) -> None:
    first = [take(make_loader(folders, rank, before[0], before[1]).steps(), stop) for rank in range(before[0])]
    positions = {position for _, position in first}
    assert len(positions) == 1, "every rank knows the same position"
    resumed = Position(**positions.pop().to_dict())
    parts = [take(make_loader(folders, r, after[0], after[1]).steps(resumed), 3)[0] for r in range(after[0])]
    assert [[row for part in parts for row in part[step]] for step in range(3)] == truth[stop : stop + 3]


def test_every_stop_resumes(folders: list[Path], truth: list[list[bytes]]) -> None:
    steps = make_loader(folders).steps()
    for stop in range(1, 16):
        _, position = next(steps)
        assert take(make_loader(folders).steps(position), 1)[0][0] == truth[stop]


def test_leaves_the_global_generator_alone(folders: list[Path]) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    next(make_loader(folders).steps())
    assert torch.equal(torch.get_rng_state(), before)


def test_counts_and_names_bad_samples(folders: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    loader = make_loader(folders[:1])
    with caplog.at_level(logging.WARNING):
        take(loader.steps(), 9)  # 144 samples: two epochs of 72
    assert (loader.seen, loader.bad, loader.skipped) == (144, 2, 0)
    assert len(caplog.records) == 2
    assert "00001.tar key 0-000029: bytes" in caplog.text
    assert "in its place: " in caplog.text


def test_stops_when_too_much_is_bad(folders: list[Path]) -> None:
    loader = make_loader(folders[:1], max_bad_fraction=0.001)
    with pytest.raises(
        UserError, match=r"2 of \d+ samples could not be read, more than max_bad_fraction 0.001 .* key 0-000029"
    ):
        take(loader.steps(), 20)


def test_skipped_samples_do_not_count_as_bad(folders: list[Path]) -> None:
    loader = make_loader(folders[:1], skip=frozenset({"0-000029", "0-000030"}), max_bad_fraction=0)
    take(loader.steps(), 9)
    assert (loader.bad, loader.skipped) == (0, 4)


def test_a_workers_error_is_one_line(tmp_path: Path) -> None:
    write_tokens(tmp_path, [8])
    (tmp_path / "00000.tar").unlink()
    with pytest.raises(UserError, match="no sample of stream") as caught:
        next(make_loader([tmp_path], workers=1).steps())
    assert "\n" not in str(caught.value)


def test_other_data_is_refused_on_resume(folders: list[Path]) -> None:
    _, position = next(make_loader(folders).steps())
    with pytest.raises(UserError, match="belongs to other data or another order"):
        next(make_loader(folders[:1]).steps(position))


@given(
    block=st.integers(1, 4), per=st.integers(1, 4), ranks=st.integers(1, 4), micros=st.integers(1, 4), start=st.integers(0, 50)
)
def test_dealing_covers_every_block_once(block: int, per: int, ranks: int, micros: int, start: int) -> None:
    deals = [BatchSharding(block * per * ranks * micros, block * per, block, rank, ranks) for rank in range(ranks)]
    for step in range(3):
        dealt = [
            number
            for deal in deals
            for micro in range(deal.micro_batches)
            for number in deal.blocks_of(start, step * deal.micro_batches + micro)
        ]
        size = deals[0].blocks
        assert dealt == list(range(start + step * size, start + (step + 1) * size)), "in order, rank by rank"


def test_impossible_deals_name_the_nearest_legal_one() -> None:
    with pytest.raises(UserError, match=r"micro_batch 6 must be a multiple of block 4: nearest is 8"):
        BatchSharding(16, 6, 4)
    with pytest.raises(UserError, match=r"global_batch 30 must be a multiple of micro_batch 4 x 2 ranks: nearest is 32"):
        BatchSharding(30, 4, 4, 0, 2)
    with pytest.raises(UserError, match="rank 2 is not one of 2"):
        BatchSharding(16, 4, 4, 2, 2)


def test_batches_of_a_worker_are_arrays(folders: list[Path]) -> None:
    batches, _ = next(make_loader(folders, workers=1).steps())
    assert isinstance(batches[0].tokens, np.ndarray)


class Large:
    """Batches that no pipe holds."""

    def __call__(self, _: object) -> np.ndarray:
        return np.zeros(2**20, np.uint8)


def read_and_wait(loader: Loader, said: Connection) -> None:
    """A rank: says which processes prepare its batches, takes one step, and stays."""
    steps = loader.steps()
    next(steps)
    said.send([child.pid for child in multiprocessing.active_children()])
    time.sleep(600)


def test_a_killed_rank_leaves_no_worker_behind(folders: list[Path]) -> None:
    context = multiprocessing.get_context("spawn")
    heard, said = context.Pipe(duplex=False)
    loader = make_loader(folders, workers=2)
    loader._collate = Large()
    rank = context.Process(target=read_and_wait, args=(loader, said))
    rank.start()
    workers = heard.recv()
    # Readable once its process has ended, whoever reaps it.
    ends = [os.pidfd_open(pid) for pid in workers]
    rank.kill()
    rank.join()
    try:
        assert len(ends) == 2
        for end in ends:
            assert select.select([end], [], [], 60)[0], "a worker outlives its rank"
    finally:
        for pid, end in zip(workers, ends, strict=True):
            os.close(end)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
