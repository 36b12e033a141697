"""``gptface train``: a training run."""

from pathlib import Path
from typing import Annotated

import typer

from gptface_dist.errors import UserError


def train(
    config: Annotated[Path, typer.Argument(help="Configuration of the run (YAML).", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. layout.pp=2 run.steps=200.")] = None,
) -> None:
    """Train. The same command alone, under torchrun, and under Slurm's srun.

    Resumes from the run's folder. Every rank ends with the same status when one of them fails.
    """
    from gptface_dist.config import Config, load
    from gptface_dist.place import find
    from gptface_dist.training.failure import watched

    place = find()
    # Every process reads the same file: before they have met, rank 0 speaks for all.
    try:
        options = load(Config, config, overrides or [])
        if place.world == 1 and options.layout.world > 1:
            _ask_for_torchrun(options.layout.world, config, overrides or [])
    except UserError:
        if place.rank:
            raise SystemExit(2) from None
        raise
    with watched(place, options.run.timeout_s) as watch:
        from gptface_dist import host

        with host.hushed():
            from gptface_dist.training.run import train as run
        run(options, watch)


def _ask_for_torchrun(world: int, config: Path, overrides: list[str]) -> None:
    import shlex

    program = ["torchrun", f"--nproc-per-node={world}", "-m", "gptface_dist.tools.main", "train"]
    command = shlex.join([*program, str(config), *overrides])
    raise UserError(f"this layout needs {world} processes and this one was started alone; on one machine: {command}")
