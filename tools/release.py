"""`gptface convert` and `gptface inspect`: releases of training checkpoints, and a look into both."""

from pathlib import Path
from typing import Annotated

import typer


def convert(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a checkpoint, or of a run: then its latest one.")],
    release: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    dtype: Annotated[str, typer.Option(help="Of the released weights: bfloat16 (or bf16), or float32.")] = "bfloat16",
    ema: Annotated[bool, typer.Option("--ema", help="Release the running average of the weights.")] = False,
    tokenizers: Annotated[Path | None, typer.Option(help="The run's tokenizers, where they have moved.")] = None,
    name: Annotated[str, typer.Option(help="What people call the model.")] = "GPTFace",
    license: Annotated[str, typer.Option(help="Licence of the weights: the hub's identifier, or words.")] = "unknown",
    data_license: Annotated[str, typer.Option(help="Licence of the training data.")] = "unknown",
) -> None:
    """Make a release of a training checkpoint: plain PyTorch, safetensors, tokenizers, model card.

    Refused, with nothing written, unless the plain model gives the logits that the training run recorded.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

    from gptface_dist.release.convert import ConvertOptions
    from gptface_dist.release.convert import convert as to_release

    options = ConvertOptions({"bf16": "bfloat16"}.get(dtype, dtype), ema, tokenizers, name, license, data_license)
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.advance(tasks[what], done)

        card = to_release(checkpoint, release, options, report)
    for title, errors in (("distributed and plain model", card.parity), (f"float32 and {options.dtype}", card.rounding)):
        print(f"{title}: logits agree to " + ", ".join(f"{error:.1e} ({kind})" for kind, error in errors.items()))
    print(f"{release}: step {card.step} of {checkpoint}")


def inspect(
    path: Annotated[Path, typer.Argument(help="Folder of a release, of a checkpoint, or of a run.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="Every tensor on a line of its own.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every file with its SHA-256. Status 1 if one differs.")
    ] = False,
) -> None:
    """Show the content of a release or checkpoint: model, provenance, versions, tensors, hashes."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Column, Table

    from gptface_dist.release import inspection

    inspected = inspection.inspect(path)
    console = Console(soft_wrap=False)
    console.print(f"{inspected.kind} {inspected.path}", highlight=False)
    about = Table("", Column(overflow="fold"), show_header=False, box=None)
    for title, fact in inspected.facts.items():
        about.add_row(title, fact)
    rows = inspected.tensors if tensors else inspection.group(inspected)
    columns = Column("tensor", overflow="fold"), Column("tensors", justify="right"), Column("shape", no_wrap=True), "dtype"
    listing = Table(*columns, Column("values", justify="right"), box=SIMPLE)
    if tensors:
        listing.add_column("file" if inspected.kind == "release" else "fingerprint", overflow="fold")
    for row in rows:
        shape = " x ".join(str(side) for side in row.shape)
        listing.add_row(row.name, str(row.count), shape, row.dtype, f"{row.values:,}", *([row.where] if tensors else []))
    console.print(about)
    console.print(listing)
    if verify:
        with Console(stderr=True).status("comparing hashes"):
            problems = list(inspection.verify(inspected.path))
        for problem in problems:
            print(problem)
        print("every file is what was written" if not problems else f"problems: {len(problems)}")
        raise typer.Exit(1 if problems else 0)
