"""Objectives other than the first against the plain model: coupled over the global batch, and with more than tokens to read."""

import dataclasses

import pytest
import torch

from gptface_dist.engine import parity_case
from gptface_dist.engine.parity import ParityResult, run_parity
from gptface_dist.engine.parity_case import MODEL, VOCABULARY, Case
from gptface_dist.model.parameters import initialise
from gptface_dist.objectives.contrastive import Contrastive
from gptface_dist.parallel.layout import Layout
from gptface_dist.parallel.options import EngineOptions
from tests.objectives.pixels import PixelMilm, unseen

TWO_LAYERS = dataclasses.replace(MODEL, layers=2)
DROPOUT = dataclasses.replace(TWO_LAYERS, hidden_dropout=0.2, attention_dropout=0.1)
# Every axis, every stage of ZeRO, dropout and recomputation, and the same global batch in other micro-batches.
CONTRASTIVE = [
    *(Case(Layout(zero=0), micro_batches=16 // size, size=size) for size in (1, 4, 16)),
    Case(Layout(dp=2, zero=0), model=DROPOUT, micro_batches=4, size=4, engine=EngineOptions(recompute="layer")),
    Case(Layout(dp=2, zero=2), micro_batches=8, size=2),
    Case(Layout(tp=2, sp=True, zero=0), micro_batches=4, size=4),
    Case(Layout(dp=2, pp=2, zero=1), model=DROPOUT, micro_batches=4, size=4),
    Case(Layout(pp=2, vpp=2, zero=1), micro_batches=4, size=4),
    Case(Layout(dp=2, pp=2, zero=3), micro_batches=4, size=4),
    Case(Layout(dp=4, zero=3, reshard_after_forward=False), model=TWO_LAYERS, micro_batches=4, size=4),
    Case(Layout(dp=2, tp=2, pp=2, vpp=2, sp=True, zero=3), micro_batches=4, size=4),
]
PIXELS = [
    Case(Layout(dp=2, pp=2, zero=1), model=TWO_LAYERS, micro_batches=4),
    Case(Layout(tp=2, pp=2, sp=True, zero=3), model=TWO_LAYERS, micro_batches=4),
]
CASES = [
    *(dataclasses.replace(case, objective=Contrastive(), steps=2) for case in CONTRASTIVE),
    *(dataclasses.replace(case, objective=PixelMilm(), steps=2) for case in PIXELS),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[ParityResult]:
    return run_parity(CASES, tmp_path_factory.mktemp("parity") / "results.jsonl")


def test_they_compute_what_the_plain_model_computes(results: list[ParityResult]) -> None:
    ordered = sorted(CASES, key=lambda case: case.layout.world)
    assert [result.layout for result in results] == [str(case) for case in ordered]
    assert [result for result in results if not result.ok()] == []
    assert all(result.loss < 1e-6 for result in results)


def test_micro_batches_do_not_change_the_contrast(results: list[ParityResult]) -> None:
    """The same samples, in 16, 4 and 1 micro-batches."""
    losses = [result.losses for result in results if result.layout == f"contrastive, {Layout(zero=0)}"]
    assert len(losses) == 3
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-6)


def test_the_pixels_are_seen() -> None:
    objective, case = PixelMilm(), Case(Layout(zero=0), objective=PixelMilm())
    model = objective.model(MODEL, VOCABULARY)
    initialise(model, 0)
    batch = parity_case.batches(case, 0)[0]
    assert not torch.equal(objective.embed(model.embeddings, batch), unseen(objective, model.embeddings, batch))
    table = {entry.name: entry for entry in objective.parameters(MODEL, VOCABULARY)}
    assert table["embeddings.patches.weight"].on_first_stage
