"""Guidance: strength 0 is none, the gradient is the loss's, and p(match) rises."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from gptface_dist.errors import UserError
from gptface_dist.generation import Generator, Gradient, Guidance, Sampling
from gptface_dist.generation.guidance import guidance_shift
from gptface_dist.generation.model import logits_of
from gptface_dist.generation.sequence import compose, stack
from gptface_dist.sequence import PaddedBatch

TEXT = "a face hair"
SAMPLING = Sampling(steps=4, seed=2)


def masked(generator: Generator, visible: int = 5) -> tuple[PaddedBatch, torch.Tensor, torch.Tensor]:
    """A sequence most of whose image is masked: as a batch, bool [1, L] of the masked tokens, and their logits."""
    codes = torch.arange(16).view(4, 4)
    wanted = codes >= visible
    sequence = compose(generator.vocabulary, torch.tensor([5, 9, 2]), codes, False, wanted)
    batch = stack([sequence], torch.device("cpu"))
    hidden = sequence.wanted.unsqueeze(0)
    batch.tokens[hidden] = generator.vocabulary.mask_id
    with torch.no_grad():
        return batch, hidden, logits_of(generator.model, batch, hidden, generator.vocabulary.image_range)


def relaxed(generator: Generator, batch: PaddedBatch, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """log p(match) with the masked tokens' embeddings averaged, in plain PyTorch."""
    model, ids = generator.model, generator.vocabulary.image_range
    e = model.embeddings
    words = e.word(batch.tokens).clone()
    words[hidden] = logits.softmax(-1) @ e.word.weight[ids.start : ids.stop]
    first, second = batch.positions.unbind(-1)
    image = batch.segments == 2
    places = torch.where(
        image[..., None], e.row(first.clamp(max=3)) + e.column(second), e.text_position(torch.where(image, first * 0, first))
    )
    features = model.encode(words + e.segment(batch.segments) + places, batch.lengths)
    return functional.log_softmax(model.itm_logits(features), -1)[0, 1]


def test_strength_zero_is_exactly_unguided(generator: Generator) -> None:
    plain = generator.generate(TEXT, 4, SAMPLING)
    zero = Guidance(gradient=Gradient(strength=0, iterations=7, kl=3.0, fusion=0.1), classifier_free=0, rerank=1)
    for unguided, guided in zip(plain, generator.generate(TEXT, 4, SAMPLING, zero), strict=True):
        assert (unguided.codes == guided.codes).all()
        assert (unguided.pixels == guided.pixels).all()


def test_gradient_is_that_of_the_loss(generator: Generator) -> None:
    """One small step goes along the gradient, measured by central differences in float64."""
    generator.model.double()
    try:
        batch, hidden, logits = masked(generator)
        logits = logits.double()
        options = Gradient(strength=1.0, iterations=1, kl=0.0, fusion=1.0)
        step = guidance_shift(generator.model, batch, hidden, logits, generator.vocabulary.image_range, options)
        random, eps = torch.Generator().manual_seed(0), 1e-5
        with torch.no_grad():
            measured = []
            for _ in range(8):
                way = torch.randn(logits.shape, generator=random, dtype=torch.float64)
                up, down = (relaxed(generator, batch, hidden, logits + s * eps * way) for s in (1, -1))
                measured.append((float((up - down) / (2 * eps)), float((step * way).sum())))
    finally:
        generator.model.float()
    slopes, projections = np.array(measured).T
    # The step is the gradient up to one positive factor.
    assert slopes / np.linalg.norm(slopes) == pytest.approx(projections / np.linalg.norm(projections), abs=1e-4)
    assert float(step.square().mean().sqrt()) == pytest.approx(1.0)


