"""The configuration of a run: this module joins the option dataclasses of all parts."""

from dataclasses import dataclass, field

from gptface_dist.checkpoint.options import CheckpointOptions
from gptface_dist.data.options import DataConfig
from gptface_dist.model.options import ModelOptions
from gptface_dist.objectives.objective import Objective
from gptface_dist.objectives.registry import ObjectiveOptions, build_objective
from gptface_dist.parallel.layout import Layout
from gptface_dist.parallel.options import EngineOptions, OptimizerOptions
from gptface_dist.training.options import AttentionHealthOptions, EvaluationOptions, RunOptions, TrackingOptions
from gptface_dist.training.schedule import ScheduleOptions


@dataclass(frozen=True)
class Config:
    """All options of a run, as in its YAML file."""

    data: DataConfig
    """Data sources, batches and masking."""
    model: ModelOptions = field(default_factory=ModelOptions)
    """Size and form of the model; a file may name another one, relative to it: ``model: models/base.yaml``."""
    layout: Layout = field(default_factory=Layout)
    """Parallelism over processes."""
    engine: EngineOptions = field(default_factory=EngineOptions)
    """Precision, kernels and recomputation."""
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    """AdamW and gradient clipping."""
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    """Training objective."""
    loss: dict[str, float] = field(default_factory=dict)
    """Weights of the objective's terms by name; 1 by default."""
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    """Learning rate schedule."""
    run: RunOptions = field(default_factory=RunOptions)
    """Length, seed and folder of the run."""
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    """When the run is saved, and what it resumes from."""
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    """Evaluation on held-out data."""
    attention_health: AttentionHealthOptions = field(default_factory=AttentionHealthOptions)
    """Reports on FP8 attention."""
    tracking: TrackingOptions = field(default_factory=TrackingOptions)
    """Tracking with mlflow."""

    def __post_init__(self) -> None:
        # With defaults filled in: the run's folder keeps the weights of its terms.
        object.__setattr__(self, "loss", dict(self.build_objective().weights))

    @property
    def schedule_steps(self) -> int:
        """Length of the learning rate schedule."""
        return self.schedule.total_steps or self.run.steps

    def build_objective(self) -> Objective:
        """The training objective, with the weights of its terms."""
        return build_objective(self.objective, self.loss)
