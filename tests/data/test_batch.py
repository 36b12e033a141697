"""Batches: shapes, layout, what is predicted, and which images are swapped."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptface_dist.data.batch import BatchBuilder, BatchOptions, MaskedBatch
from gptface_dist.data.masking import MaskingOptions
from gptface_dist.data.options import DataConfig
from gptface_dist.data.stream import Block, BlockReader, DecodedSample, Provenance, StreamOptions
from gptface_dist.data.tokens import TokenDecoder, TokenSample
from gptface_dist.errors import UserError
from gptface_dist.sequence import IGNORE, IMAGE, PADDING, TEXT
from tests.corpus import GRID, VOCABULARY, source, write_tokens
from tests.fake_cuda import DEVICE, fake_cuda

BOTH = MaskingOptions(captioning_ratio=0, text_dropout=0)
"""Masks both text and image of every sample."""


def builder(
    options: BatchOptions | None = None, seed: int = 0, grid: tuple[int, int] = GRID, masking: MaskingOptions = BOTH
) -> BatchBuilder:
    return BatchBuilder(VOCABULARY, grid, seed, masking, options or BatchOptions(text_length=32))


def block(captions: list[list[list[int]]], grid: tuple[int, int] = GRID, epoch: int = 0) -> Block[TokenSample]:
    """A block whose sample ``i`` has the code ``i`` everywhere."""
    samples = []
    for number, rows in enumerate(captions):
        table = np.full((len(rows), max(1, *map(len, rows))), -1, dtype=np.int32)
        for row, ids in zip(table, rows, strict=True):
            row[: len(ids)] = ids
        codes = np.full(grid, number, dtype=np.uint16)
        samples.append(DecodedSample(TokenSample(codes, table), Provenance("s", "0.tar", f"k{number}", epoch)))
    return Block(0, samples, [])


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    height=st.integers(4, 8),
    width=st.integers(4, 8),
    seed=st.integers(0, 1000),
)
def test_sequences_are_what_they_should_be(lengths: list[int], height: int, width: int, seed: int) -> None:
    options = BatchOptions(text_length=32, itm_negative_ratio=0)
    texts = [list(range(10 * i, 10 * i + length)) for i, length in enumerate(lengths)]
    batch = builder(options, seed, (height, width))([block([[text] for text in texts], (height, width))])
    for i, text in enumerate(texts):
        text = text[:32]
        image = [VOCABULARY.image_offset + i] * (height * width)
        whole = np.array([VOCABULARY.cls_id, *text, VOCABULARY.sep_id, *image, VOCABULARY.sep_id])
        n = len(whole)
        assert batch.lengths[i] == n
        predicted = batch.labels[i] != IGNORE
        assert (batch.labels[i, :n][predicted[:n]] == whole[predicted[:n]]).all()
        assert (batch.tokens[i, :n][~predicted[:n]] == whole[~predicted[:n]]).all()
        assert not predicted[n:].any()
        assert (batch.tokens[i, n:] == VOCABULARY.pad_id).all()
        assert (
            batch.segments[i]
            == [TEXT] * (len(text) + 2) + [IMAGE] * len(image) + [TEXT] + [PADDING] * (batch.tokens.shape[1] - n)
        ).all()
        at = len(text) + 2
        assert batch.positions[i, :at].tolist() == [[k, 0] for k in range(at)]
        assert batch.positions[i, at : n - 1].tolist() == [[r, c] for r in range(height) for c in range(width)]
        assert batch.positions[i, n - 1].tolist() == [at, 0]
        special = np.isin(whole, [VOCABULARY.cls_id, VOCABULARY.sep_id])
        assert not predicted[:n][special].any(), "specials are never predicted"
        image_predicted = predicted[at : n - 1]
        assert (batch.tokens[i, at : n - 1][image_predicted] == VOCABULARY.mask_id).all()
        assert predicted[1 : len(text) + 1].sum() == max(1, int(0.15 * len(text) + 0.5))
        text_at, image_at = np.flatnonzero(predicted[:at]), at + np.flatnonzero(image_predicted)
        assert batch.masked_text[batch.masked_text[:, 0] == i, 1].tolist() == text_at.tolist()
        assert batch.masked_image[batch.masked_image[:, 0] == i, 1].tolist() == image_at.tolist()
    assert len(batch.masked_text) + len(batch.masked_image) == (batch.labels != IGNORE).sum()
    assert batch.padded == (PADDING in batch.segments)
    assert all(
        getattr(batch, name).dtype == np.int64 for name in ("tokens", "labels", "segments", "positions", "lengths", "itm_label")
    )


def test_padded_to_the_shortest_bucket() -> None:
    options = BatchOptions(text_length=32, buckets=4, pad_to_multiple_of=8)
    assert options.lengths(24) == [40, 48, 56, 64]  # 3 + 24 + 8, 16, 24, 32, rounded up to eights
    make = builder(options)
    assert make([block([[[1] * 5], [[2] * 13]])]).tokens.shape == (2, 40)
    assert make([block([[[1] * 14]])]).tokens.shape == (1, 48)
    assert make([block([[[1] * 500]])]).tokens.shape == (1, 64)
    assert make([block([[[1] * 5]]), block([[[1] * 14]])]).tokens.shape == (2, 48), "several blocks share one length"


def swapped(batch: MaskedBatch) -> list[int]:
    """Whose image each sample got."""
    return [int(origin.key[1:]) for origin in batch.image_origins]


def test_half_of_the_images_are_swapped_and_not_supervised() -> None:
    texts = [[[i]] for i in range(8)]
    matched = []
    for epoch in range(400):
        batch = builder()([block(texts, epoch=epoch)])
        images = swapped(batch)
        assert batch.itm_label.tolist() == [int(image == i) for i, image in enumerate(images)]
        for i, image in enumerate(images):
            codes = batch.tokens[i][batch.segments[i] == IMAGE]
            seen = codes[codes != VOCABULARY.mask_id]
            assert (seen == VOCABULARY.image_offset + image).all()
            assert (batch.labels[i] != IGNORE).any() == (image == i)
        matched.append(batch.itm_label.mean())
    assert np.mean(matched) == pytest.approx(0.5, abs=0.03)


def test_swapped_inputs_are_masked_like_matched_ones() -> None:
    """Otherwise the number of masks would tell a swapped pair from a matched one."""
    texts = [[[i] * 20] for i in range(8)]
    masked: dict[int, list[float]] = {0: [], 1: []}
    for epoch in range(300):
        batch = builder()([block(texts, epoch=epoch)])
        for i, match in enumerate(batch.itm_label.tolist()):
            masked[match].append(float((batch.tokens[i] == VOCABULARY.mask_id).sum()))
    assert np.mean(masked[0]) == pytest.approx(np.mean(masked[1]), rel=0.06)


def test_partners_are_uniform() -> None:
    counts = np.zeros(8)
    for epoch in range(3000):
        images = swapped(builder()([block([[[i]] for i in range(8)], epoch=epoch)]))
        if images[3] != 3:
            counts[images[3]] += 1
    assert counts[3] == 0
    others = np.delete(counts, 3) / counts.sum()
    assert others == pytest.approx([1 / 7] * 7, abs=0.03)


@settings(max_examples=150, deadline=None)
@given(
    captions=st.lists(
        st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), min_size=1, max_size=3), min_size=1, max_size=8
    ),
    epoch=st.integers(0, 1000),
)
def test_identical_captions_never_form_a_negative_pair(captions: list[list[list[int]]], epoch: int) -> None:
    # Every token chosen for prediction is kept as it is, so that the caption can be read off the batch.
    kept = MaskingOptions(mask_share=0, random_share=0, captioning_ratio=0, text_dropout=0)
    make = BatchBuilder(VOCABULARY, GRID, 0, kept, BatchOptions(text_length=2, itm_negative_ratio=0.9))
    batch = make([block(captions, epoch=epoch)])
    for i, image in enumerate(swapped(batch)):
        if image != i:
            length = int(batch.lengths[i]) - 3 - GRID[0] * GRID[1]
            caption = batch.tokens[i, 1 : 1 + length].tolist()
            assert caption in [c[:2] for c in captions[i]]
            assert caption not in [c[:2] for c in captions[image]]


def test_all_captions_alike_means_no_negatives() -> None:
    for epoch in range(50):
        assert builder()([block([[[5, 6]]] * 6, epoch=epoch)]).itm_label.all()


def test_a_caption_that_is_one_of_the_others_is_no_negative() -> None:
    """Sample 1 is also described by sample 0's only caption; sample 2 is not."""
    seen = {0: set(), 1: set()}
    for epoch in range(300):
        images = swapped(builder()([block([[[1]], [[1], [2]], [[3]]], epoch=epoch)]))
        seen[0].add(images[0])
    assert seen[0] == {0, 2}


