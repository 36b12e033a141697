"""``gptface bench data``: how fast shards are read."""

import statistics
from pathlib import Path
from typing import Annotated

import typer


def data(
    folders: Annotated[list[Path], typer.Argument(help="Indexed folders of token or picture shards.", show_default=False)],
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds a round.")] = 3.0,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; every way is timed once in each.")] = 5,
) -> None:
    """Samples/s of one process, as a ratio to a bare webdataset loop over the same files."""
    from rich.console import Console
    from rich.table import Table

    from gptface_dist import host
    from gptface_dist.benchmarks.data import BASELINE, compare

    console = Console()
    console.print(host.hardware("numpy", "webdataset"), highlight=False)
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
