"""The reference batch: one that is legal and reaches everything, an answer that any wrong weight changes."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptface_dist.errors import UserError
from gptface_dist.model.options import ModelOptions
from gptface_dist.model.plain import GPTFace
from gptface_dist.model.reference_batch import ReferenceBatch, reference_batch
from gptface_dist.objectives.milm_itm import MilmItm
from gptface_dist.objectives.reference_outputs import ReferenceOutputs, difference, reference_outputs
from gptface_dist.release.streamed import streamed_model, values_read
from gptface_dist.sequence import IGNORE, IMAGE, PADDING, TEXT
from gptface_dist.tokenizers.vocabulary import Vocabulary
from tests.release.factories import GRID, VARIANTS, make_model

VOCABULARY = Vocabulary(text_size=40, image_codes=24, text_sha256="a" * 64, image_sha256="b" * 64)


def run(model: GPTFace, batch: ReferenceBatch) -> dict[str, torch.Tensor]:
    return reference_outputs(MilmItm(), model, batch)


@settings(deadline=None, max_examples=60)
@given(
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    text_length=st.integers(1, 20),
    pad_to_multiple_of=st.sampled_from([1, 2, 3, 16]),
    seed=st.integers(0, 2**32),
)
def test_every_sequence_is_cls_text_sep_image_sep(
    grid: tuple[int, int], text_length: int, pad_to_multiple_of: int, seed: int
) -> None:
    batch = reference_batch(VOCABULARY, grid, text_length, pad_to_multiple_of, seed)
    assert batch.tokens.shape[1] % pad_to_multiple_of == 0
    assert batch.tokens.shape[1] < int(batch.lengths.max()) + pad_to_multiple_of
    assert batch.grid == grid
    captions = (batch.lengths - grid[0] * grid[1] - 3).tolist()
    assert (captions[0], captions[-1]) == (1, text_length)
    for row, caption in enumerate(captions):
        length, image = int(batch.lengths[row]), range(caption + 2, caption + 2 + grid[0] * grid[1])
        tokens, places = batch.tokens[row].tolist(), batch.positions[row].tolist()
        specials = {0: VOCABULARY.cls_id, caption + 1: VOCABULARY.sep_id, length - 1: VOCABULARY.sep_id}
        for at, token in enumerate(tokens):
            ids = VOCABULARY.image_range if at in image else VOCABULARY.text_range
            if at >= length:
                assert (token, int(batch.segments[row, at]), places[at]) == (VOCABULARY.pad_id, PADDING, [0, 0])
            elif at in image:
                assert int(batch.segments[row, at]) == IMAGE
                assert places[at] == list(divmod(at - image.start, grid[1]))
                assert token in ids or token == VOCABULARY.mask_id
            else:
                assert int(batch.segments[row, at]) == TEXT
                # The last [SEP] goes on counting after the one before the image.
                assert places[at] == [caption + 2 if at == length - 1 else at, 0]
                assert token == specials[at] if at in specials else token in ids or token == VOCABULARY.mask_id
            label = int(batch.labels[row, at])
            assert label == IGNORE or (label in ids and at < length and at not in specials)
        asked = (batch.labels[row] != IGNORE).sum()
        assert asked == min(8, caption) + min(8, grid[0] * grid[1])
    # From an image that is all there to one that is all to be made.
    masked = (batch.tokens == VOCABULARY.mask_id) & (batch.segments == IMAGE)
    assert masked[0].sum() == 0
    assert masked[-1].sum() == grid[0] * grid[1]


def test_the_batch_is_fixed() -> None:
    """Its numbers are part of the format: a change does not make older checkpoints' outputs wrong, but should be noticed."""
    first, second = (reference_batch(VOCABULARY, GRID, 16) for _ in range(2))
    for name in ("tokens", "labels", "segments", "positions", "lengths"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert not torch.equal(first.tokens, reference_batch(VOCABULARY, GRID, 16, seed=1).tokens)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_matters(variant: str) -> None:
    """A conversion that loses any one of them is found."""
    model = make_model(VOCABULARY, VARIANTS[variant])
    batch = reference_batch(VOCABULARY, GRID, 16)
    wanted = run(model, batch)
    blind = set()
    for name, parameter in model.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.copy_(kept.flip(0) * 1.1 + 0.01)
        if max(difference(run(model, batch), wanted).values()) < 1e-3:
            blind.add(name)
        with torch.no_grad():
            parameter.copy_(kept)
    # What is added to all keys alike adds the same to all of a query's scores: no softmax, and no model, depends on it.
    assert blind == ({"layers.0.k_norm.bias", "layers.1.k_norm.bias"} if variant == "qk_norm" else set())


@pytest.mark.parametrize("variant", VARIANTS)
def test_streamed_is_the_plain_model_with_one_module_at_a_time(variant: str) -> None:
    model = make_model(VOCABULARY, VARIANTS[variant])
    batch = reference_batch(VOCABULARY, GRID, 16)
    read = []
    held = {name: parameter.detach() for name, parameter in model.named_parameters()}
    streamed = streamed_model(MilmItm(), model.options, VOCABULARY, held, read.append)
    seen = []

    def here(*_: object) -> None:
        seen.append(sum(p.numel() for p in streamed.parameters() if not p.is_meta))

    for module in streamed.modules():
        module.register_forward_hook(here, prepend=True)
    found = run(streamed, batch)
    assert difference(found, run(model, batch)) == {"text": 0.0, "image": 0.0, "itm": 0.0}
    largest = max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules())
    # The token head keeps its own bias while its two parts run.
    assert max(seen) <= largest + VOCABULARY.size
    assert all(p.is_meta for p in streamed.parameters())
    assert sum(read) == values_read(MilmItm(), model.options, VOCABULARY)


