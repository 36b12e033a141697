"""The configuration of a run: each part's dataclass stands beside the code that obeys it; this module joins them."""

from dataclasses import dataclass, field

from gptface_dist.checkpoint.options import CheckpointOptions
from gptface_dist.data.options import DataConfig
from gptface_dist.model.options import ModelOptions
from gptface_dist.parallel.layout import Layout
from gptface_dist.parallel.options import EngineOptions, LossWeights, OptimizerOptions
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
    loss: LossWeights = field(default_factory=LossWeights)
    """What the three losses weigh."""
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    """The learning rate over time."""
    run: RunOptions = field(default_factory=RunOptions)
    """Length, seed and place of the run."""
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    """When it is saved, and what it goes on from."""
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    """Held-out data."""
    attention_health: AttentionHealthOptions = field(default_factory=AttentionHealthOptions)
    """Reports on FP8 attention."""
    tracking: TrackingOptions = field(default_factory=TrackingOptions)
    """mlflow."""

    def __post_init__(self) -> None:
        self.schedule.check(self.run.steps)
