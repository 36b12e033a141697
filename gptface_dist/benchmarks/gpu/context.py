"""What a part of ``gptface bench gpu`` is given: a place for its records, its time, its device."""

import importlib
import json
import os
import shlex
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptface_dist.benchmarks.gpu import records
from gptface_dist.errors import first_line

if TYPE_CHECKING:
    import torch

    from gptface_dist.kernels.attention.timing import Timer

Measured = Mapping[str, tuple[float, float]]
"""Quantity -> (its value, the largest that is right, above 0)."""

POISON = (
    *("CUDA error", "illegal memory access", "misaligned address", "illegal instruction", "launch failure"),
    *("device-side assert", "uncorrectable ECC"),
)  # fmt: skip
"""Words of errors after which a process can no longer use the GPU."""

MARGIN_S = 3.0
"""Kept of a part's time for what comes after a command that it started."""


@dataclass(frozen=True)
class Assignment:
    """What one process is to run."""

    part: str
    """Module of the part."""
    variant: str
    """One of its variants."""
    out: str
    """Its file of records, which begins with its origin."""
    seconds: float
    """How long it may take: it is killed after that."""
    dry: bool
    """Toy sizes on the CPU."""
    checkout: str
    """The folder that holds configs/ and tests/."""
    tokens: str | None
    """Folder of token shards to train on; None for none."""

    def dumps(self) -> str:
        """As a word of a command line."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> "Assignment":
        """Read what :meth:`dumps` gave."""
        return cls(**json.loads(text))


class Unusable(RuntimeError):
    """The GPU can no longer be used by this process; what happened is recorded."""


class Context:
    """The only thing that a part is given.

    The working folder is the part's own, empty at first and removed after it.
    """

    def __init__(self, assignment: Assignment):
        self._began, self._given, self._lock = time.monotonic(), assignment, threading.Lock()
        self.variant, self.dry = assignment.variant, assignment.dry
        self.checkout = Path(assignment.checkout)
        self.tokens = None if assignment.tokens is None else Path(assignment.tokens)

    def left(self) -> float:
        """Seconds until the part is killed."""
        return self._given.seconds - (time.monotonic() - self._began)

    def beside(self, part: str, name: str) -> Path:
        """A file that a part leaves beside its records, for later parts and for who looks into the folder."""
        return Path(self._given.out).with_name(f"{part}.{name}")

    def device(self) -> "torch.device":
        """Where this part computes."""
        import torch

        return torch.device("cpu") if self.dry else torch.device("cuda", torch.cuda.current_device())

    def timer(self, rounds: int) -> "Timer":
        """Median milliseconds of a call; in a dry run, which measures nothing, of one call."""
        if not self.dry:
            from gptface_dist.kernels.attention.timing import cuda_timer

            return cuda_timer(rounds)

        def timed(call: Callable[[], object]) -> float:
            began = time.perf_counter()
            call()
            return 1000 * (time.perf_counter() - began)

        return timed

    def record(self, kind: str, **fields: Any) -> None:
        """Write a record at once; ``fields`` are numbers, words, or lists of them. Records of a kind become rows of a table."""
        at = round(time.monotonic() - self._began, 2)
        with self._lock:
            records.append(Path(self._given.out), {"kind": kind, "at": at, **fields})

    def check(self, about: Mapping[str, Any], measured: Measured, **holds: bool) -> None:
        """Record whether something is right: every value is at most its limit (NaN is not), and all of ``holds`` hold."""
        ok = all(value <= limit for value, limit in measured.values()) and all(holds.values())
        self.record("check", ok=ok, about=about, measured=measured, holds=holds)

    def attempt(self, about: Mapping[str, Any], work: Callable[[], None], seconds: float = 5.0) -> None:
        """Run one check or measurement; a record says where fewer than ``seconds`` are left for it, or that it failed.

        An error ends nothing else, unless the GPU cannot be used after it (:class:`Unusable`).
        """
        left = self.left()
        if left < seconds:
            self.record("left out", about=about, why=f"{left:.0f} s were left, {seconds:.0f} are needed")
            return
        try:
            work()
        except Exception as error:
            traceback.print_exc()
            self.record("failed", about=about, why=first_line(error))
            if any(word in str(error) for word in POISON):
                raise Unusable from error
            if "out of memory" in str(error):
                _free_memory()

    def command(self, name: str, arguments: Sequence[str], **variables: str) -> str:
        """Run ``python -m gptface_dist.tools.main ARGUMENTS``; returns why it failed, in one line, or "".

        What it writes goes to a log of its own beside the part's. It is killed where the part's time is nearly over. Several
        may run at once, from threads.
        """
        words = [sys.executable, "-m", "gptface_dist.tools.main", *arguments]
        log = Path(self._given.out).with_suffix(f".{name}.log")
        with log.open("wb") as file:
            file.write(f"$ gptface {shlex.join(arguments)}\n".encode())
            file.flush()
            process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=os.environ | variables)
            try:
                status = process.wait(max(1.0, self.left() - MARGIN_S))
                why = "" if status == 0 else f"status {status}: {_last_line(log)}"
            except subprocess.TimeoutExpired:
                why = f"not done when the part's time was over: {_last_line(log)}"
            finally:
                process.kill()
                process.wait()
        return why


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


def _free_memory() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run(assignment: Assignment) -> None:
    """Run a part in this process; an error that the part did not catch is recorded and raised."""
    context = Context(assignment)
    try:
        importlib.import_module(assignment.part).run(context)
    except Unusable:
        raise
    except Exception as error:
        context.record("failed", about={}, why=first_line(error))
        raise
