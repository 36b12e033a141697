"""The objectives there are, by name."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from gptface_dist.errors import UserError, check_one_of
from gptface_dist.objectives.objective import Objective

OBJECTIVES = {"milm_itm": "MilmItm", "contrastive": "Contrastive"}
"""Name of the file in this folder, which is the objective's name -> its class."""


@dataclass(frozen=True)
class ObjectiveOptions:
    """Which objective, and its own options."""

    name: str = "milm_itm"
    """One of :data:`OBJECTIVES`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of the objective's class."""


def build_objective(chosen: ObjectiveOptions, weights: Mapping[str, float]) -> Objective:
    """The objective with its options and the weights of its terms.

    :class:`UserError` for a name, option or term that there is not; it lists those there are.
    """
    check_one_of("objective.name", chosen.name, OBJECTIVES)
    module = importlib.import_module(f"gptface_dist.objectives.{chosen.name}")
    kind: type[Objective] = getattr(module, OBJECTIVES[chosen.name])
    known = [each.name for each in fields(kind) if each.name != "weights"]
    for name in chosen.options:
        if name not in known:
            there = ", ".join(known) or "none"
            raise UserError(f"objective.options.{name} is no option of the objective {chosen.name}: there are {there}")
    try:
        return kind(weights=dict(weights), **chosen.options)
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"objective.options of {chosen.name}: {error}") from None
