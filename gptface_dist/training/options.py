"""Options of a run that no other part owns."""

from dataclasses import dataclass, field

from gptface_dist.data.options import SourceConfig
from gptface_dist.errors import UserError
from gptface_dist.kernels.attention.options import HEAD_SIZES
from gptface_dist.model.attention import AttentionOptions


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
    """Folder of a release whose weights the run begins with; once it has a checkpoint, it resumes from that."""
    ema_decay: float = 0.0
    """Keep an exponential moving average of the weights, ``ema <- decay * ema + (1 - decay) * weights`` after each step; 0 for
    none."""
    log_every: int = 10
    """Steps between lines on a log that is no terminal; the metrics file has every step."""
    timeout_s: float = 600.0
    """Seconds after which a collective that not all ranks reached ends the run; also how long processes wait for each
    other at the start."""

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "timeout_s"):
            if getattr(self, name) <= 0:
                raise UserError(f"run.{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"run.ema_decay must be at least 0 and below 1, got {self.ema_decay}")


@dataclass(frozen=True)
class EvaluationOptions:
    """Held-out data."""

    sources: list[SourceConfig] = field(default_factory=list)
    """Token shards that are not trained on; without any, there is no evaluation."""
    interval: int = 100
    """Steps between evaluations; there is one at the end in any case."""
    batches: int = 4
    """Global batches of an evaluation: the same ones each time."""

    def __post_init__(self) -> None:
        if self.interval < 1 or self.batches < 1:
            raise UserError(f"evaluation.interval and .batches must be at least 1, got {self.interval} and {self.batches}")


@dataclass(frozen=True)
class AttentionHealthOptions:
    """Reports on how FP8 attention fares in each layer (docs/attention.md), whichever attention computes."""

    interval: int = 0
    """Steps between reports; 0 makes none."""
    sequences: int = 2
    """Sequences that a report looks at: the first of the step's global batch, at most one micro-batch."""
    fall_back: float | None = None
    """A layer whose FP8 output or gradients differ from bf16's by more than this part (root mean square) goes on without FP8
    for the rest of the run; null: none does."""

    def __post_init__(self) -> None:
        if self.interval < 0 or self.sequences < 1:
            raise UserError(
                f"attention_health.interval must be at least 0 and .sequences at least 1, got {self.interval} and "
                f"{self.sequences}"
            )
        if self.fall_back is not None and self.fall_back <= 0:
            raise UserError(f"attention_health.fall_back must be above 0 or null, got {self.fall_back}")
        if self.fall_back is not None and self.interval == 0:
            raise UserError("attention_health.fall_back needs reports to judge by: set attention_health.interval above 0")

    def check(self, attention: AttentionOptions, head_size: int) -> None:
        """:class:`UserError` where reports are asked for and cannot be, or nothing is there to fall back from."""
        if self.interval and head_size > HEAD_SIZES[-1]:
            raise UserError(f"attention_health.interval: FP8 has heads of up to {HEAD_SIZES[-1]}, the model of {head_size}")
        if self.fall_back is not None and not attention.may_be_fp8:
            raise UserError(
                f"attention_health.fall_back {self.fall_back}: engine.attention.kernel {attention.kernel} never takes FP8; "
                "set the kernel to fp8, or fall_back to null"
            )


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
    interval: int = 10
    """Steps between metrics: each is a mean over these steps' values."""

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise UserError(f"tracking.interval must be at least 1, got {self.interval}")
