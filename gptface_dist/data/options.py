"""Options of a run's data: sources, batch sizes, order, masking."""

from dataclasses import dataclass, field

from gptface_dist.data.batch import BatchOptions
from gptface_dist.data.masking import MaskingOptions
from gptface_dist.data.stream import StreamOptions
from gptface_dist.errors import UserError


@dataclass(frozen=True)
class SourceConfig:
    """One source of training data."""

    path: str
    """Folder, or URL of a folder, of token shards."""
    weight: float = 1.0
    """Share of the run's blocks, relative to the other sources' weights."""


@dataclass(frozen=True)
class DataConfig:
    """Data of a run: sources, order, masking and batches."""

    tokenizers: str
    """Folder of the tokenizers that made the tokens (``vocabulary.json``)."""
    sources: list[SourceConfig]
    """The token shards."""
    global_batch: int = 256
    """Samples of one optimizer step, over all ranks."""
    micro_batch: int = 8
    """Samples of one forward pass on one rank; a multiple of ``order.block``."""
    order: StreamOptions = field(default_factory=StreamOptions)
    """Seed and order of the samples."""
    masking: MaskingOptions = field(default_factory=MaskingOptions)
    """Distribution of the tokens to predict."""
    batch: BatchOptions = field(default_factory=BatchOptions)
    """Sequence lengths and distribution of image-text pairs."""
    workers: int = 2
    """Worker processes of each rank; 0 prepares batches in the training process. Batches do not depend on it."""
    skip_list: str | None = None
    """File of sample keys to leave out, one a line."""
    max_bad_fraction: float = 0.01
    """Share of unreadable samples past which the run stops."""

    def __post_init__(self) -> None:
        if self.batch.hard_pair_ratio and self.order.block % 4:
            raise UserError(f"batch.hard_pair_ratio needs order.block to be a multiple of 4, got {self.order.block}")
