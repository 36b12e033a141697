"""The configuration of a run: each part's dataclass stands beside the code that obeys it; this module joins them."""

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
    """A whole run."""

    data: DataConfig
    """What it reads."""
    model: ModelOptions = field(default_factory=ModelOptions)
    """What is trained; in a file also the name of another one, relative to it: ``model: models/base.yaml``."""
    layout: Layout = field(default_factory=Layout)
    """How it is laid out over processes."""
    engine: EngineOptions = field(default_factory=EngineOptions)
    """How a step is computed."""
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    """AdamW and clipping."""
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    """What is trained."""
    loss: dict[str, float] = field(default_factory=dict)
    """Weights of the objective's terms by name; 1 where none is given."""
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    """The learning rate over time."""
    run: RunOptions = field(default_factory=RunOptions)
    """Length, seed and place of the run."""
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    """When it is saved, and what it resumes from."""
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    """Held-out data."""
    attention_health: AttentionHealthOptions = field(default_factory=AttentionHealthOptions)
    """Reports on FP8 attention."""
    tracking: TrackingOptions = field(default_factory=TrackingOptions)
    """mlflow."""

    def __post_init__(self) -> None:
        self.schedule.check(self.run.steps)
        # Written out: a run's folder keeps the weights that it was trained with.
        object.__setattr__(self, "loss", dict(self.build_objective().weights))

    def build_objective(self) -> Objective:
        """What is trained, with the weights of its terms."""
        return build_objective(self.objective, self.loss)
