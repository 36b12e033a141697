"""Options of checkpoints; importable without DeepSpeed and megatron-core."""

from dataclasses import dataclass

from gptface_dist.errors import UserError, check_one_of

CHOICES = {"on_failure": ("stop", "go_on"), "resume": ("auto", "must", "never"), "damaged": ("refuse", "previous")}


@dataclass(frozen=True)
class CheckpointOptions:
    """When a run is saved, which checkpoints are kept, and which one it resumes from."""

    interval: int = 1000
    """Steps between checkpoints; 0 saves at the end only, as every run does."""
    keep_last: int = 3
    """Number of newest checkpoints to keep; 0 keeps all."""
    keep_interval: int = 0
    """Keep checkpoints of steps that are multiples of this for good; 0 for none."""
    asynchronous: bool = False
    """Write in the background from a copy in host memory, which holds a rank's part of weights and moments a second time."""
    on_failure: str = "stop"
    """If a checkpoint cannot be written (a full disk): ``stop`` the run, or ``go_on`` until the next one."""
    resume: str = "auto"
    """``auto`` resumes from the run's latest checkpoint if there is one, ``must`` refuses to start without one, ``never``
    refuses a folder that holds checkpoints."""
    resume_from: str = ""
    """Folder of a checkpoint, of this run or another, to resume from instead of the run's latest; once the run has saved a
    checkpoint of its own after that, it resumes from its latest again."""
    damaged: str = "refuse"
    """If the latest checkpoint is damaged: ``refuse`` to resume, or resume from the ``previous`` undamaged one."""

    def __post_init__(self) -> None:
        for name in ("interval", "keep_last", "keep_interval"):
            if getattr(self, name) < 0:
                raise UserError(f"checkpoint.{name} must be 0 or more, got {getattr(self, name)}")
        for name, choices in CHOICES.items():
            check_one_of(f"checkpoint.{name}", getattr(self, name), choices)
        if self.resume == "never" and self.resume_from:
            raise UserError("checkpoint.resume_from names a checkpoint, but checkpoint.resume is never")
