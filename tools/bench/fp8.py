"""``gptface bench fp8``: what FP8 attention costs in loss."""

from pathlib import Path
from typing import Annotated

import typer

from gptface_dist.tools.progress import bar


def fp8(
    config: Annotated[Path, typer.Argument(help="Configuration of the run (YAML).", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. run.steps=200.")] = None,
    seeds: Annotated[int, typer.Option(min=2, help="Seeds of initial weights: 0, 1, ...")] = 3,
) -> None:
    """Held-out loss of runs with FP8 attention against runs without, over several seeds. Status 1 where it is beyond noise.

    Each run is in this process, on the same batches, and leaves nothing behind. On a CPU the recipe is computed in plain
    PyTorch, rounding for rounding.
    """
    from rich.console import Console
    from rich.table import Table

    from gptface_dist.config import load_config
    from gptface_dist.parallel import libraries
    from gptface_dist.training import checks
    from gptface_dist.training.config import Config

    with libraries.quiet_imports():
        libraries.import_libraries()
        from gptface_dist.training.analysis import fp8_study as study

    options = study.prepared(load_config(Config, config, overrides or []))
    vocabulary = checks.check_run(options, 1)
    with bar("steps") as progress:
        task = progress.add_task("training", total=len(study.KERNELS) * seeds * options.run.steps)

        def done(kernel: str, seed: int, loss: float) -> None:
            progress.console.print(f"{kernel}, seed {seed}: held-out loss {loss:.4f}", highlight=False)

        gaps = study.compare(options, vocabulary, range(seeds), lambda: progress.advance(task), done)
    table = Table("held out", *gaps)
    for seed in range(seeds):
        table.add_row(f"sdpa, seed {seed}", *(f"{gap.plain[seed]:.4f}" for gap in gaps.values()))
        table.add_row(f"fp8, seed {seed}", *(f"{gap.fp8[seed]:.4f}" for gap in gaps.values()))
    summary = Table("held out", "mean sdpa", "mean fp8", "gap", "standard error", "")
    for name, gap in gaps.items():
        means = [sum(losses) / seeds for losses in (gap.plain, gap.fp8)]
        verdict = "within noise" if gap.within_noise() else "BEYOND NOISE"
        summary.add_row(name, *(f"{mean:.4f}" for mean in means), f"{gap.gap:+.4f}", f"{gap.noise:.4f}", verdict)
    console = Console()
    console.print(table)
    console.print(summary)
    fp8 = options.engine.attention.fp8
    recipe = f"backward {fp8.backward}, smooth {fp8.smooth}, hadamard {fp8.hadamard}"
    console.print(f"{options.run.steps} steps, {options.engine.dtype}, {recipe}; within noise: at most 2 standard errors")
    if not gaps["loss"].within_noise():
        raise typer.Exit(1)
