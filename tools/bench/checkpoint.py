"""``gptface bench checkpoint``: saving, loading and converting."""

import statistics
from pathlib import Path
from typing import Annotated

import typer

from gptface_dist.tools.progress import bar


def checkpoint(
    model: Annotated[Path, typer.Option(help="Size and form of the model.")] = Path("configs/models/base.yaml"),
    tokenizers: Annotated[
        Path | None, typer.Option(help="Folder of tokenizers: then conversion is measured too.", show_default=False)
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Folder on the disk to measure; a temporary own by default.", show_default=False)
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

    from gptface_dist import host
    from gptface_dist.benchmarks import checkpoint as benchmark
    from gptface_dist.benchmarks.step import machine
    from gptface_dist.config import load_config
    from gptface_dist.model.options import ModelOptions
    from gptface_dist.objectives.milm_itm import MilmItm
    from gptface_dist.parallel.layout import Layout
    from gptface_dist.parallel.options import EngineOptions
    from gptface_dist.tokenizers.vocabulary import VOCABULARY_NAME, Vocabulary

    options = load_config(ModelOptions, model, [])
    # Without tokenizers, a made-up vocabulary of usual size.
    words = Vocabulary(8192, 1024, "a" * 64, "b" * 64) if tokenizers is None else Vocabulary.load(tokenizers / VOCABULARY_NAME)
    task = benchmark.CheckpointWorkload(options, words, Layout(dp=dp, tp=tp, zero=zero), EngineOptions(dtype), tokenizers)
    host.warn_of_emulation(dtype, "--dtype")
    console = Console()
    console.print(machine(task.layout.world), highlight=False)
    numbers = MilmItm().parameter_count(options, words)
    console.print(
        f"{model}: {numbers / 1e6:.1f} M parameters, {12 * numbers / 1e9:.2f} GB of weights and moments, {task.layout}, {dtype}"
    )
    with tempfile.TemporaryDirectory(dir=folder) as space, bar() as progress:
        shown = progress.add_task("starting", total=benchmark.parts(task, rounds))
        measured = benchmark.compare(
            task, Path(space), rounds, lambda what: progress.update(shown, advance=1, description=what)
        )
    table = Table("", "way", "s", "min", "max", "ratio", "MB more memory", "ratio", "GB on disk")
    for own in measured:
        theirs = next(other for other in measured if (other.what, other.way) == (own.what, benchmark.THEIRS))
        seconds = [f"{f(own.seconds):.2f}" for f in (statistics.median, min, max)]
        ratio = statistics.median(a / b for a, b in zip(own.seconds, theirs.seconds, strict=True))
        more = f"{max(own.memory) / max(1, max(theirs.memory)):.2f}"
        table.add_row(
            own.what, own.way, *seconds, f"{ratio:.2f}", f"{max(own.memory) / 1e6:.0f}", more, f"{own.written / 1e9:.2f}"
        )
    console.print(table)
    console.print(
        f"medians over {rounds} rounds, each way in turn; memory is the largest of all rounds and processes", highlight=False
    )
