"""Time and memory of the chunked output loss beside the full logits tensor, as ``gptface bench loss`` measures them."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

from gptface_dist.benchmarks.gpu.context import Context
from gptface_dist.kernels.loss import benchmark
from gptface_dist.kernels.loss.benchmark import Work

CHUNKS = (None, 256, 1024, 4096)
"""Rows at a time; None for all."""


def run(context: Context) -> None:
    """Measure every chunk size, each in a process of its own, so that its memory is its own."""
    size = (256, 512, 64) if context.dry else (16384, 16384, 2048)
    work = Work(*size, "bfloat16", ())
    for chunk in CHUNKS[:2] if context.dry else CHUNKS:
        context.attempt({"chunk": chunk}, lambda chunk=chunk: _measure(context, work, chunk), 8)  # type: ignore[misc]


def _measure(context: Context, work: Work, chunk: int | None) -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        cost = pool.submit(benchmark.measure, work, chunk, 2 if context.dry else 5).result()
    context.record(
        "loss", rows=work.rows, ids=work.columns, width=work.hidden, dtype=work.dtype, way=cost.way, ms=cost.milliseconds,
        mib=cost.mebibytes, error=cost.difference,
    )  # fmt: skip
