"""Parity's cases of objectives other than the first: coupled over the global batch, and with more than tokens to read."""

import dataclasses

from gptface_dist.engine.parity_case import MODEL, Case
from gptface_dist.objectives.contrastive import Contrastive
from gptface_dist.parallel.layout import Layout
from gptface_dist.parallel.options import EngineOptions
from tests.objectives.pixels import PixelMilm

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