def masked_shares(masking: MaskingOptions, epochs: int) -> np.ndarray:
    """[samples, 4]: share of text and of image that is [MASK], length of the text, and whether the pair is matched."""
    found = []
    for epoch in range(epochs):
        batch = builder(masking=masking)([block([[[i] * 20] for i in range(8)], epoch=epoch)])
        for i in range(8):
            length = int(batch.lengths[i]) - 3 - GRID[0] * GRID[1]
            hidden = batch.tokens[i] == VOCABULARY.mask_id
            image = hidden[batch.segments[i] == IMAGE].mean()
            found.append((hidden[1 : 1 + length].mean() if length else 0, image, length, batch.itm_label[i]))
    return np.array(found)


def test_captioning_samples_have_a_whole_image_and_a_text_masked_by_the_cosine_law() -> None:
    text, image, length, matched = masked_shares(MaskingOptions(captioning_ratio=1, text_dropout=0), 200).T
    assert not image.any()
    assert (length == 20).all()
    # The mean of the cosine law, of which ceil makes half a token more.
    assert text.mean() == pytest.approx(2 / np.pi + 0.5 / 20, abs=0.03)
    assert text.min() >= 1 / 20
    assert (text == 1).mean() > 0.1
    assert matched.mean() == pytest.approx(0.5, abs=0.05), "swapped like the others"


