"""Options of run, evaluation, attention reports and tracking."""

from dataclasses import dataclass, field

from gptface_dist.data.options import SourceConfig
from gptface_dist.errors import UserError
from gptface_dist.kernels.attention.options import HEAD_SIZES
from gptface_dist.model.attention import AttentionOptions


@dataclass(frozen=True)
class RunOptions:
    """Folder, length, seed and logging of a run."""

    folder: str = "out/run"
    """Folder for metrics, checkpoints and the resolved configuration."""
    steps: int = 1000
    """Optimizer steps, including those before resuming."""
    seed: int = 0
    """Seed of initial weights and dropout (for data see ``data.order.seed``)."""
    init_from: str = ""
    """Folder of a release with the initial weights; a run that has a checkpoint resumes from that instead."""
    ema_decay: float = 0.0
    """Keep an exponential moving average of the weights, ``ema <- decay * ema + (1 - decay) * weights`` after each step; 0:
    no average."""
    log_every: int = 10
    """Steps between log lines if stderr is no terminal; ``metrics.jsonl`` has every step."""
    timeout_s: float = 600.0
    """Seconds until an incomplete collective ends the run; also the timeout of the rendezvous at the start."""

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "timeout_s"):
            if getattr(self, name) <= 0:
                raise UserError(f"run.{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"run.ema_decay must be at least 0 and below 1, got {self.ema_decay}")


@dataclass(frozen=True)
class EvaluationOptions:
    """Evaluation on held-out data."""

    sources: list[SourceConfig] = field(default_factory=list)
    """Token shards of held-out data; none: no evaluation."""
    interval: int = 100
    """Steps between evaluations; the run ends with one in any case."""
    batches: int = 4
    """Global batches of an evaluation, the same ones each time."""

    def __post_init__(self) -> None:
        if self.interval < 1 or self.batches < 1:
            raise UserError(f"evaluation.interval and .batches must be at least 1, got {self.interval} and {self.batches}")


@dataclass(frozen=True)
class AttentionHealthOptions:
    """Reports on the error of FP8 attention in each layer (docs/attention.md), whichever kernel training uses."""

    interval: int = 0
    """Steps between reports; 0: no reports."""
    sequences: int = 2
    """Sequences in a report: the first of the step's global batch, at most one micro-batch."""
    fall_back: float | None = None
    """Largest relative error (root mean square) of a layer's FP8 output or gradients against bf16; a layer above it uses no
    FP8 for the rest of the run. null: no limit."""

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
        """Raise :class:`UserError` for reports on too large heads, or a ``fall_back`` without FP8 attention."""
        if self.interval and head_size > HEAD_SIZES[-1]:
            raise UserError(f"attention_health.interval: FP8 has heads of up to {HEAD_SIZES[-1]}, the model of {head_size}")
        if self.fall_back is not None and not attention.may_be_fp8:
            raise UserError(
                f"attention_health.fall_back {self.fall_back}: engine.attention.kernel {attention.kernel} never takes FP8; "
                "set the kernel to fp8, or fall_back to null"
            )


@dataclass(frozen=True)
class TrackingOptions:
    """Tracking with mlflow: one mlflow run, written by rank 0."""

    mlflow: bool = True
    """Whether to log to mlflow."""
    uri: str = ""
    """Tracking server; empty for ``sqlite:///FOLDER/mlflow.db``."""
    experiment: str = "gptface"
    """Name of the mlflow experiment."""
    name: str = ""
    """Name of the mlflow run; empty for the name of the run's folder."""
    interval: int = 10
    """Steps between logged metrics, each the mean over these steps."""

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise UserError(f"tracking.interval must be at least 1, got {self.interval}")
