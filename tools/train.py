"""``gptface train``: a training run; ``gptface curves``: its losses, drawn."""

from pathlib import Path
from typing import Annotated

import typer

from gptface_dist.errors import UserError


def train(
    config: Annotated[Path, typer.Argument(help="Configuration of the run (YAML).", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. layout.pp=2 run.steps=200.")] = None,
) -> None:
    """Train. Started alone, this starts the processes that the layout needs, on this machine; torchrun's and srun's are used.

    When one process fails, all end within seconds, with one message and the same status.
    """
    from gptface_dist.config import load_config
    from gptface_dist.distributed.rank import RankInfo
    from gptface_dist.distributed.watchdog import Watchdog
    from gptface_dist.parallel import libraries
    from gptface_dist.training import run_folder
    from gptface_dist.training.config import Config

    rank_info = RankInfo.from_env()
    # Every process reads the same file: before they have met, rank 0 speaks for all.
    try:
        options = load_config(Config, config, overrides or [])
    except UserError:
        if rank_info.rank:
            raise SystemExit(2) from None
        raise
    if rank_info.world == 1 and options.layout.world > 1:
        from gptface_dist import host
        from gptface_dist.launch import local
        from gptface_dist.training import checks

        checks.check_run(options, options.layout.world)
        run_folder.settled(options)
        host.check_gpus(options.layout.world)
        raise typer.Exit(local.run(["train", str(config), *(overrides or [])], options.layout.world))
    with Watchdog(rank_info, options.run.timeout_s) as watchdog:
        from gptface_dist.training import checks

        vocabulary = checks.check_run(options, rank_info.world)
        options = run_folder.settled(options)
        with libraries.quiet_imports():
            libraries.import_libraries()
            from gptface_dist.training.run import train as run
        run(options, vocabulary, watchdog)


def curves(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Picture to write (.png, .pdf, .svg).")] = Path("curves.png"),
    within: Annotated[float | None, typer.Option(help="Status 1 where runs differ by more, relative to the first.")] = None,
) -> None:
    """Draw the losses of runs together, and print how far each is from the first one."""
    from gptface_dist.training.analysis import curves

    differences = [curves.difference(runs[0], other) for other in runs[1:]]
    curves.draw(runs, out)
    for other, (steps, relative) in zip(runs[1:], differences, strict=True):
        print(f"{other} against {runs[0]}, {steps} steps: " + ", ".join(f"{name} {x:.1e}" for name, x in relative.items()))
    print(out)
    # Not "any above it": NaN is above nothing.
    if within is not None and not all(x <= within for _, relative in differences for x in relative.values()):
        raise typer.Exit(1)
