"""The objective whose batch carries pixels, which only these tests have."""

import torch

from gptface_dist.engine import parity_case
from gptface_dist.engine.parity_case import MODEL, VOCABULARY, Case
from gptface_dist.model.parameters import initialise
from gptface_dist.parallel.layout import Layout
from tests.objectives.pixels import PixelMilm, unseen


def test_the_pixels_are_seen() -> None:
    objective, case = PixelMilm(), Case(Layout(zero=0), objective=PixelMilm())
    model = objective.model(MODEL, VOCABULARY)
    initialise(model, 0)
    batch = parity_case.batches(case, 0)[0]
    assert not torch.equal(objective.embed(model.embeddings, batch), unseen(objective, model.embeddings, batch))
    table = {entry.name: entry for entry in objective.parameters(MODEL, VOCABULARY)}
    assert table["embeddings.patches.weight"].on_first_stage
