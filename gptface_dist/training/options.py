"""Options of a run that no other part owns."""

from dataclasses import dataclass, field

from gptface_dist.data.options import SourceConfig
from gptface_dist.errors import UserError


@dataclass(frozen=True)
class RunOptions:
    """The run itself."""

    folder: str = "out/run"
    """Where it leaves its metrics, checkpoints and resolved configuration."""
    steps: int = 1000
    """Optimizer steps, those before a resumption included."""
    seed: int = 0
    """Seed of initial weights and dropout (the data has its own: ``data.order.seed``)."""
    init_from: str = ""
    """Folder of a release whose weights the run begins with; once it has a checkpoint, it goes on from that."""
    log_every: int = 10
    """Steps between lines on a log that is no terminal; the journal has every step."""
    timeout_s: float = 600.0
    """Seconds after which a collective that not all ranks reached ends the run; also how long processes wait for each
    other at the start."""

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "timeout_s"):
            if getattr(self, name) <= 0:
                raise UserError(f"run.{name} must be above 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class EvaluationOptions:
    """Held-out data."""

    sources: list[SourceConfig] = field(default_factory=list)
    """Token shards that are not trained on; without any, there is no evaluation."""
    every: int = 100
    """Steps between evaluations; there is one at the end in any case."""
    batches: int = 4
    """Global batches of an evaluation: the same ones each time."""

    def __post_init__(self) -> None:
        if self.every < 1 or self.batches < 1:
            raise UserError(f"evaluation.every and .batches must be at least 1, got {self.every} and {self.batches}")


@dataclass(frozen=True)
class TrackingOptions:
    """mlflow: one run, written by rank 0."""

    mlflow: bool = True
    """Whether to log to mlflow."""
    uri: str = ""
    """Tracking server; empty for ``sqlite:///FOLDER/mlflow.db``."""
    experiment: str = "gptface"
    """Name of the experiment."""
    name: str = ""
    """Name of the run; empty for the name of its folder."""
    every: int = 10
    """Steps between metrics: each is a mean over these steps' values."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"tracking.every must be at least 1, got {self.every}")
