"""``gptface bench``: speed and memory, as ratios to a named baseline in the same run."""

import itertools
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptface_dist.tools.progress import bar

if TYPE_CHECKING:
    from gptface_dist.benchmarks.workload import Workload

app = typer.Typer(no_args_is_help=True, help="Measure speed against a named baseline in the same run.")


@app.callback()
def group() -> None:
    """Measure speed against a named baseline in the same run."""


@app.command()
def data(
    folders: Annotated[list[Path], typer.Argument(help="Indexed folders of token or picture shards.", show_default=False)],
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds a round.")] = 3.0,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; every way is timed once in each.")] = 5,
) -> None:
    """Samples/s of one process, as a ratio to a bare webdataset loop over the same files."""
    from rich.console import Console
    from rich.table import Table

    from gptface_dist.benchmarks.data import BASELINE, compare, hardware

    console = Console()
    console.print(hardware(), highlight=False)
    for folder in folders:
        with console.status("") as status:
            speeds = compare(folder, seconds, rounds, status.update)
        table = Table("way", "samples/s", "min", "max", f"ratio to {BASELINE}", "min", "max", title=str(folder))
        for speed in speeds:
            row = [f"{f(speed.rounds):.0f}" for f in (statistics.median, min, max)]
            row += [f"{f(speed.ratios):.2f}" for f in (statistics.median, min, max)]
            table.add_row(speed.name, *row)
        console.print(table)
    console.print(f"medians over {rounds} rounds of {seconds:g} s, each way in turn", highlight=False)


@app.command()
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

    from gptface_dist.benchmarks.workload import Workload
    from gptface_dist.config import load
    from gptface_dist.model.options import ModelOptions
    from gptface_dist.model.parameters import count
    from gptface_dist.parallel.options import EngineOptions

    options = load(ModelOptions, model, [])
    work = Workload(options, micro_batches, size, text_length, grid, text_ids, image_codes, EngineOptions(dtype))
    console = Console()
    console.print(checkpoint.machine(processes), highlight=False)
    with bar() as progress:
        task = progress.add_task("starting", total=checkpoint.parts(processes, rounds))
        begun = itertools.count()

        def show(what: str) -> None:
            progress.update(task, completed=next(begun), description=what)

        found = checkpoint.compare(work, processes, rounds, steps, show)
    if not found.timings:
        table = Table("way", *(f"loss of step {step + 1}" for step in range(checkpoint.WARM_UP)))
        for way, losses in found.losses.items():
            table.add_row(way, *(f"{loss:.7g}" for loss in losses))
        console.print(table)
        print(f"losses differ by {found.difference:.1e}: not the same work, so nothing was timed")
        raise typer.Exit(1)
    amounts = _amounts(work, range(checkpoint.WARM_UP, checkpoint.WARM_UP + steps), processes)
    for baseline in dict.fromkeys(timing.baseline for timing in found.timings):
        headings = ("way", "ms", "min", "max", "ratio", "min", "max", *amounts)
        table = Table(*headings, title=f"milliseconds a step, and speed as a ratio to {baseline}")
        for timing in found.timings:
            if timing.baseline == baseline:
                row = [f"{1000 * f(timing.seconds):.0f}" for f in (statistics.median, min, max)]
                row += [f"{f(timing.ratios):.2f}" for f in (statistics.median, min, max)]
                seconds = statistics.median(timing.seconds)
                table.add_row(timing.way, *row, *(f"{amount / seconds:{form}}" for amount, form in amounts.values()))
        console.print(table)
    shape = f"{count(options, work.vocabulary) / 1e6:.2f} M parameters, {micro_batches} micro-batches of {size} sequences"
    console.print(f"{model}: {shape}, {dtype}; losses of the first steps agree to {found.difference:.1e}", highlight=False)
    console.print(f"medians over {rounds} rounds of {steps} steps, each way in turn", highlight=False)


