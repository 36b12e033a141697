"""Blocks: what the order says is what is read, and what cannot be read is replaced in its place and reported."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from gptface_dist.data.folder import ShardFolder
from gptface_dist.data.stream import Block, BlockReader, StreamOptions, read_skip_list
from gptface_dist.data.tokens import TokenDecoder, TokenSample
from gptface_dist.errors import UserError
from tests.corpus import VOCABULARY, source, write_tokens

OPTIONS = StreamOptions(seed=3, block=4, streams=3, window=16)


def reader(
    folders: list[Path], options: StreamOptions = OPTIONS, skip: frozenset[str] = frozenset()
) -> BlockReader[TokenSample]:
    return BlockReader([source(folder) for folder in folders], TokenDecoder(VOCABULARY), options, skip)


def keys(block: Block[TokenSample]) -> list[str]:
    return [sample.origin.key for sample in block.samples]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_tokens(folder, [20, 13, 31, 8])
    return folder


def test_an_epoch_of_blocks_holds_every_sample(corpus: Path) -> None:
    # 72 samples in 3 streams of 24: 6 blocks of 4 a stream, 18 blocks an epoch.
    blocks = [reader([corpus]).read(number) for number in range(36)]
    for epoch in (0, 1):
        part = [key for block in blocks[18 * epoch : 18 * epoch + 18] for key in keys(block)]
        assert sorted(part) == [f"0-{number:06d}" for number in range(72)]
    assert not any(block.replaced for block in blocks)


def test_content_belongs_to_its_key(corpus: Path) -> None:
    """Against the shards as webdataset reads them."""
    import io

    import webdataset as wds

    urls = [str(path) for path in sorted(corpus.glob("*.tar"))]
    truth = {s["__key__"]: s for s in wds.WebDataset(urls, shardshuffle=False)}
    blocks = reader([corpus])
    for number in range(18):
        for sample in blocks.read(number).samples:
            wanted = truth[sample.origin.key]
            assert np.array_equal(sample.value.codes, np.load(io.BytesIO(wanted["codes.npy"])))
            assert np.array_equal(sample.value.captions, np.load(io.BytesIO(wanted["captions.npy"])))
            assert wanted["__url__"].endswith(sample.origin.shard)


def test_any_block_can_be_read_first(corpus: Path) -> None:
    straight = [keys(b) for b in map(reader([corpus]).read, range(40))]
    backwards = reader([corpus])
    assert [keys(backwards.read(number)) for number in reversed(range(40))] == straight[::-1]


def test_data_that_moved_keeps_its_order(corpus: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in corpus.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    assert [keys(reader([corpus]).read(n)) for n in range(20)] == [keys(reader([moved]).read(n)) for n in range(20)]
    assert reader([corpus]).order_id == reader([moved]).order_id


def test_order_id_tells_what_the_order_depends_on(corpus: Path) -> None:
    others = [
        StreamOptions(seed=4, block=4, streams=3, window=16),
        StreamOptions(seed=3, block=2, streams=3, window=16),
        StreamOptions(seed=3, block=4, streams=2, window=16),
        StreamOptions(seed=3, block=4, streams=3, window=8),
    ]
    assert len({reader([corpus], options).order_id for options in [OPTIONS, *others]}) == 5


def test_sources_mix_by_weight_and_blocks_have_one_source(corpus: Path, tmp_path: Path) -> None:
    write_tokens(tmp_path, [30], seed=1)
    mixed = BlockReader([source(corpus, 3), source(tmp_path, 1)], TokenDecoder(VOCABULARY), OPTIONS)
    blocks = [mixed.read(number) for number in range(1000)]
    assert all(len({sample.origin.source for sample in block.samples}) == 1 for block in blocks)
    counts = Counter(block.samples[0].origin.source for block in blocks)
    assert counts == {str(corpus): 750, str(tmp_path): 250}


def test_skipped_keys_are_replaced_and_nothing_else_moves(corpus: Path) -> None:
    before = [keys(reader([corpus]).read(number)) for number in range(36)]
    skip = frozenset({"0-000007", "0-000030", "0-000031"})
    skipping = reader([corpus], skip=skip)
    met = 0
    for number, old in enumerate(before):
        block = skipping.read(number)
        assert not skip & set(keys(block))
        assert [new for new, key in zip(keys(block), old, strict=True) if key not in skip] == [k for k in old if k not in skip]
        assert {r.origin.key for r in block.replaced} == skip & set(old)
        assert all(r.skipped and r.by.key in keys(block) for r in block.replaced)
        assert len(set(keys(block))) == len(block.samples), "a replacement comes from another block"
        met += len(block.replaced)
    assert met == 6, "three keys in two epochs"


def test_damaged_samples_are_reported_and_replaced(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path
    for path in corpus.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    opened = ShardFolder.open(folder)
    key, members = opened.sidecar(0).samples[5]
    shard = folder / opened.index.shards[0].name
    data = bytearray(shard.read_bytes())
    data[members["codes.npy"].offset + members["codes.npy"].size - 1] ^= 1
    shard.write_bytes(data)
    replaced = [r for number in range(18) for r in reader([folder]).read(number).replaced]
    assert [(r.origin.key, r.origin.shard, r.skipped) for r in replaced] == [(key, shard.name, False)]
    assert "changed since the shard was indexed" in replaced[0].reason


def test_a_missing_shard_is_replaced_by_different_samples(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path
    for path in corpus.iterdir():
        if path.name != "00002.tar":
            (folder / path.name).write_bytes(path.read_bytes())
    blocks = [reader([folder]).read(number) for number in range(18)]
    replaced = [r for block in blocks for r in block.replaced]
    assert len(replaced) == 31, "as many as the shard had"
    assert {r.origin.shard for r in replaced} == {"00002.tar"}
    assert all("cannot be opened" in r.reason for r in replaced)
    assert max(Counter(r.by.key for r in replaced).values()) <= 4, "not one sample for all"
    assert all(len(block.samples) == 4 for block in blocks)


def test_nothing_readable_is_an_error_that_names_the_first(tmp_path: Path) -> None:
    write_tokens(tmp_path, [6, 6])
    for shard in tmp_path.glob("*.tar"):
        shard.unlink()
    with pytest.raises(UserError, match=r"no sample of stream 0 can be read; first: .*cannot be opened"):
        reader([tmp_path]).read(0)


def test_skip_list_file(tmp_path: Path) -> None:
    path = tmp_path / "skip.txt"
    path.write_text("# a spike at step 1200\n0-000001\n\n  0-000002  \n")
    assert read_skip_list(path) == {"0-000001", "0-000002"}
    with pytest.raises(UserError, match=r"skip list .*missing\.txt cannot be read"):
        read_skip_list(tmp_path / "missing.txt")
