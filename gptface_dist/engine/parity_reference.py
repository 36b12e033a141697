"""The truth of the parity check: the plain model trained in one process in float64; and how far rounding alone leads away."""

import copy
import functools
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from gptface_dist.differences import largest, relative
from gptface_dist.engine.parity_case import VOCABULARY, Case, batches
from gptface_dist.model.dropout import Masks
from gptface_dist.model.parameters import initialise, parameters
from gptface_dist.model.plain import Transformer
from gptface_dist.objectives.objective import CoupledObjective, LossSum
from gptface_dist.parallel.layout import Layout
from gptface_dist.parallel.options import EngineOptions, OptimizerOptions

FLOOR = {"float32": 1e-3, "bfloat16": 0.1}
"""Floor of the denominator of relative errors, by dtype."""
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.1}
"""Largest relative error that needs no excuse, by dtype: see :func:`tolerance`."""
MARGIN = 4
"""Times the plain model's own rounding that a layout may be off: see :func:`tolerance`."""


def plain_losses(case: Case, model: Transformer, step: int) -> list[LossSum]:
    """The objective's losses of the plain model over the global batch of a step, in one process."""
    losses, surveyed = [], []
    for number, batch in enumerate(batches(case, step)):
        masks = Masks(case.seed, step, number * batch.rows)
        features = model.encode(case.objective.embed(model.embeddings, batch), batch.lengths, masks)
        if isinstance(case.objective, CoupledObjective):
            surveyed.append(case.objective.survey(features, batch, model))
        else:
            losses.append(case.objective.losses(features, batch, model, {}))
    if isinstance(case.objective, CoupledObjective):
        return case.objective.coupled_losses({name: torch.cat([each[name] for each in surveyed]) for name in surveyed[0]})
    return [LossSum(*(sum(parts[1:], parts[0]) for parts in zip(*term, strict=True))) for term in zip(*losses, strict=True)]


class Step(NamedTuple):
    """What is compared of an optimizer step."""

    loss: float
    """The global batch's loss."""
    norm: float
    """2-norm of all gradients."""
    gradients: dict[str, Tensor]
    """By parameter, before clipping."""


@functools.lru_cache(maxsize=4)
def reference_steps(case: Case, optimizer: OptimizerOptions, dtype: torch.dtype = torch.float64) -> list[Step]:
    """The plain model's steps. Weights and moments are at least float32; a step computes in ``dtype``, as engines do.

    Cached: cases that differ only in layout and engine options share it if the caller resets these.
    """
    model = case.objective.model(case.model, VOCABULARY)
    initialise(model, case.seed)
    if dtype == torch.float64:
        model = model.double()
    decay = {p.name: optimizer.weight_decay if p.decay else 0.0 for p in parameters(model)}
    adam = torch.optim.AdamW(
        [{"params": [p], "weight_decay": decay[name]} for name, p in model.named_parameters()],
        lr=optimizer.lr,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.eps,
    )
    steps = []
    for step in range(case.steps):
        rounded = copy.deepcopy(model).to(dtype)
        losses = zip(plain_losses(case, rounded, step), case.objective.weights.values(), strict=True)
        loss = sum((weight * each.loss / max(1, each.items) for each, weight in losses), torch.zeros(()))
        loss.backward()
        for parameter, source in zip(model.parameters(), rounded.parameters(), strict=True):
            parameter.grad = None if source.grad is None else source.grad.to(parameter.dtype)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer.max_grad_norm)
        adam.step()
        steps.append(Step(loss.item(), norm.item(), gradients))
    return steps


def gradient_error(gradient: Tensor, truth: Tensor, norm: float, floor: float) -> float:
    """``|g - w| / max(|w|, floor norm)`` in the 2-norm, ``norm`` being that of all gradients.

    The floor is for parameters whose true gradient vanishes (a bias before a softmax that ignores it).
    """
    truth = truth.double()
    return float((gradient.double() - truth).norm()) / max(float(truth.norm()), floor * norm)


def rounding(case: Case, optimizer: OptimizerOptions) -> float:
    """Largest error of the plain model itself in the dtype of the case: of its loss, norm and gradients, over all steps."""
    plain, dtype, floor = without_layout(case), getattr(torch, case.engine.dtype), FLOOR[case.engine.dtype]
    worst = 0.0
    steps = zip(reference_steps(plain, optimizer, dtype), reference_steps(plain, optimizer), strict=True)
    for rounded, truth in steps:
        errors = [worst, relative(rounded.loss, truth.loss), relative(rounded.norm, truth.norm)]
        errors += [gradient_error(rounded.gradients[key], truth.gradients[key], truth.norm, floor) for key in truth.gradients]
        worst = largest(errors)
    return worst


def tolerance(case: Case, own: float) -> float:
    """Largest relative error that rounding explains, where ``own`` is the plain model's (:func:`rounding`).

    A layout adds the same rounded products in another order. Its error and the plain model's are then two draws of one size,
    each a vector of at least a few elements: that one is :data:`MARGIN` times as long as the other is rare (for 8 normal
    elements each, F(8, 8) > 16 in 4 of 10,000 draws), and both are the largest of many. A gradient that is not the right one
    (a part left out, counted twice, or of other data) is off by far more. Where ``own`` is tiny, :data:`TOLERANCE` holds.
    """
    return case.tolerance or largest([TOLERANCE[case.engine.dtype], MARGIN * own])


def without_layout(case: Case) -> Case:
    """The same for all cases that differ in layout, engine options and tolerance."""
    return replace(case, layout=Layout(zero=0), engine=EngineOptions(), tolerance=None)
