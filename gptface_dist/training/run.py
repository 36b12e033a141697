"""Train a run from its configuration to its last step, with the standard callbacks."""

from gptface_dist.distributed.shutdown import shutdown
from gptface_dist.distributed.watchdog import Watchdog
from gptface_dist.tokenizers.vocabulary import Vocabulary
from gptface_dist.training.callbacks.attention_health import AttentionHealth
from gptface_dist.training.callbacks.callback import Callback
from gptface_dist.training.callbacks.checkpointing import Checkpointing
from gptface_dist.training.callbacks.ema import EMA
from gptface_dist.training.callbacks.host_memory import HostMemory
from gptface_dist.training.callbacks.metrics_logger import MetricsLogger
from gptface_dist.training.callbacks.progress import ProgressBar
from gptface_dist.training.callbacks.run_folder import RunFolder
from gptface_dist.training.callbacks.tracking import Tracking
from gptface_dist.training.config import Config
from gptface_dist.training.trainer import prepare


def train(config: Config, vocabulary: Vocabulary, watchdog: Watchdog) -> None:
    """Train to the last step on the rank of ``watchdog.rank_info``, then shut down its process groups."""
    # The folder's lock comes first; then callbacks that restore state; then the metrics logger, so that later callbacks cannot
    # alter its metrics.
    callbacks: list[Callback] = [
        RunFolder(watchdog),
        EMA(config.run.ema_decay),
        Checkpointing(config.checkpoint, config.run.timeout_s),
        AttentionHealth(config.attention_health),
        MetricsLogger(),
        Tracking(config.tracking),
        ProgressBar(),
        HostMemory(),
    ]
    prepare(config, vocabulary, watchdog, callbacks).train()
    shutdown()
