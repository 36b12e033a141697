"""A small training state in one process, without an engine: two tensors, cut in odd places."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from gptface_dist.checkpoint.folder import FOLDER_NAME
from gptface_dist.checkpoint.load import load_checkpoint
from gptface_dist.checkpoint.local_shard import LocalShard
from gptface_dist.checkpoint.record import RunRecord
from gptface_dist.checkpoint.save import Content, save_checkpoint
from gptface_dist.checkpoint.tensor_shards import collect_shards
from gptface_dist.distributed.collectives import RankGroup
from gptface_dist.model.parameters import ParameterSpec

MATRIX = ParameterSpec("matrix", (13, 7), None, None, None, 0.0, True, False)
VECTOR = ParameterSpec("vector", (11,), None, None, None, 0.0, False, False)
BUCKET = 20


@dataclass
class FakeState:
    """An ``OptimizerStateView``: every number in it is ``value`` or its place plus that."""

    value: float = 0.0
    ema: bool = False
    parameters: tuple[ParameterSpec, ...] = (MATRIX, VECTOR)
    updates: int = 0
    refreshed: int = 0
    held: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kinds = ("weights", "exp_avg", "exp_avg_sq") + ("ema",) * self.ema
        for number, kind in enumerate(kinds):
            self.held[kind] = {p.name: torch.arange(torch.Size(p.shape).numel()) + self.value + number for p in self.parameters}

    def local_shards(self) -> list[LocalShard]:
        """Each parameter in two ranges."""
        found = []
        for p in self.parameters:
            numel = torch.Size(p.shape).numel()
            for held in (range(numel // 3), range(numel // 3, numel)):
                values = {kind: tensors[p.name][held.start : held.stop] for kind, tensors in self.held.items()}
                found.append(LocalShard(p, p.shape, 0, 1, held, held, values))
        return found

    def refresh(self) -> None:
        """Counts."""
        self.refreshed += 1

    def begin_ema(self) -> None:
        """Copies."""
        self.held["ema"] = {name: tensor.clone() for name, tensor in self.held["weights"].items()}

    def equals(self, other: "FakeState") -> bool:
        """Whether all numbers are the same."""
        return self.held.keys() == other.held.keys() and all(
            torch.equal(tensor, other.held[kind][name])
            for kind, tensors in self.held.items()
            for name, tensor in tensors.items()
        )


def tiny(value: float) -> FakeState:
    """A state of a few numbers, which is written fast."""
    return FakeState(float(value), parameters=(VECTOR,))


def record(step: int) -> RunRecord:
    """Of a run of no model."""
    return RunRecord(step, step, {"step": step}, {"model": {}}, {})


def write(run: Path, state: FakeState, step: int) -> Path:
    """Save a state as a run would."""
    pieces = collect_shards(state.local_shards(), written=True, bucket=BUCKET)
    return save_checkpoint(
        run / FOLDER_NAME, Content(pieces, record(step), {"reference.safetensors": b"reference"}), RankGroup()
    )


def read(path: Path, state: FakeState) -> FakeState:
    """What a checkpoint holds, read into a state of the same parameters."""
    load_checkpoint(path, state, RankGroup())
    return state
