"""The test suite of the kernels, compiled: every test's outcome is a check of its own."""

import importlib.util
import os
from pathlib import Path

import pytest

from gptface_dist.benchmarks.gpu.context import Context, first_line

PROCESSES = 6
"""Where pytest-xdist is installed."""


class Recorder:
    """A plugin of pytest that records the outcome of every test as it comes."""

    def __init__(self, context: Context):
        self._context = context

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record a test's call, or that its setup or teardown failed; a skipped test is no check."""
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            why = first_line(RuntimeError(crash.message if crash else str(report.longrepr)))
            self._context.check({"test": report.nodeid, "why": why}, {}, passed=False)
        elif report.passed and report.when == "call":
            self._context.check({"test": report.nodeid}, {}, passed=True)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Record that a file of tests could not be imported."""
        if report.failed:
            self._context.check({"test": report.nodeid, "why": str(report.longrepr).splitlines()[-1][:300]}, {}, passed=False)


def run(context: Context) -> None:
    """Run the tests; a dry run takes a few."""
    folder = context.checkout / "tests" / "kernels"
    words = [str(folder), "-q", "-p", "no:cacheprovider", "--tb=short", f"--rootdir={context.checkout}"]
    words += ["-c", str(context.checkout / "pyproject.toml")]
    if context.dry:
        words += ["-k", "repeat_to_the_bit and mixed or test_lengths_at_the_edges_of_tiles"]
    elif importlib.util.find_spec("xdist") is not None:
        words += ["-n", str(min(PROCESSES, os.cpu_count() or 1)), "--dist", "worksteal"]
    status = pytest.main(words, plugins=[Recorder(context)])
    context.check({"test": "all", "folder": str(Path("tests", "kernels"))}, {}, ended=status in (0, 1))
