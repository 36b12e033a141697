"""A part of ``gptface bench gpu`` that behaves as its variant says."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from gptface_dist.benchmarks.gpu.context import Context


def run(context: Context) -> None:
    context.record("started", pid=os.getpid(), folder=str(Path.cwd()), gptface=sys.modules["gptface_dist"].__file__)
    globals()[context.variant](context)


def ok(context: Context) -> None:
    context.check({"n": 1}, {"error": (0.1, 0.2)}, same=True)
    context.record("speed", ms=1.5)


def wrong(context: Context) -> None:
    context.check({"n": 1}, {"error": (0.1, 0.2)})
    context.check({"n": 2}, {"error": (float("nan"), 0.2)})


def raising(context: Context) -> None:
    def bad() -> None:
        raise ValueError("first line\nsecond line")

    context.attempt({"n": 1}, bad)
    context.attempt({"n": 2}, lambda: context.check({"n": 2}, {"error": (0.1, 0.2)}))


def poisoned(context: Context) -> None:
    def bad() -> None:
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    context.check({"n": 1}, {})
    context.attempt({"n": 2}, bad)
    context.check({"n": 3}, {}, reached=False)


def uncaught(context: Context) -> None:
    context.check({"n": 1}, {})
    raise KeyError("nothing caught this")


def crash(context: Context) -> None:
    context.check({"n": 1}, {})
    os.kill(os.getpid(), signal.SIGSEGV)


def hang(context: Context) -> None:
    """With a child that would outlive it."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    context.record("child", pid=child.pid)
    context.check({"n": 1}, {})
    time.sleep(600)


def silent(context: Context) -> None:
    """Checks nothing."""


def impatient(context: Context) -> None:
    context.check({"n": 1}, {})
    context.attempt({"n": 2}, lambda: context.check({"n": 2}, {}, reached=False), seconds=1e6)


def endless(context: Context) -> None:
    """Numbered records, one after the other, and a child that would outlive it."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    number = 0
    while True:
        context.record("number", number=number, child=child.pid)
        number += 1
