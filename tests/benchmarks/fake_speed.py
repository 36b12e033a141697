"""The fake part once more, as one that checks no correctness."""

from tests.benchmarks.fake import run

__all__ = ["run"]
