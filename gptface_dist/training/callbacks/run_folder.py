"""The run's folder belongs to one run at a time, and tells its configuration."""

from gptface_dist.distributed.watchdog import Watchdog
from gptface_dist.errors import UserError
from gptface_dist.folder_lock import FolderLock
from gptface_dist.training.callbacks.callback import Callback
from gptface_dist.training.run_folder import write_config
from gptface_dist.training.trainer import Trainer


class RunFolder(Callback):
    """Locks the folder on rank 0, and writes ``config.yaml``. It comes first: the others read and write the folder."""

    def __init__(self, watchdog: Watchdog):
        self._watchdog = watchdog
        self._lock: FolderLock | None = None

    def start(self, run: Trainer) -> None:
        """Lock the folder; refuse the run where another one has."""
        if run.rank_info.rank == 0:
            try:
                self._lock = FolderLock(run.folder, "run.folder")
            except OSError as error:
                raise UserError(f"run.folder {run.folder} cannot be used: {error.strerror}") from None
            # Another rank's failure ends this process without unwinding.
            self._watchdog.on_end(self._lock.release)

    def begin(self, run: Trainer) -> None:
        """Write the configuration."""
        if run.rank_info.rank == 0:
            write_config(run.config)

    def close(self, run: Trainer) -> None:
        """Unlock the folder."""
        if self._lock is not None:
            self._lock.release()
