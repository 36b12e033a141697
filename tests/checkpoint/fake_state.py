"""A small training state in one process, without an engine: two tensors, cut in odd places."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from gptface_dist.checkpoint.folder import FOLDER_NAME
from gptface_dist.checkpoint.load import load
from gptface_dist.checkpoint.local_shard import Region
from gptface_dist.checkpoint.pieces import collect
from gptface_dist.checkpoint.record import RunRecord
from gptface_dist.checkpoint.save import Content, save
from gptface_dist.distributed.collectives import RankGroup
from gptface_dist.model.parameters import Parameter

MATRIX = Parameter("matrix", (13, 7), None, None, None, 0.0, True, False)
VECTOR = Parameter("vector", (11,), None, None, None, 0.0, False, False)
BUCKET = 20


@dataclass
class FakeState:
    """Satisfies :class:`gptface_dist.checkpoint.local_shard.State`; every number in it is ``value`` or its place plus that."""

    value: float = 0.0
    average: bool = False
    parameters: tuple[Parameter, ...] = (MATRIX, VECTOR)
    updates: int = 0
    refreshed: int = 0
    held: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kinds = ("weights", "moment1", "moment2") + ("average",) * self.average
        for number, kind in enumerate(kinds):
            self.held[kind] = {p.name: torch.arange(torch.Size(p.shape).numel()) + self.value + number for p in self.parameters}

    def regions(self) -> list[Region]:
        """Each parameter in two ranges."""
        found = []
        for p in self.parameters:
            numel = torch.Size(p.shape).numel()
            for held in (range(numel // 3), range(numel // 3, numel)):
                values = {kind: tensors[p.name][held.start : held.stop] for kind, tensors in self.held.items()}
                found.append(Region(p, p.shape, 0, 1, held, held, values))
        return found

    def refresh(self) -> None:
        """Counts."""
        self.refreshed += 1

    def begin_average(self) -> None:
        """Copies."""
        self.held["average"] = {name: tensor.clone() for name, tensor in self.held["weights"].items()}

    def equals(self, other: "FakeState") -> bool:
        """Whether all numbers are the same."""
        return self.held.keys() == other.held.keys() and all(
            torch.equal(tensor, other.held[kind][name])
            for kind, tensors in self.held.items()
            for name, tensor in tensors.items()
        )


def tiny(value: float) -> FakeState:
    """A state of a few numbers, which is written fast."""
    return FakeState(value, parameters=(VECTOR,))


def record(step: int) -> RunRecord:
    """Of a run of no model."""
    return RunRecord(step, step, {"step": step}, {"model": {}}, {})


def write(run: Path, state: FakeState, step: int) -> Path:
    """Save a state as a run would."""
    pieces = collect(state.regions(), written=True, bucket=BUCKET)
    return save(run / FOLDER_NAME, Content(pieces, record(step), {"reference.safetensors": b"reference"}), RankGroup())


def read(path: Path, state: FakeState) -> FakeState:
    """What a checkpoint holds, read into a state of the same parameters."""
    load(path, state, RankGroup())
    return state
