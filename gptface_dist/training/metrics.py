"""The metrics of a run: their names, and ``metrics.jsonl``, a line of JSON for every step and every evaluation."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from gptface_dist.errors import UserError
from gptface_dist.objectives.objective import Objective

NAME = "metrics.jsonl"
LOSS, ACCURACY, CONSTANT_GUESS = "loss/", "accuracy/", "constant_guess/"
"""Before a term's name: its mean loss (nats), the share predicted right, and the least loss of the same guess for all."""


def loss_metrics(objective: Objective, sums: Tensor) -> dict[str, float]:
    """Mean losses (nats) and accuracies of ``sums`` [terms, 3] on the host; those without items are left out."""
    record: dict[str, float] = {}
    for term, (loss, correct, count) in zip(objective.terms, sums.tolist(), strict=True):
        if count:
            record |= {f"{LOSS}{term.name}": loss / count, f"{ACCURACY}{term.name}": correct / count}
    return record


def terms(records: Iterable[Mapping[str, float]]) -> list[str]:
    """Names of the terms that records have losses of, in the order in which they first come."""
    names = (key.removeprefix(LOSS) for record in records for key in record if key.startswith(LOSS))
    return list(dict.fromkeys(names))


def read_metrics(folder: Path, kind: str = "train") -> list[dict[str, float]]:
    """A run's metrics of ``train`` steps or ``evaluation``s, in order.

    :class:`UserError` where the folder holds none, or not those of a run.
    """
    try:
        records = [json.loads(line) for line in whole_lines(folder / NAME)]
        return [record for record in records if record["kind"] == kind]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} holds no metrics of a run ({NAME}): {error}") from None


def whole_lines(path: Path) -> list[str]:
    """Lines of a file whose writer may have been killed within the last one."""
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