def test_outputs_are_read_as_written_and_other_files_are_refused(tmp_path: Path) -> None:
    batch = reference_batch(VOCABULARY, GRID, 16)
    recorded = ReferenceOutputs(batch, run(make_model(VOCABULARY), batch), "bfloat16")
    path = tmp_path / "reference.safetensors"
    recorded.save(path)
    read = ReferenceOutputs.load(path)
    assert read.dtype == "bfloat16"
    for name in ("tokens", "labels", "segments", "positions", "lengths"):
        assert torch.equal(getattr(read.batch, name), getattr(batch, name))
    assert read.outputs.keys() == {"text", "image", "itm"}
    assert all(torch.equal(read.outputs[name], output) for name, output in recorded.outputs.items())
    with pytest.raises(UserError, match="does not exist"):
        ReferenceOutputs.load(tmp_path / "nothing")
    earlier = path.read_bytes().replace(b"gptface-reference-2", b"gptface-reference-1")
    (tmp_path / "earlier").write_bytes(earlier)
    with pytest.raises(UserError, match="has the format 'gptface-reference-1', not 'gptface-reference-2'"):
        ReferenceOutputs.load(tmp_path / "earlier")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="holds no reference outputs") as error:
        ReferenceOutputs.load(path)
    assert "\n" not in str(error.value)


def test_the_difference_is_relative_and_not_fooled_by_nan() -> None:
    wanted = {"text": torch.tensor([[3.0, 4.0]]), "image": torch.tensor([[0.0, 2.0]]), "itm": torch.ones(1, 2)}
    outputs = wanted | {"text": torch.tensor([[3.0, 4.5]]), "image": torch.tensor([[0.0, float("nan")]])}
    errors = difference(outputs, wanted)
    assert errors["text"] == pytest.approx(0.1)
    assert errors["image"] != errors["image"]
    assert errors["itm"] == 0
    with pytest.raises(UserError, match="are another model's"):
        difference(outputs | {"itm": torch.ones(1, 3)}, wanted)


def test_long_captions_fit_the_model() -> None:
    options = ModelOptions(layers=1, hidden=8, heads=2, ffn=8, text_positions=9, rows=3, columns=4)
    batch: ReferenceBatch = reference_batch(VOCABULARY, GRID, options.text_positions - 3)
    text = batch.segments == TEXT
    assert int(batch.positions[text].max()) == options.text_positions - 1
    run(make_model(VOCABULARY, options), batch)
