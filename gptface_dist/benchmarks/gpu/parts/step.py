"""The engine's whole optimizer step: tokens/s, TFLOP/s, MFU and memory, with each attention."""

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from gptface_dist.benchmarks.gpu.context import Context
from gptface_dist.benchmarks.workload import Workload
from gptface_dist.config import load_config
from gptface_dist.distributed.rank import RankInfo
from gptface_dist.kernels.attention.options import BACKWARDS, Fp8Options
from gptface_dist.model.attention import AttentionOptions
from gptface_dist.model.flops import peak_tflops
from gptface_dist.model.options import ModelOptions
from gptface_dist.parallel import libraries
from gptface_dist.parallel.layout import Layout
from gptface_dist.parallel.options import EngineOptions, OptimizerOptions
from gptface_dist.sequence import PaddedBatch

if TYPE_CHECKING:
    from gptface_dist.engine.engine import Engine

LAYOUT = Layout(zero=0)
TEXT_LENGTH = 48
GRIDS = (16, 32)
"""Rows and columns of a picture's codes: sequences of up to 307 and 1,075 tokens."""
TOKENS = {"base": 20000, "1b": 10000}
"""Tokens of a micro-batch, about."""
WARM_UP, STEPS = 3, 8
TIMEOUT_S = 120.0
WAYS = {
    "sdpa": AttentionOptions("sdpa"),
    **{f"fp8, backward {backward}": AttentionOptions("fp8", fp8=Fp8Options(backward)) for backward in BACKWARDS},
}


def run(context: Context) -> None:
    """Time one model at every length with every attention: one process, no ZeRO, bfloat16."""
    model = "tiny" if context.dry else context.variant
    options = load_config(ModelOptions, context.checkout / "configs" / "models" / f"{model}.yaml", [])
    with libraries.quiet_imports():
        libraries.import_libraries()
        from gptface_dist.engine.engine import Engine
        from gptface_dist.parallel import groups

        groups.join(RankInfo(), HashStore(), TIMEOUT_S)
        groups.start(LAYOUT, 0, TIMEOUT_S)
        works = [_work(options, grid, 200 if context.dry else TOKENS[model]) for grid in ((4,) if context.dry else GRIDS)]
        began = time.perf_counter()
        vocabulary, optimizer = works[0].vocabulary, OptimizerOptions()
        objective = works[0].objective
        engine = Engine(objective, options, vocabulary, LAYOUT, works[0].seed, optimizer, works[0].engine)
        context.record(
            "built", model=model, parameters=objective.parameter_count(options, vocabulary), seconds=time.perf_counter() - began
        )
        for work in works:
            batches = [work.batches(step, engine.device) for step in range(WARM_UP)]
            for way in WAYS:
                about = {"model": model, "longest": longest(batches[0]), "way": way}
                context.attempt(about, lambda: _measure(context, engine, work, batches, way, about), 8)  # noqa: B023
        # After an error that the part did not survive, ending the groups could wait for ever.
        groups.stop()


def _work(options: ModelOptions, grid: int, tokens: int) -> Workload:
    length = grid**2 + TEXT_LENGTH + 3
    size = max(1, tokens // length)
    return Workload(options, 2, size, TEXT_LENGTH, grid, 8192, 1024, engine=EngineOptions("bfloat16"))


def longest(batches: list[PaddedBatch[Tensor]]) -> int:
    """Tokens of the longest sequence."""
    return max(int(batch.lengths.max()) for batch in batches)


def _measure(
    context: Context,
    engine: "Engine",
    work: Workload,
    batches: list[list[PaddedBatch[Tensor]]],
    way: str,
    about: dict[str, object],
) -> None:
    """Time steps with one attention; the engine trains on from wherever it is."""
    from gptface_dist.engine.attention import attentions
    from gptface_dist.engine.syncs import synchronisations

    for _, attention in attentions(engine):
        attention.options = WAYS[way]
    if not context.dry:
        torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []
    for step in range(2 if context.dry else WARM_UP + STEPS):
        _wait(context)
        began = time.perf_counter()
        losses.append(engine.step(batches[step % len(batches)]).loss)
        _wait(context)
        seconds.append(time.perf_counter() - began)
    timed = sorted(seconds[1 if context.dry else WARM_UP :])
    # The three batches in turn are of equal shape, and nearly of equal work.
    amount, median = work.work(batches[0]), timed[len(timed) // 2]
    rate = work.objective.flops(work.model, work.vocabulary, amount) / median / 1e12
    peak = None if context.dry else peak_tflops(torch.cuda.get_device_name(), work.engine.dtype)
    context.record(
        "step", **about, sequences=sum(batch.rows for batch in batches[0]),
        ms=1000 * median, min_ms=1000 * timed[0], max_ms=1000 * timed[-1],
        tokens_s=amount.tokens / median, tflops=rate, mfu=None if peak is None else rate / peak,
        gib=None if context.dry else torch.cuda.max_memory_allocated() / 2**30, loss=losses[-1],
        host_waits=None if context.dry else synchronisations(engine, batches) / len(batches),
    )  # fmt: skip


def _wait(context: Context) -> None:
    if not context.dry:
        torch.cuda.synchronize()
