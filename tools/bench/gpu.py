"""``gptface bench gpu``: everything that needs a GPU, checked and measured in minutes."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from gptface_dist.errors import UserError


def gpu(
    out: Annotated[Path, typer.Option(help="Folder of the results.", file_okay=False)] = Path("out/gpu"),
    total: Annotated[float, typer.Option(min=1, help="Seconds for everything; what does not fit is left out.")] = 500.0,
    only: Annotated[str, typer.Option(help="Parts to run, with commas between; PART-VARIANT for one of its processes.")] = "",
    dry: Annotated[bool, typer.Option("--dry", help="Run every part at toy sizes on the CPU; nothing is measured.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Run nothing: show what the folder holds.")] = False,
    tokens: Annotated[
        Path | None, typer.Option(help="Token shards to train on; made-up ones without it.", show_default=False)
    ] = None,
) -> None:
    """Check and measure on this machine's GPU all that needs one, correctness first. Status 1 where something is not right.

    Each part runs in a process of its own under a time limit, and its results are on disk as they come: a crash, a hang or an
    early end loses nothing. With the same --out, a later call replaces the parts that it runs and keeps the others.
    """
    from gptface_dist.benchmarks.gpu import driver, plan, token_shards
    from gptface_dist.benchmarks.gpu.table import table
    from gptface_dist.benchmarks.gpu.verdict import right

    tasks = plan.tasks([name.strip() for name in only.split(",") if name.strip()], dry)
    if show:
        recorded = driver.recorded(out)
        if not recorded:
            raise UserError(f"--show: {out} holds no results of gptface bench gpu")
        print(table(recorded))
        raise typer.Exit(0 if right(recorded) else 1)
    if tokens is not None:
        token_shards.recorded_vocabulary(tokens)
    options = driver.Options(out, driver.checkout(), total, dry, tokens)
    driver.run(tasks, options, lambda line: print(line, file=sys.stderr, flush=True))
    results = driver.results(out, tasks)
    print(table(driver.recorded(out), results))
    raise typer.Exit(0 if right(results) else 1)