def test_dropped_captions_leave_the_image_alone_and_are_never_swapped() -> None:
    batch = builder(masking=MaskingOptions(captioning_ratio=0, text_dropout=1))([block([[[i] * 20] for i in range(8)])])
    for i in range(8):
        assert batch.tokens[i, :2].tolist() == [VOCABULARY.cls_id, VOCABULARY.sep_id]
        assert batch.lengths[i] == 3 + GRID[0] * GRID[1]
        predicted = batch.labels[i] != IGNORE
        assert predicted.any()
        assert (batch.labels[i][predicted] == VOCABULARY.image_offset + i).all()
        assert (batch.segments[i][predicted] == IMAGE).all()
    assert batch.itm_label.all(), "an empty caption is true of every image"
    assert swapped(batch) == list(range(8))


def crossed(
    captions: list[list[list[int]]], number: int, masking: MaskingOptions = BOTH
) -> tuple[list[tuple[int, int]], MaskedBatch]:
    """The (text, image) pairs of a block of matching alone, and its batch."""
    make = builder(BatchOptions(text_length=32, hard_pair_ratio=1), masking=masking)
    batch = make([dataclasses.replace(block(captions), number=number)])
    texts = [int(origin.key[1:]) for origin in batch.text_origins]
    return list(zip(texts, swapped(batch), strict=True)), batch


def test_crossed_pairs_have_every_caption_and_image_in_both_kinds_and_no_masks() -> None:
    used = np.zeros(8)
    for number in range(200):
        # Captions that would often be dropped or masked: not here.
        pairs, batch = crossed([[[i] * 20] for i in range(8)], number, MaskingOptions(captioning_ratio=0.5, text_dropout=0.5))
        assert (batch.labels == IGNORE).all()
        for row, (text, image) in enumerate(pairs):
            assert batch.tokens[row, 1:21].tolist() == [text] * 20
            codes = batch.tokens[row][batch.segments[row] == IMAGE]
            assert codes.tolist() == [VOCABULARY.image_offset + image] * (GRID[0] * GRID[1])
            assert batch.itm_label[row] == (text == image)
        for side in (0, 1):
            kinds = [(pair[side], pair[0] == pair[1]) for pair in pairs]
            assert sorted(kinds) == sorted((sample, kind) for sample in {one for one, _ in kinds} for kind in (False, True))
        used[[text for text, _ in pairs]] += 1
    # Half of the samples each time; 200 draws of 1/2 have a standard deviation of 7.
    assert used.sum() == 200 * 4
    assert used == pytest.approx(np.full(8, 100), abs=30)


def test_captions_that_describe_both_images_are_not_crossed() -> None:
    captions = [[[1]], [[1], [2]], [[3]], [[3]]]
    for number in range(60):
        pairs, batch = crossed(captions, number)
        negatives = [pair for pair in pairs if pair[0] != pair[1]]
        assert {(0, 1), (2, 3), (3, 2)}.isdisjoint(negatives)
        assert len(pairs) == 4
        assert batch.itm_label.sum() == 4 - len(negatives)
        # Where nothing could be crossed, all four are there once.
        assert negatives or sorted(pairs) == [(i, i) for i in range(4)]


def test_blocks_that_cannot_be_crossed_are_refused() -> None:
    with pytest.raises(UserError, match=r"order\.block to be a multiple of 4"):
        DataConfig("", [], order=StreamOptions(block=6), batch=BatchOptions(hard_pair_ratio=0.1))


