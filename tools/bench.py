"""``gptface bench``: speed and memory, as ratios to a named baseline in the same run."""

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from gptface_dist.engine.workload import Workload

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

    from gptface_dist.data.benchmark import BASELINE, compare, hardware

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
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    from gptface_dist.config import load
    from gptface_dist.engine import benchmark
    from gptface_dist.engine.options import EngineOptions
    from gptface_dist.engine.workload import Workload
    from gptface_dist.model.names import count
    from gptface_dist.model.options import ModelOptions

    options = load(ModelOptions, model, [])
    work = Workload(options, micro_batches, size, text_length, grid, text_ids, image_codes, EngineOptions(dtype))
    console = Console()
    console.print(benchmark.machine(processes), highlight=False)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=benchmark.parts(processes, rounds), completed=-1)
        found = benchmark.compare(work, processes, rounds, steps, lambda what: bar.update(task, advance=1, description=what))
    if not found.timings:
        table = Table("way", *(f"loss of step {step + 1}" for step in range(benchmark.WARM_UP)))
        for way, losses in found.losses.items():
            table.add_row(way, *(f"{loss:.7g}" for loss in losses))
        console.print(table)
        print(f"losses differ by {found.difference:.1e}: not the same work, so nothing was timed")
        raise typer.Exit(1)
    amounts = _amounts(work, range(benchmark.WARM_UP, benchmark.WARM_UP + steps), processes)
    for baseline in dict.fromkeys(timing.baseline for timing in found.timings):
        headings = ("way", "ms a step", "min", "max", "speed ratio", "min", "max", *amounts)
        table = Table(*headings, title=f"against {baseline}")
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


def _amounts(work: "Workload", steps: range, processes: int) -> dict[str, tuple[float, str]]:
    """What a mean step does, to be divided by its seconds: heading -> (amount, format)."""
    import torch

    from gptface_dist.sequence import IGNORE
    from gptface_dist.training.flops import Work, model_flops, peak_tflops

    batches = [batch for step in steps for batch in work.batches(step)]
    lengths = torch.cat([batch.lengths for batch in batches])
    labels = torch.cat([batch.labels[batch.labels != IGNORE] for batch in batches])
    text = int((labels < work.vocabulary.image_offset).sum())
    tokens = int(lengths.sum())
    done = Work(tokens, int((lengths**2).sum()), text, len(labels) - text, len(lengths))
    flops = model_flops(work.model, work.text_ids, work.image_codes, done) / len(steps) / processes
    found = {"tokens/s": (tokens / len(steps), ",.0f")}
    if torch.cuda.is_available():
        found["TFLOP/s a GPU"] = (flops / 1e12, ".1f")
        peak = peak_tflops(torch.cuda.get_device_name(), work.engine.dtype)
        if peak is not None:
            found["MFU"] = (flops / 1e12 / peak, ".1%")
    return found
