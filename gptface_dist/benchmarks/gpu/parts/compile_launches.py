"""Compile every launch that ``tune`` may try, on the cores that nothing else uses, so that ``tune`` only has to time them."""

import os

from gptface_dist.benchmarks.gpu.context import Context
from gptface_dist.benchmarks.gpu.parts.tune import keys
from gptface_dist.kernels.attention import tuning

OTHERS = 8
"""Processes that check kernels meanwhile."""


def run(context: Context) -> None:
    """Fill Triton's cache on disk."""
    processes = 1 if context.dry else max(2, len(os.sched_getaffinity(0)) - OTHERS)
    done = tuning.precompile(keys(context.dry), processes, lambda: context.left() - 5)
    context.record("compiled", launches=done, processes=processes)