def test_a_share_of_the_blocks_is_crossed_and_the_others_stay_as_they_were() -> None:
    captions = [[[i] * 20] for i in range(8)]
    without, share = builder(), builder(BatchOptions(text_length=32, hard_pair_ratio=0.3))
    same = 0
    for number in range(600):
        one = dataclasses.replace(block(captions, epoch=number), number=number)
        plain, found = without([one]), share([one])
        alike = np.array_equal(plain.tokens, found.tokens) and np.array_equal(plain.labels, found.labels)
        same += alike
        assert alike or (found.labels == IGNORE).all()
    # Standard error 0.019.
    assert same / 600 == pytest.approx(0.7, abs=0.07)


def test_shares_of_samples_are_those_of_the_options() -> None:
    text, image, length, matched = masked_shares(MaskingOptions(captioning_ratio=0.3, text_dropout=0.2), 400).T
    # Standard error of a share is below 0.009 here. Other samples have at least one masked token of the image.
    assert ((image == 0) & (text > 0)).mean() == pytest.approx(0.3, abs=0.035)
    assert (length == 0).mean() == pytest.approx(0.2, abs=0.035)
    assert not ((image == 0) & (text == 0)).any()
    assert matched[length > 0].mean() == pytest.approx(0.5, abs=0.045)


def test_masks_depend_on_seed_epoch_and_key_only(tmp_path: Path) -> None:
    """A sample met in another block, among others, has the same caption and the same masks."""
    write_tokens(tmp_path, [64])
    make = builder(BatchOptions(text_length=32, itm_negative_ratio=0), masking=MaskingOptions())
    found: list[dict[str, bytes]] = []
    for size in (4, 16):
        reader = BlockReader([source(tmp_path)], TokenDecoder(VOCABULARY), StreamOptions(block=size, streams=2))
        batches = [make([reader.read(number)]) for number in range(64 // size)]
        rows = {
            origin.key: b.tokens[i, : b.lengths[i]].tobytes() + b.labels[i, : b.lengths[i]].tobytes()
            for b in batches
            for i, origin in enumerate(b.text_origins)
        }
        found.append(rows)
    assert len(found[0]) == 64
    assert found[0] == found[1]


def test_epochs_and_seeds_mask_differently() -> None:
    texts = [[[i] * 30] for i in range(8)]
    tokens = [builder(seed=s)([block(texts, epoch=e)]).tokens.tobytes() for s in (0, 1) for e in (0, 1)]
    assert len(set(tokens)) == 4


def test_tensors_share_the_arrays_values() -> None:
    batch = builder()([block([[[1, 2, 3]], [[4]]])])
    tensors = batch.tensors()
    for field in dataclasses.fields(batch):
        value, moved = getattr(batch, field.name), getattr(tensors, field.name)
        if isinstance(value, np.ndarray):
            assert isinstance(moved, torch.Tensor)
            assert moved.dtype == torch.int64
            assert np.array_equal(moved.numpy(), value)


def test_another_grid_than_the_index_says_is_refused() -> None:
    with pytest.raises(UserError, match="has 5x5 codes, the index says 4x6"):
        builder()([block([[[1]]], grid=(5, 5))])


def test_impossible_options_are_refused() -> None:
    for wrong in (
        {"text_length": 0},
        {"buckets": 0},
        {"itm_negative_ratio": 1.0},
        {"itm_negative_ratio": -0.1},
        {"hard_pair_ratio": 1.1},
    ):
        with pytest.raises(UserError):
            BatchOptions(**wrong)  # type: ignore[arg-type]


def test_a_batch_without_padding_says_so() -> None:
    options = BatchOptions(text_length=8, buckets=1, pad_to_multiple_of=1)
    image = GRID[0] * GRID[1]
    full = builder(options)([block([[list(range(8))], [list(range(8))]])])
    assert full.tokens.shape[1] == 8 + image + 3
    assert not full.padded
    assert builder(options)([block([[list(range(8))], [list(range(7))]])]).padded


@pytest.mark.skipif(torch.cuda.is_available(), reason="the fake GPU stands in for CUDA")
def test_a_gpu_gets_a_batch_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = builder()([block([[list(range(5))], [list(range(9))]])])
    with fake_cuda(monkeypatch) as gpu:
        moved = batch.tensors(DEVICE)
        assert gpu.waits == []
        found = {name: value for name, value in vars(moved).items() if isinstance(value, torch.Tensor)}
        assert len(found) == 8
        for name, tensor in found.items():
            assert tensor.device == DEVICE, name
            assert np.array_equal(tensor.cpu().numpy(), getattr(batch, name)), name
    assert moved.padded == batch.padded
