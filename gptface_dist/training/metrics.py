"""The metrics of a run: their names, and ``metrics.jsonl``, a line of JSON for every step and every evaluation."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from gptface_dist.errors import UserError
from gptface_dist.objectives.objective import Objective

NAME = "metrics.jsonl"
LOSS, ACCURACY, CONSTANT_GUESS = "loss/", "accuracy/", "constant_guess/"
"""Prefixes of a term's name: mean loss (nats), accuracy in [0, 1], and least loss of one constant prediction (nats)."""


def loss_metrics(objective: Objective, sums: Tensor) -> dict[str, float]:
    """Mean losses (nats) and accuracies of ``sums`` [terms, 3] on the host; terms without items are left out."""
    record: dict[str, float] = {}
    for term, (loss, correct, count) in zip(objective.terms, sums.tolist(), strict=True):
        if count:
            record |= {f"{LOSS}{term.name}": loss / count, f"{ACCURACY}{term.name}": correct / count}
    return record


def terms(records: Iterable[Mapping[str, float]]) -> list[str]:
    """Names of the terms with losses in records, by first appearance."""
    names = (key.removeprefix(LOSS) for record in records for key in record if key.startswith(LOSS))
    return list(dict.fromkeys(names))


def read_metrics(folder: Path, kind: str = "train") -> list[dict[str, float]]:
    """Metrics of a run's ``train`` steps or ``evaluation``s, in order.

    :class:`UserError` if the folder has no readable ``metrics.jsonl``.
    """
    try:
        records = [json.loads(line) for line in whole_lines(folder / NAME)]
        return [record for record in records if record["kind"] == kind]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} holds no metrics of a run ({NAME}): {error}") from None


def whole_lines(path: Path) -> list[str]:
    """Complete lines of a file; a killed writer may have left a partial last one."""
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
