"""Which launch of each kernel is fastest: every candidate alone on a GPU, and the table of the best."""

import datetime
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from gptface_dist import host
from gptface_dist.errors import first_line
from gptface_dist.kernels.attention import operator
from gptface_dist.kernels.attention.kernel_set import KernelSet
from gptface_dist.kernels.attention.launch import DK_DV, DQ, FORWARD, Key, Launch, LaunchTable, candidates, load_table
from gptface_dist.kernels.attention.options import HEAD_SIZES, TILE
from gptface_dist.kernels.attention.shapes import Shape
from gptface_dist.kernels.attention.timing import Timer

TOKENS = (4096, 1024)
"""Lengths that a launch is timed at, the first one first."""

SHORTLIST = 4
"""Launches of a kernel that are timed at the other lengths: the fastest of the first."""

APART = 0.02
"""Relative difference from the table's launch above which another one is wrong: P is rounded to FP8 against other maxima."""


@dataclass(frozen=True)
class Trial:
    """One launch, tried on one shape."""

    key: Key
    """Of the kernel."""
    launch: Launch
    """How it was launched."""
    shape: Shape
    """On what."""
    milliseconds: float | None = None
    """Median of the kernel alone, with the zeros that its outputs begin with; None where it failed."""
    difference: float | None = None
    """Of its result from that of the table's launch, relative."""
    failure: str = ""
    """Why it did not run; empty where it did."""

    @property
    def right(self) -> bool:
        """Whether it ran and computed the same."""
        return self.difference is not None and self.difference < APART


def attempt(kernels: KernelSet, key: Key, launch: Launch, wanted: Tensor, timer: Timer) -> Trial:
    """Run, compare and time one launch; an error of the compiler or the GPU is a trial that failed."""
    trial = Trial(key, launch, kernels.shape)
    try:
        result = _vector(kernels, key, launch)
        difference = float((result - wanted).norm() / wanted.norm())
        call = kernels.call(key.kernel, launch)
        return replace(trial, milliseconds=operator.launched(lambda: timer(call)), difference=difference)
    # Whatever one candidate cannot do, others may. Triton's errors have no class in common.
    except Exception as error:
        return replace(trial, failure=first_line(error, 200))


def _vector(kernels: KernelSet, key: Key, launch: Launch) -> Tensor:
    """All outputs of the kernel in one float32 vector."""
    return torch.cat([x.flatten().float() for x in operator.launched(kernels.call(key.kernel, launch))])


def tuned_keys(backwards: Iterable[str]) -> list[Key]:
    """Keys to tune, most valuable first: plain kernels before specialised ones, heads of 128 before those of 64."""
    keys = []
    for specialize in (False, True):
        for number, backward in enumerate(backwards):
            for size in reversed(HEAD_SIZES):
                forward = [] if number else [Key(FORWARD, size, "any", specialize)]
                keys += [*forward, Key(DK_DV, size, backward, specialize), Key(DQ, size, backward, specialize)]
    return keys


def tune(
    keys: Iterable[Key], table: LaunchTable, timer: Timer, device: torch.device, left: Callable[[], float],
    tokens: tuple[int, ...] = TOKENS, shape: Callable[[int, int], Shape] = Shape.usual,
) -> Iterator[Trial]:  # fmt: skip
    """Try every candidate of ``keys`` at the first length of ``tokens``, and the fastest of them at the others.

    The table's own launch comes first. Ends before ``left()``, in seconds, is used up; a shape is ``shape(tokens, head size)``.
    """
    for key in keys:
        backward = "mixed" if key.backward == "any" else key.backward
        trials: list[Trial] = []
        for number, count in enumerate(tokens):
            own = table.launches[key]
            others = candidates(key) if not number else [trial.launch for trial in _fastest(trials)[:SHORTLIST]]
            if left() <= 0:
                return
            kernels = KernelSet(shape(count, key.head_size), backward, table, device)
            wanted = _vector(kernels, key, own)
            for launch in dict.fromkeys([own, *others]):
                if left() <= 0:
                    return
                trials.append(attempt(kernels, key, launch, wanted, timer))
                yield trials[-1]


def _fastest(trials: Iterable[Trial]) -> list[Trial]:
    return sorted((trial for trial in trials if trial.right), key=lambda trial: trial.milliseconds or math.inf)


def best(trials: Iterable[Trial], table: LaunchTable, device: str) -> LaunchTable:
    """The table with the fastest right launch of each key that was tried.

    Fastest is the least mean of times relative to the table's own launch, over the lengths that this one was tried at; a
    launch that was not right at all of them is not chosen.
    """
    tried = list(trials)
    for key in dict.fromkeys(trial.key for trial in tried):
        own = {
            trial.shape: trial.milliseconds
            for trial in tried
            if trial.key == key and trial.launch == table.launches[key] and trial.milliseconds
        }
        ratios: dict[Launch, list[float]] = {}
        for trial in tried:
            if trial.key == key and trial.right and trial.milliseconds and trial.shape in own:
                ratios.setdefault(trial.launch, []).append(trial.milliseconds / own[trial.shape])
        whole = {launch: sum(measured) / len(measured) for launch, measured in ratios.items() if len(measured) == len(own)}
        if whole:
            table = table.changed(key, min(whole, key=lambda launch: whole[launch]))
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return replace(table, device=device, date=today, versions=host.versions("torch", "triton"))


def written(trials: Iterable[Trial], table: LaunchTable, device: str, path: Path) -> Iterator[Trial]:
    """The trials as they come; ``path`` gets the table of the :func:`best` after each kernel and at the end, so that an early
    end keeps what was timed. Without a trial nothing is written.
    """
    done: list[Trial] = []
    for trial in trials:
        if done and trial.key != done[-1].key:
            best(done, table, device).save(path)
        done.append(trial)
        yield trial
    if done:
        best(done, table, device).save(path)


def precompile(keys: list[Key], processes: int, left: Callable[[], float]) -> int:
    """Compile every candidate of ``keys`` into Triton's cache on disk, in so many processes; returns how many compiled.

    Each launches them on one tile: compiled code does not depend on numbers of tiles, heads and sequences.
    """
    seconds = left()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context) as pool:
        shares = [pool.submit(_compile, keys, number, processes, seconds) for number in range(processes)]
        return sum(share.result() for share in shares)


def _compile(keys: list[Key], share: int, of: int, seconds: float) -> int:
    """Every ``of``-th candidate from the ``share``-th on, as long as ``seconds`` last."""
    until, done = time.monotonic() + seconds, 0
    table, device = load_table(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prepared: dict[tuple[int, str], KernelSet] = {}
    todo = [(key, launch) for key in keys for launch in candidates(key)]
    for number, (key, launch) in enumerate(todo):
        if number % of != share or time.monotonic() > until:
            continue
        backward = "mixed" if key.backward == "any" else key.backward
        if (key.head_size, backward) not in prepared:
            prepared[key.head_size, backward] = KernelSet(Shape(TILE, key.head_size, 1, 1), backward, table, device)
        trial = attempt(prepared[key.head_size, backward], key, launch, torch.ones((), device=device), _once)
        done += not trial.failure
    return done


def _once(call: Callable[[], object]) -> float:
    call()
    return 0.0


def compile_processes() -> int:
    """Processes that compile: the cores, of which one is left to others."""
    return max(1, len(os.sched_getaffinity(0)) - 1)
