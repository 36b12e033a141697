"""A run from its configuration to its end, with the hooks that every run has."""

from gptface_dist.distributed.shutdown import shutdown
from gptface_dist.distributed.watchdog import Watchdog
from gptface_dist.tokenizers.vocabulary import Vocabulary
from gptface_dist.training.callbacks.attention_health import AttentionHealth
from gptface_dist.training.callbacks.callback import Hook
from gptface_dist.training.callbacks.checkpointing import Checkpointing
from gptface_dist.training.callbacks.host_memory import HostMemory
from gptface_dist.training.callbacks.journal import Journal
from gptface_dist.training.callbacks.progress import ProgressBar
from gptface_dist.training.callbacks.tracking import Tracking
from gptface_dist.training.config import Config
from gptface_dist.training.trainer import prepare


def train(config: Config, vocabulary: Vocabulary, watchdog: Watchdog) -> None:
    """Train to the last step, on this rank of those that ``watchdog`` watches."""
    # What a run goes on from comes first; then the journal: what is written down does not depend on what others make of it.
    hooks: list[Hook] = [
        Checkpointing(config.checkpoint),
        AttentionHealth(config.attention_health),
        Journal(),
        Tracking(config.tracking),
        ProgressBar(),
        HostMemory(),
    ]
    prepare(config, vocabulary, watchdog, hooks).train()
    shutdown()
