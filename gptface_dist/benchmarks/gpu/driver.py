"""Runs the tasks of ``gptface bench gpu``, each in a process of its own under a time limit, and keeps what they record.

The folder of results has ``parts/TASK.jsonl`` (records), ``parts/TASK.log`` (what it wrote), and ``gpu.json``, all records
in one file, made anew as they come. A task's files are replaced when it begins; all others stay as they are.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import gptface_dist
from gptface_dist.benchmarks.gpu import origin, plan, records
from gptface_dist.benchmarks.gpu.context import Assignment
from gptface_dist.benchmarks.gpu.plan import Task
from gptface_dist.benchmarks.gpu.verdict import ENDED, Result
from gptface_dist.errors import UserError
from gptface_dist.files import write_atomically
from gptface_dist.folder_lock import FolderLock

LEAST_S = 15.0
"""A task that would get less than this (or than its own limit) is left out: starting alone takes seconds."""
POLL_S = 0.1
MERGE_S = 3.0
"""Seconds between two versions of ``gpu.json``, unless a task ends."""


@dataclass(frozen=True)
class Options:
    """How the tasks run."""

    out: Path
    """Folder of the results."""
    checkout: Path
    """The folder that holds configs/ and tests/."""
    total: float = 500.0
    """Seconds for everything; what no longer fits is left out."""
    dry: bool = False
    """Toy sizes on the CPU."""
    tokens: Path | None = None
    """Token shards to train on."""


def checkout() -> Path:
    """The checkout that this package is of; :class:`UserError` where it was installed without one."""
    root = Path(gptface_dist.__file__).resolve().parent.parent
    if not (root / "configs").is_dir() or not (root / "tests" / "kernels").is_dir():
        raise UserError(f"bench gpu needs configs/ and tests/ beside the package, and {root} has none: run it from a checkout")
    return root


def results(out: Path, tasks: Sequence[Task]) -> list[Result]:
    """What the folder holds of these tasks."""
    return [Result(task, records.read(_file(out, task))) for task in tasks]


def recorded(out: Path, parts: Sequence[plan.Part] = plan.PARTS) -> list[Result]:
    """The tasks that the folder has anything of, in the table's order."""
    tasks = [Task(part, variant) for part in parts for variant in part.variants]
    return results(out, [task for task in tasks if _file(out, task).exists()])


def merge(out: Path, parts: Sequence[plan.Part] = plan.PARTS) -> None:
    """Write ``gpu.json``: task -> its records."""
    merged = {result.task.name: result.file.records for result in recorded(out, parts)}
    write_atomically(out / "gpu.json", json.dumps({"written": origin.now(), "tasks": merged}) + "\n")


def run(tasks: Sequence[Task], options: Options, say: Callable[[str], None], parts: Sequence[plan.Part] = plan.PARTS) -> None:
    """Run the tasks, stage after stage. ``say`` is given a line where one begins and where it ends.

    :class:`UserError` where there is no GPU and this is no dry run, where the folder cannot be written, or where another
    process writes to it.
    """
    head = origin.find(options.checkout, options.dry)
    try:
        (options.out / "parts").mkdir(parents=True, exist_ok=True)
        lock = FolderLock(options.out, "--out")
    except OSError as error:
        raise UserError(f"--out {options.out} cannot be written: {error.strerror}") from None
    with lock:
        _Run(options, head, say, parts).stages(tasks)


@dataclass(frozen=True)
class _Running:
    task: Task
    process: "subprocess.Popen[bytes]"
    began: float
    limit: float
    folder: str


