"""Decoding: the schedule, the draws, and that no sample depends on the others."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptface_dist.errors import UserError
from gptface_dist.generation import Generator, Gradient, Guidance, Sampling, decode
from gptface_dist.generation import sequence as sequences
from gptface_dist.generation.decode import draw, still_masked
from gptface_dist.generation.model import fast_products
from gptface_dist.generation.noise import Noise
from gptface_dist.generation.sequence import Shape, compose

TEXT = "a face hair"
ALL = Guidance(gradient=Gradient(strength=0.5, iterations=2), classifier_free=1.5, rerank=2)


def test_schedule_by_hand() -> None:
    """cos(pi t / 8) of 64 tokens at t = 1 .. 4: 59.1, 45.3, 24.5, 0."""
    left, before = [], 64
    for step in range(1, 5):
        before = still_masked(step, 4, before, 64)
        left.append(before)
    assert left == [59, 45, 24, 0]


@given(total=st.integers(1, 300), steps=st.integers(1, 40))
def test_every_step_commits_a_token_and_the_last_one_all(total: int, steps: int) -> None:
    before = total
    for step in range(1, steps + 1):
        after = still_masked(step, steps, before, total)
        assert 0 <= after < before or before == after == 0
        before = after
    assert before == 0


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5]])
    noise = Noise(1).gumbel(40_000, 5)
    drawn, log_p = draw(logits.expand(40_000, -1), noise, Sampling(temperature=2.0))
    wanted = torch.softmax(logits[0] / 2, -1)
    # Standard error of a share is below 0.0025.
    assert torch.bincount(drawn).numpy() / 40_000 == pytest.approx(wanted.numpy(), abs=0.01)
    assert torch.allclose(log_p.exp(), wanted[drawn])
    best, _ = draw(logits.expand(1000, -1), noise[:1000], Sampling(top_k=2))
    assert set(best.tolist()) == {1, 2}
    certain, _ = draw(logits.expand(1000, -1), noise[:1000], Sampling(temperature=0))
    assert set(certain.tolist()) == {2}


def test_noise_is_gumbel_and_belongs_to_its_key() -> None:
    noise = Noise(3, 1, 0).gumbel(200, 500)
    assert noise.isfinite().all()
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.05)
    assert torch.equal(noise, Noise(3, 1, 0).gumbel(200, 500))
    others = [Noise(*key).gumbel(200, 500) for key in ((3, 0, 1), (3, 1, 1), (4, 1, 0), (31, 0), (3, 10))]
    assert all(abs(float(torch.corrcoef(torch.stack([noise.flatten(), o.flatten()]))[0, 1])) < 0.02 for o in others)


def reference(generator: Generator, text: str, sampling: Sampling, number: int) -> np.ndarray:
    """Unguided decoding in plain Python: codes [4, 4]."""
    model, vocabulary = generator.model, generator.vocabulary
    ids = generator._text.encode(text)
    noise = Noise(sampling.seed, number, 0)
    codes: list[int | None] = [None] * 16
    for step in range(1, sampling.steps + 1):
        image = [vocabulary.mask_id if c is None else vocabulary.image_offset + c for c in codes]
        tokens = torch.tensor([[vocabulary.cls_id, *ids, vocabulary.sep_id, *image, vocabulary.sep_id]])
        n = tokens.shape[1]
        segments = torch.tensor([[1] * (2 + len(ids)) + [2] * 16 + [1]])
        places = [(i, 0) for i in range(2 + len(ids))] + [divmod(i, 4) for i in range(16)] + [(2 + len(ids), 0)]
        with torch.no_grad():
            x = model(tokens, segments, torch.tensor([places]), torch.tensor([n]))
            at = slice(2 + len(ids), 2 + len(ids) + 16)
            logits = model.token_logits(x[0, at], vocabulary.image_range) / sampling.temperature
        a, b = noise.gumbel(16, 16), noise.gumbel(16)
        masked = [i for i in range(16) if codes[i] is None]
        chosen = {i: int((logits[i] + a[i]).argmax()) for i in masked}
        trust = {
            i: float(logits[i].log_softmax(-1)[chosen[i]] + sampling.confidence_noise * (1 - step / sampling.steps) * b[i])
            for i in masked
        }
        keep = len(masked) - (
            0
            if step == sampling.steps
            else min(len(masked) - 1, math.floor(math.cos(math.pi / 2 * step / sampling.steps) * 16))
        )
        for i in sorted(masked, key=lambda i: -trust[i])[:keep]:
            codes[i] = chosen[i]
    return np.array(codes).reshape(4, 4)


def test_decoding_is_what_it_says(generator: Generator) -> None:
    sampling = Sampling(steps=5, temperature=1.3, seed=7)
    drawn = generator.generate(TEXT, 6, sampling)
    for number, picture in enumerate(drawn):
        assert (picture.codes == reference(generator, TEXT, sampling, number)).all()


@pytest.mark.parametrize("guidance", [Guidance(), ALL])
def test_a_sample_does_not_depend_on_the_others(generator: Generator, guidance: Guidance) -> None:
    sampling = Sampling(steps=4, seed=5)
    texts = [TEXT, "a", "a hat", TEXT]
    together = generator.generate(texts, 1, sampling, guidance)
    assert (generator.generate(TEXT, 1, sampling, guidance)[0].codes == together[0].codes).all()
    several = generator.generate(TEXT, 4, sampling, guidance)
    for number in (0, 3):
        assert (several[number].codes == together[number].codes).all()
        assert (several[number].pixels == together[number].pixels).all()
        assert several[number].match == together[number].match


def test_samples_and_seeds_differ(generator: Generator) -> None:
    drawn = generator.generate(TEXT, 3) + generator.generate(TEXT, 3, Sampling(seed=1))
    assert len({picture.codes.tobytes() for picture in drawn}) == 6


def test_full_padded_batches_draw_the_same(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shape of batches on GPUs: unused rows and padding change nothing (float64 leaves no near ties)."""
    wide = Generator(generator.model.double(), generator._text, generator._image, (4, 4))
    try:
        sampling = Sampling(steps=4)
        texts = [TEXT, "a", "a hat and glasses"]
        alone = wide.generate(texts, 2, sampling, ALL)
        monkeypatch.setattr(sequences, "shape_on", lambda device: Shape(4, 16))
        batched = wide.generate(texts, 2, sampling, ALL)
    finally:
        generator.model.float()
    for single, row in zip(alone, batched, strict=True):
        assert (single.codes == row.codes).all()
        assert single.match == pytest.approx(row.match, abs=1e-6)


