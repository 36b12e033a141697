"""Progress on rank 0: a bar with loss, speed and remaining time, or lines in a log."""

import contextlib
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gptface_dist.training.callbacks.callback import Callback
from gptface_dist.training.metrics import ACCURACY, CONSTANT_GUESS, LOSS, terms
from gptface_dist.training.trainer import Trainer


class ProgressBar(Callback):
    """A bar on a terminal, else a line every ``run.log_every`` steps, on stderr; evaluations are always a line."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, soft_wrap=True, highlight=False)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._began = 0.0
        self._first = 0

    def begin(self, run: Trainer) -> None:
        """Print model size, layout, steps and folder, and start the bar."""
        if run.rank_info.rank:
            return
        total, self._first, self._began = run.config.run.steps, run.state.step, time.monotonic()
        at = f", from step {run.state.step}" if run.state.step else ""
        self._print(f"{run.parameters / 1e6:.2f} M parameters, {run.config.layout}, {total} steps{at}: {run.folder}")
        if self._console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console, transient=True)
            self._task = self._bar.add_task("", total=total, completed=run.state.step)
            self._bar.start()

    def after_step(self, run: Trainer, metrics: dict[str, float]) -> None:
        """Advance the bar, or print a line every ``run.log_every`` steps."""
        if run.rank_info.rank:
            return
        parts = [
            f"loss {metrics['loss']:.3f}",
            f"grad norm {metrics['grad_norm']:.2f}",
            f"{metrics['tokens_per_s']:,.0f} tokens/s",
        ]
        if "mfu" in metrics:
            parts.append(f"MFU {metrics['mfu']:.1%}")
        step, total = run.state.step, run.config.run.steps
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=", ".join(parts))
        elif step % run.config.run.log_every == 0 or step == total:
            left = (time.monotonic() - self._began) / (step - self._first) * (total - step)
            self._print(f"step {step}/{total}: {', '.join(parts)}, {_clock(left)} left")

    def after_evaluation(self, run: Trainer, metrics: dict[str, float]) -> None:
        """Print losses, constant guesses and accuracies."""
        if run.rank_info.rank:
            return
        parts = []
        for name in terms([metrics]):
            guess = metrics.get(CONSTANT_GUESS + name)
            beside = "" if guess is None else f" (constant guess {guess:.3f})"
            parts.append(f"{name} {metrics[LOSS + name]:.3f}{beside}, {metrics[ACCURACY + name]:.1%} right")
        self._print(f"held out, step {run.state.step}: loss {metrics['loss']:.3f}; {'; '.join(parts)}")

    def stop(self, run: Trainer) -> None:
        """Print steps, tokens, time and the reason of an early stop."""
        if run.rank_info.rank == 0:
            reason = f" ({run.stopped_by})" if run.stopped_by else ""
            tokens = f"{run.state.tokens:,} tokens in {_clock(run.state.seconds)}"
            self._print(f"{run.state.step} of {run.config.run.steps} steps done{reason}, {tokens}: {run.folder}")

    def _print(self, line: str) -> None:
        """A closed pipe or a full disk behind stderr does not end a run."""
        with contextlib.suppress(OSError, ValueError):
            self._console.print(line)

    def close(self, run: Trainer) -> None:
        """Remove the bar from the terminal."""
        if self._bar is not None:
            self._bar.stop()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
