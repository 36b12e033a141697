"""``gptface report``: one page of what a run made."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="Folder of the run.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Page to write (.html).", show_default=False)],
    section: Annotated[list[str] | None, typer.Option(help="TITLE=PATH of a picture or text to show; in this order.")] = None,
    title: Annotated[str, typer.Option(help="Title of the page.")] = "GPTFace",
) -> None:
    """Write losses, pictures and texts into one HTML file that needs nothing else."""
    from gptface_dist.training.analysis import report as page

    page.write(out, title, run, [page.Section.parse(text) for text in section or []])
    print(out)