def test_candidates_fill_batches_together(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """One picture, best of four, in batches of four rows: one batch, and the same best candidate as singly."""
    monkeypatch.setattr(sequences, "shape_on", lambda device: Shape(4, 16))
    decode_batch = decode._decode_batch
    rows: list[int] = []

    def counted(model, requests, *rest):  # type: ignore[no-untyped-def]
        rows.append(len(requests))
        return decode_batch(model, requests, *rest)

    monkeypatch.setattr(decode, "_decode_batch", counted)
    done: list[None] = []
    (best,) = generator.generate(TEXT, 1, Sampling(steps=3), Guidance(rerank=4), lambda: done.append(None))
    assert (rows, len(done)) == ([4], 4)
    firsts = [generator.generate(TEXT, 1, Sampling(steps=3), Guidance(rerank=n))[0].match for n in (1, 2, 3, 4)]
    assert firsts == sorted(firsts), "more candidates, no worse match"
    assert best.match == pytest.approx(firsts[-1])


def test_gpus_multiply_in_tensor_float_32_while_they_draw_and_only_then() -> None:
    before = torch.get_float32_matmul_precision()
    assert before == "highest", "torch's own default: the image tokenizer's codes need it"
    during = []

    def fail() -> None:
        with fast_products(torch.device("cuda", 0)):
            during.append(torch.get_float32_matmul_precision())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert during == ["high"]
    assert torch.get_float32_matmul_precision() == before
    with fast_products(torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == before


def test_sequences_are_laid_out_as_in_training(generator: Generator) -> None:
    """Against the data's own batches."""
    from gptface_dist.data.batch import BatchBuilder, BatchOptions
    from gptface_dist.data.masking import MaskingOptions
    from gptface_dist.data.stream import Block, DecodedSample, Provenance
    from gptface_dist.data.tokens import TokenSample

    codes = np.arange(16, dtype=np.uint16).reshape(4, 4)
    sample = TokenSample(codes, np.array([[5, 9, 2]], dtype=np.int32))
    masking = MaskingOptions(captioning_ratio=0, text_dropout=0)
    build = BatchBuilder(
        generator.vocabulary, (4, 4), 0, masking, BatchOptions(text_length=3, itm_negative_ratio=0, pad_to_multiple_of=1)
    )
    batch = build([Block(0, [DecodedSample(sample, Provenance("s", "0.tar", "k", 0))], [])])
    ours = compose(
        generator.vocabulary, torch.tensor([5, 9, 2]), torch.from_numpy(codes.astype(np.int64)), False, torch.zeros(4, 4) > 0
    )
    assert (ours.segments.numpy() == batch.segments[0]).all()
    assert (ours.positions.numpy() == batch.positions[0]).all()
    whole = np.where(batch.labels[0] >= 0, batch.labels[0], batch.tokens[0])
    assert (ours.tokens.numpy() == whole).all()
    assert ours.text.tolist() == [5, 9, 2]
    assert (ours.image - generator.vocabulary.image_offset).tolist() == list(range(16))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": 0}, "steps"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"seed": -1}, "seed"),
    ],
)
def test_impossible_sampling_is_refused(wrong: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        replace(Sampling(), **wrong)  # type: ignore[arg-type]
