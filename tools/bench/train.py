"""``gptface bench train``: the time of an optimizer step."""

import itertools
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptface_dist.tools.progress import bar

if TYPE_CHECKING:
    from gptface_dist.benchmarks.workload import Workload


def train(
    model: Annotated[Path, typer.Option(help="Size and form of the model (YAML).")] = Path("configs/models/tiny.yaml"),
    processes: Annotated[int, typer.Option(min=1, help="Processes, each with a GPU where there are any: 1, or even.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; every way is timed once in each.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each way in a round.")] = 3,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    micro_batches: Annotated[int, typer.Option(help="Micro-batches of the global batch.")] = 8,
    size: Annotated[int, typer.Option(help="Sequences of a micro-batch.")] = 4,
    text_length: Annotated[int, typer.Option(help="Longest caption in tokens.")] = 48,
    grid: Annotated[int, typer.Option(help="Rows and columns of a picture's codes.")] = 16,
    text_ids: Annotated[int, typer.Option(help="Ids of text.")] = 384,
    image_codes: Annotated[int, typer.Option(help="Codes of pictures.")] = 512,
) -> None:
    """Step time of the engine, as a ratio to DeepSpeed's PipelineModule and to PyTorch's DistributedDataParallel.

    The same weights, made-up batches and AdamW for all; status 1, and nothing timed, where their losses differ. On one
    process the baseline is PyTorch alone.
    """
    from rich.console import Console
    from rich.table import Table

    from gptface_dist import host
    from gptface_dist.benchmarks import step
    from gptface_dist.benchmarks.workload import Workload
    from gptface_dist.config import load_config
    from gptface_dist.model.options import ModelOptions
    from gptface_dist.parallel.options import EngineOptions

    options = load_config(ModelOptions, model, [])
    work = Workload(options, micro_batches, size, text_length, grid, text_ids, image_codes, engine=EngineOptions(dtype))
    host.warn_of_emulation(dtype, "--dtype")
    console = Console()
    console.print(step.machine(processes), highlight=False)
    with bar() as progress:
        task = progress.add_task("starting", total=step.parts(processes, rounds))
        begun = itertools.count()

        def show(what: str) -> None:
            progress.update(task, completed=next(begun), description=what)

        comparison = step.compare(work, processes, rounds, steps, show)
    if not comparison.timings:
        table = Table("way", *(f"loss of step {number + 1}" for number in range(step.WARM_UP)))
        for way, losses in comparison.losses.items():
            table.add_row(way, *(f"{loss:.7g}" for loss in losses))
        console.print(table)
        print(f"losses differ by {comparison.difference:.1e}: not the same work, so nothing was timed")
        raise typer.Exit(1)
    amounts = _amounts(work, range(step.WARM_UP, step.WARM_UP + steps), processes)
    for baseline in dict.fromkeys(timing.baseline for timing in comparison.timings):
        headings = ("way", "ms", "min", "max", "ratio", "min", "max", *amounts)
        table = Table(*headings, title=f"milliseconds a step, and speed as a ratio to {baseline}")
        for timing in comparison.timings:
            if timing.baseline == baseline:
                row = [f"{1000 * f(timing.seconds):.0f}" for f in (statistics.median, min, max)]
                row += [f"{f(timing.ratios):.2f}" for f in (statistics.median, min, max)]
                seconds = statistics.median(timing.seconds)
                table.add_row(timing.way, *row, *(f"{amount / seconds:{form}}" for amount, form in amounts.values()))
        console.print(table)
    parameters = work.objective.parameter_count(options, work.vocabulary)
    shape = f"{parameters / 1e6:.2f} M parameters, {micro_batches} micro-batches of {size} sequences"
    console.print(f"{model}: {shape}, {dtype}; losses of the first steps agree to {comparison.difference:.1e}", highlight=False)
    console.print(f"medians over {rounds} rounds of {steps} steps, each way in turn", highlight=False)


def _amounts(work: "Workload", steps: range, processes: int) -> dict[str, tuple[float, str]]:
    """What a mean step does, to be divided by its seconds: heading -> (amount, format)."""
    import torch

    from gptface_dist.model.flops import peak_tflops

    amount = work.work([batch for step in steps for batch in work.batches(step)])
    flops = work.objective.flops(work.model, work.vocabulary, amount) / len(steps) / processes
    amounts = {"tokens/s": (amount.tokens / len(steps), ",.0f")}
    if torch.cuda.is_available():
        amounts["TFLOP/s a GPU"] = (flops / 1e12, ".1f")
        peak = peak_tflops(torch.cuda.get_device_name(), work.engine.dtype)
        if peak is not None:
            amounts["MFU"] = (flops / 1e12 / peak, ".1%")
    return amounts
