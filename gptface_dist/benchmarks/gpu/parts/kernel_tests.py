"""The test suite of the kernels, compiled: every test's outcome is a check of its own."""

import importlib.util
import os

import pytest

from gptface_dist.benchmarks.gpu.context import Context

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
            why = (crash.message if crash else str(report.longrepr)).partition("\n")[0][:300]
            self._context.check({"test": report.nodeid, "why": why}, {}, passed=False)
        elif report.passed and report.when == "call":
            self._context.check({"test": report.nodeid}, {}, passed=True)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Record that a file of tests could not be imported."""
        if report.failed:
            self._context.check({"test": report.nodeid, "why": str(report.longrepr).splitlines()[-1][:300]}, {}, passed=False)


def run(context: Context) -> None:
    """Run the tests; a dry run takes a few."""
    status = pytest.main(words(context), plugins=[Recorder(context)])
    # 1: tests failed, each of which is recorded. Everything else: they did not all run.
    context.check({"test": "all"}, {}, ended=status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED))


def words(context: Context) -> list[str]:
    """Of pytest's command line."""
    root = context.checkout
    chosen = [str(root / "tests" / "kernels"), "-q", "-p", "no:cacheprovider", "--tb=short"]
    chosen += ["-c", str(root / "pyproject.toml"), f"--rootdir={root}"]
    if context.dry:
        chosen += ["-k", "repeat_to_the_bit and mixed or test_lengths_at_the_edges_of_tiles"]
    elif importlib.util.find_spec("xdist") is not None:
        chosen += ["-n", str(min(PROCESSES, os.cpu_count() or 1)), "--dist", "worksteal"]
    return chosen