class _Run:
    """One call of the command."""

    def __init__(self, options: Options, head: origin.Provenance, say: Callable[[str], None], parts: Sequence[plan.Part]):
        self._options, self._head, self._say, self._parts = options, head, say, parts
        self._began, self._merged = time.monotonic(), 0.0
        self._slots = max(2, len(os.sched_getaffinity(0)))

    def stages(self, tasks: Sequence[Task]) -> None:
        """Run all tasks; those that run are killed where this is interrupted."""
        for together in plan.stages(tasks, self._options.dry):
            waiting, running = list(together), list[_Running]()
            try:
                while waiting or running:
                    while waiting and len(running) < self._slots:
                        started = self._start(waiting.pop(0))
                        running += [started] if started else []
                    running = [one for one in running if not self._ended(one)]
                    if time.monotonic() - self._merged > MERGE_S:
                        self._merge()
                    time.sleep(POLL_S)
            finally:
                for one in running:
                    self._end(one, "interrupted")

    def _start(self, task: Task) -> _Running | None:
        """Start a task; None where no time is left for it."""
        file, limit = _file(self._options.out, task), task.part.seconds * (plan.DRY_FACTOR if self._options.dry else 1.0)
        remaining = self._began + self._options.total - time.monotonic()
        if remaining < min(LEAST_S, limit):
            # What an earlier call found stays; its file says that this one found nothing.
            how = f"left out: {max(0.0, remaining):.0f} of {self._options.total:.0f} s were left"
            records.append(file, {"kind": "end", "at": 0, "how": how, "date": origin.now()})
            self._tell(f"{task.name} {how}")
            return None
        limit = min(limit, remaining)
        for old in file.parent.glob(f"{task.name}.*"):
            old.unlink()
        records.append(file, {"kind": "begin", "at": 0, "date": origin.now(), "limit": round(limit, 1), **asdict(self._head)})
        folder = tempfile.mkdtemp(prefix=f"gptface-{task.name}-")
        module, assignment = "gptface_dist.benchmarks.gpu.worker", self._assignment(task, limit).dumps()
        with file.with_suffix(".log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module, assignment, str(os.getpid())], stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, cwd=folder, env=self._environment(task), start_new_session=True,
            )  # fmt: skip
        self._tell(f"{task.name} began, {limit:.0f} s at most")
        return _Running(task, process, time.monotonic(), limit, folder)

    def _assignment(self, task: Task, limit: float) -> Assignment:
        options = self._options
        return Assignment(
            part=f"{task.part.package}.{task.part.name}",
            variant=task.variant,
            out=str(_file(options.out, task).resolve()),
            seconds=limit,
            dry=options.dry,
            checkout=str(options.checkout),
            tokens=None if options.tokens is None else str(options.tokens.resolve()),
        )

    def _environment(self, task: Task) -> dict[str, str]:
        """The worker's: this process's, with its import paths whatever the worker's working folder is."""
        paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        paths = [str(Path(path).resolve()) for path in [str(self._options.checkout), *paths]]
        variables = {
            "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
            "PYTHONSAFEPATH": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
            "TRITON_INTERPRET": str(int(self._options.dry and task.part.interpret)),
            "OMP_NUM_THREADS": "1" if self._options.dry else os.environ.get("OMP_NUM_THREADS", "2"),
        }
        if self._options.dry:
            variables["CUDA_VISIBLE_DEVICES"] = ""
        return os.environ | variables

    def _ended(self, one: _Running) -> bool:
        """Whether a task is over, by itself or because its time is; then its end is recorded."""
        # Looked at without being waited for, so that its number is not given to another process before its group is killed.
        if os.waitid(os.P_PID, one.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            self._end(one, "")
        elif time.monotonic() - one.began > one.limit:
            self._end(one, f"killed after its {one.limit:.0f} s")
        else:
            return False
        return True

    def _end(self, one: _Running, how: str) -> None:
        """Kill what is left of a task, and record how it ended."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(one.process.pid, signal.SIGKILL)
        status = one.process.wait()
        if not how:
            how = ENDED if status == 0 else f"status {status}" if status > 0 else _signal(-status)
        shutil.rmtree(one.folder, ignore_errors=True)
        file, seconds = _file(self._options.out, one.task), time.monotonic() - one.began
        records.append(file, {"kind": "end", "at": round(seconds, 2), "how": how, "date": origin.now()})
        result = Result(one.task, records.read(file))
        said = f"{len(result.checks) - len(result.wrong)} of {len(result.checks)} checks ok, " if result.checks else ""
        failed = f"{len(result.of('failed'))} failed, " if result.of("failed") else ""
        self._tell(f"{one.task.name} {how} after {seconds:.0f} s: {said}{failed}{len(result.file.records)} records")
        self._merge()

    def _merge(self) -> None:
        merge(self._options.out, self._parts)
        self._merged = time.monotonic()

    def _tell(self, line: str) -> None:
        self._say(f"{time.monotonic() - self._began:4.0f} s  {line}")


def _file(out: Path, task: Task) -> Path:
    return out / "parts" / f"{task.name}.jsonl"


def _signal(number: int) -> str:
    try:
        return f"killed by {signal.Signals(number).name}"
    except ValueError:
        return f"killed by signal {number}"