def test_guidance_raises_the_match_and_the_divergence_holds_it_back(generator: Generator) -> None:
    batch, hidden, logits = masked(generator)
    ids = generator.vocabulary.image_range
    with torch.no_grad():
        before = relaxed(generator, batch, hidden, logits)

    def after(options: Gradient) -> tuple[float, float]:
        shift = guidance_shift(generator.model, batch, hidden, logits, ids, options)
        changed = (logits + shift).log_softmax(-1)
        divergence = (changed.exp() * (changed - logits.log_softmax(-1))).sum()
        with torch.no_grad():
            return float(relaxed(generator, batch, hidden, logits + shift) - before), float(divergence)

    gains = [after(Gradient(strength=strength, iterations=5)) for strength in (0.05, 0.2, 0.5)]
    assert 0 < gains[0][0] < gains[1][0] < gains[2][0]
    free, anchored = (after(Gradient(strength=0.2, iterations=5, kl=kl)) for kl in (0.0, 10.0))
    assert anchored[1] < free[1]
    assert after(Gradient(strength=0.5, fusion=0.0)) == (0, 0)


def test_guided_pictures_match_better(generator: Generator) -> None:
    plain = [picture.match for picture in generator.generate(TEXT, 12, SAMPLING)]
    guided = generator.generate(TEXT, 12, SAMPLING, Guidance(gradient=Gradient(strength=1.0)))
    assert np.mean([picture.match for picture in guided]) > np.mean(plain) + 0.05


def test_rerank_keeps_the_best_of_candidates_of_which_the_first_is_unguided(generator: Generator) -> None:
    plain = generator.generate(TEXT, 5, SAMPLING)
    matches = [generator.generate(TEXT, 5, SAMPLING, Guidance(rerank=count)) for count in (1, 2, 6)]
    for number, picture in enumerate(plain):
        scores = [drawn[number].match for drawn in matches]
        assert scores[0] == picture.match
        assert scores[0] <= scores[1] <= scores[2]
        assert generator.score(matches[2][number], TEXT) == scores[2], "the match is that of the whole picture"
    assert any(matches[2][number].match > picture.match for number, picture in enumerate(plain))


def test_classifier_free_guidance_moves_away_from_what_comes_without_the_text(generator: Generator) -> None:
    """All at once and the likeliest: the codes are the argmax of c + s (c - u)."""
    once = Sampling(steps=1, temperature=0)
    ids = torch.tensor(generator._text.encode(TEXT))
    logits = []
    for text in (ids, ids[:0]):
        sequence = compose(generator.vocabulary, text, torch.zeros(4, 4, dtype=torch.int64), False, torch.ones(4, 4) > 0)
        batch = stack([sequence], torch.device("cpu"))
        hidden = sequence.wanted.unsqueeze(0)
        batch.tokens[hidden] = generator.vocabulary.mask_id
        with torch.no_grad():
            logits.append(logits_of(generator.model, batch, hidden, generator.vocabulary.image_range))
    with_text, without = logits
    for strength in (0.0, 0.5, 3.0):
        drawn = generator.generate(TEXT, 1, once, Guidance(classifier_free=strength))[0]
        wanted = (with_text + strength * (with_text - without)).argmax(-1)
        assert drawn.codes.reshape(-1).tolist() == wanted.tolist()
    assert (with_text - without).abs().max() > 0.1


def test_captions_are_guided_too(generator: Generator) -> None:
    picture = generator.generate(TEXT)[0]
    plain, guided = (
        np.mean([c.match for c in generator.caption(picture, 8, SAMPLING, Guidance(gradient=Gradient(strength=s)), [6])])
        for s in (0.0, 1.0)
    )
    assert guided > plain
    with pytest.raises(UserError, match="classifier-free guidance draws pictures"):
        generator.caption(picture, guidance=Guidance(classifier_free=1.0))


@pytest.mark.parametrize("wrong", [{"strength": -1.0}, {"iterations": 0}, {"kl": float("inf")}, {"fusion": 1.5}])
def test_impossible_gradients_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        Gradient(**wrong)  # type: ignore[arg-type]


def test_impossible_guidance_is_refused() -> None:
    with pytest.raises(UserError, match="rerank"):
        Guidance(rerank=0)
    with pytest.raises(UserError, match="classifier_free"):
        Guidance(classifier_free=-0.1)