@app.command()
def checkpoint(
    model: Annotated[Path, typer.Option(help="Size and form of the model.")] = Path("configs/models/base.yaml"),
    tokenizers: Annotated[
        Path | None, typer.Option(help="Folder of tokenizers: then conversion is measured too.", show_default=False)
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Folder on the disk to measure; a temporary one by default.", show_default=False)
    ] = None,
    dp: Annotated[int, typer.Option(min=1, help="Data-parallel processes.")] = 1,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel processes.")] = 1,
    zero: Annotated[int, typer.Option(min=0, help="Stage of ZeRO: 1, 2 or 3.")] = 1,
    dtype: Annotated[str, typer.Option(help="Of weights: float32 or bfloat16.")] = "float32",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; every way is measured once in each.")] = 3,
) -> None:
    """Saving, loading and converting, as ratios to DeepSpeed's save_checkpoint, load_checkpoint and zero_to_fp32.

    Both write the same engine's state. A ratio of seconds below 1 is faster than DeepSpeed, of memory below 1 is less.
    """
    import tempfile

    from rich.console import Console
    from rich.table import Table

    from gptface_dist.benchmarks import checkpoint
    from gptface_dist.benchmarks.step import machine
    from gptface_dist.config import load
    from gptface_dist.model.options import ModelOptions
    from gptface_dist.model.parameters import count
    from gptface_dist.parallel.layout import Layout
    from gptface_dist.parallel.options import EngineOptions
    from gptface_dist.tokenizers.vocabulary import VOCABULARY_NAME, Vocabulary

    options = load(ModelOptions, model, [])
    # Without tokenizers, a made-up vocabulary of usual size.
    words = Vocabulary(8192, 1024, "a" * 64, "b" * 64) if tokenizers is None else Vocabulary.load(tokenizers / VOCABULARY_NAME)
    task = checkpoint.Task(options, words, Layout(dp=dp, tp=tp, zero=zero), EngineOptions(dtype), tokenizers)
    console = Console()
    console.print(machine(task.layout.world), highlight=False)
    numbers = count(options, words)
    console.print(
        f"{model}: {numbers / 1e6:.1f} M parameters, {12 * numbers / 1e9:.2f} GB of weights and moments, {task.layout}, {dtype}"
    )
    with tempfile.TemporaryDirectory(dir=folder) as space, bar() as progress:
        shown = progress.add_task("starting", total=checkpoint.parts(task, rounds))
        found = checkpoint.compare(task, Path(space), rounds, lambda what: progress.update(shown, advance=1, description=what))
    table = Table("", "way", "s", "min", "max", "ratio", "MB more memory", "ratio", "GB on disk")
    for one in found:
        theirs = next(other for other in found if (other.what, other.way) == (one.what, checkpoint.THEIRS))
        seconds = [f"{f(one.seconds):.2f}" for f in (statistics.median, min, max)]
        ratio = statistics.median(a / b for a, b in zip(one.seconds, theirs.seconds, strict=True))
        more = f"{max(one.memory) / max(1, max(theirs.memory)):.2f}"
        table.add_row(
            one.what, one.way, *seconds, f"{ratio:.2f}", f"{max(one.memory) / 1e6:.0f}", more, f"{one.written / 1e9:.2f}"
        )
    console.print(table)
    console.print(
        f"medians over {rounds} rounds, each way in turn; memory is the largest of all rounds and processes", highlight=False
    )


@app.command()
def loss(
    rows: Annotated[int, typer.Option(min=1, help="Masked tokens.")] = 4096,
    columns: Annotated[int, typer.Option(min=2, help="Ids.")] = 16384,
    hidden: Annotated[int, typer.Option(min=1, help="Width of the features.")] = 768,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    chunk: Annotated[list[int] | None, typer.Option(min=1, help="Rows at a time; repeat for several.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 5,
) -> None:
    """Time and memory of the chunked output loss and its gradients, as ratios to logits that are there as a whole."""
    from rich.console import Console
    from rich.table import Table

    from gptface_dist.errors import UserError

    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype must be float32 or bfloat16, got {dtype!r}")
    console = Console()
    work = checkpoint.Work(rows, columns, hidden, dtype, tuple(chunk or (256, 1024)))
    with console.status("") as status:
        costs = checkpoint.compare(work, rounds, status.update)
    base = costs[0]
    table = Table("way", "ms", "ratio", "MiB beyond inputs", "ratio", "error of the weight gradient")
    for cost in costs:
        time, memory = (
            f"{a / b:.2f}" if b else "" for a, b in ((cost.milliseconds, base.milliseconds), (cost.mebibytes, base.mebibytes))
        )
        table.add_row(cost.way, f"{cost.milliseconds:.0f}", time, f"{cost.mebibytes:.0f}", memory, f"{cost.difference:.1e}")
    console.print(table)
    console.print(f"{checkpoint.hardware()}; {rows} rows, {columns} ids, width {hidden}, {dtype}", highlight=False)
    console.print(f"medians of {rounds} rounds forward and backward, each way in a process of its own", highlight=False)


def _amounts(work: "Workload", steps: range, processes: int) -> dict[str, tuple[float, str]]:
    """What a mean step does, to be divided by its seconds: heading -> (amount, format)."""
    import torch

    from gptface_dist.benchmarks.work import done
    from gptface_dist.model.flops import model_flops, peak_tflops

    amount = done([batch for step in steps for batch in work.batches(step)])
    flops = model_flops(work.model, work.text_ids, work.image_codes, amount) / len(steps) / processes
    found = {"tokens/s": (amount.tokens / len(steps), ",.0f")}
    if torch.cuda.is_available():
        found["TFLOP/s a GPU"] = (flops / 1e12, ".1f")
        peak = peak_tflops(torch.cuda.get_device_name(), work.engine.dtype)
        if peak is not None:
            found["MFU"] = (flops / 1e12 / peak, ".1%")
    return found
