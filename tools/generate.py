"""`gptface generate`, `edit`, `caption`, `score`: what a release can do with pictures and text."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptface_dist.errors import UserError
from gptface_dist.tools.progress import bar

if TYPE_CHECKING:
    from gptface_dist.generation import Generator

# torch, diffusers and sentencepiece are imported inside the commands: `gptface --help` answers at once.

Release = Annotated[Path, typer.Argument(help="Folder of a release.", show_default=False)]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda where there is one.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="key=value, e.g. guidance.rerank=4 sampling.seed=3; --options lists all.", show_default=False),
]


def _print_options(context: typer.Context, wanted: bool) -> None:
    """Print each key=value with its default in this command and its meaning, then exit."""
    if not wanted:
        return
    from gptface_dist.config import options
    from gptface_dist.generation.options import GenerationOptions
    from gptface_dist.generation.presets import CAPTION_SAMPLING, TASKS

    base = GenerationOptions(CAPTION_SAMPLING) if context.info_name == "caption" else GenerationOptions()
    for option in options(base):
        typer.echo(f"{option.key}={option.value}\n    {option.meaning}")
    for name, preset in TASKS.items() if context.info_name == "edit" else ():
        pairs = zip(options(base), options(preset.options), strict=True)
        changed = [f"{own.key}={own.value}" for default, own in pairs if own != default]
        typer.echo(f"--task {name}: {' '.join(changed) or 'the defaults above'}")
    raise typer.Exit


Options = Annotated[
    bool, typer.Option("--options", callback=_print_options, is_eager=True, help="List the key=value options and exit.")
]


def generate(
    release: Release,
    out: Annotated[Path, typer.Argument(help="Picture to write; of several, a sheet.", show_default=False)],
    text: Annotated[list[str], typer.Option(help="What the faces show; may be given again.", show_default=False)],
    overrides: Overrides = None,
    n: Annotated[int, typer.Option("-n", help="Faces for each text.")] = 1,
    columns: Annotated[int | None, typer.Option(help="Faces in a row; by default those of one text.")] = None,
    device: Device = None,
    list_options: Options = False,
) -> None:
    """Draw faces for a text."""
    from gptface_dist.config import override
    from gptface_dist.generation.options import GenerationOptions
    from gptface_dist.generation.pictures import check_out, strip, write_image

    check_out(out)
    options = override(GenerationOptions(), overrides or [])
    generator = load_generator(release, device)
    with _progress("drawing", len(text) * n * options.guidance.rerank) as on_step:
        drawn = generator.generate(text, n, options.sampling, options.guidance, on_step)
    write_image(strip([picture.image for picture in drawn], columns or n), out)
    for words in text:
        matches = ", ".join(f"{picture.match:.3f}" for picture in drawn if picture.text == words)
        print(f"{words} p(match) {matches}")
    print(f"{len(drawn)} of {generator.size}x{generator.size} pixels in {out}")


def edit(
    release: Release,
    out: Annotated[Path, typer.Argument(help="Picture to write: PNG keeps pixels exactly.", show_default=False)],
    image: Annotated[Path, typer.Option(help="Picture to edit.", show_default=False)],
    overrides: Overrides = None,
    text: Annotated[
        list[str] | None, typer.Option(help="What it is to show. Given again: the next edit, of the result.")
    ] = None,
    region: Annotated[
        list[str] | None,
        typer.Option(help="What may change: left,top,right,bottom; a mask file, white there; or a part of the face."),
    ] = None,
    parsing: Annotated[
        Path | None, typer.Option(help="Parsing mask of the picture: then --region names one of its classes.")
    ] = None,
    task: Annotated[str, typer.Option(help="attribute, expression, occluder or inpainting: sets the defaults.")] = "attribute",
    n: Annotated[int, typer.Option("-n", help="Different results of the last edit; of several, OUT is a sheet.")] = 1,
    feather: Annotated[int, typer.Option(help="Pixels inside the region over which the new picture fades in.")] = 2,
    resize: Annotated[bool, typer.Option("--resize", help="Cut and scale a picture of another size.")] = False,
    strip: Annotated[Path | None, typer.Option(help="Also write a sheet of the picture before and after each edit.")] = None,
    device: Device = None,
    list_options: Options = False,
) -> None:
    """Redraw a region of a picture for a text; the rest stays unchanged. Several --text make one edit after the other."""
    from gptface_dist.config import override
    from gptface_dist.generation import pictures, presets
    from gptface_dist.generation import region as regions

    for path in (out, *([strip] if strip else [])):
        pictures.check_out(path)
    preset = presets.task(task)
    texts = list(text or [""])
    wheres = list(region or ([preset.region] if preset.region else []))
    if not wheres:
        raise UserError(f"the task {task} needs a --region: a box, a mask, or one of {', '.join(regions.PLACES)}")
    if len(wheres) == 1:
        wheres *= len(texts)
    if len(wheres) != len(texts):
        raise UserError(f"{len(texts)} texts and {len(wheres)} regions: give one region, or one for each text")
    options = override(preset.options, overrides or [])
    generator = load_generator(release, device)
    chosen = [regions.region(where, generator.size, parsing) for where in wheres]
    current = generator.read_picture(image, resize)
    shown = [current]
    with _progress("editing", (len(texts) - 1 + n) * options.guidance.rerank) as on_step:
        for number, (words, where) in enumerate(zip(texts, chosen, strict=True), 1):
            results = n if number == len(texts) else 1
            drawn = generator.edit(
                current, words, where, task, results, options.sampling, options.guidance, feather, on_step=on_step
            )
            current = drawn[0]
            shown += drawn
    pictures.write_image(pictures.strip([picture.image for picture in drawn], n), out)
    if strip:
        pictures.write_image(pictures.strip([picture.image for picture in shown], len(shown)), strip)
    for number, picture in enumerate(shown[1:], 1):
        print(f"{number}: {picture.text or '(no text)'} p(match) {picture.match:.3f}")
    print(f"{generator.size}x{generator.size} pixels in {out}")


def caption(
    release: Release,
    image: Annotated[Path, typer.Argument(help="Picture to describe.", show_default=False)],
    overrides: Overrides = None,
    n: Annotated[int, typer.Option("-n", help="Captions, the best match first.")] = 1,
    device: Device = None,
    list_options: Options = False,
) -> None:
    """Describe a picture; each line is p(match) and a caption."""
    from gptface_dist.config import override
    from gptface_dist.generation.options import GenerationOptions
    from gptface_dist.generation.presets import CAPTION_LENGTHS, CAPTION_SAMPLING

    options = override(GenerationOptions(CAPTION_SAMPLING), overrides or [])
    generator = load_generator(release, device)
    with _progress("describing", n * len(CAPTION_LENGTHS) * options.guidance.rerank) as on_step:
        captions = generator.caption(image, n, options.sampling, options.guidance, on_step=on_step)
    for entry in captions:
        print(f"{entry.match:.3f}  {entry.text}")


def score(
    release: Release,
    image: Annotated[Path, typer.Argument(help="Picture.", show_default=False)],
    text: Annotated[str, typer.Argument(help="Text.", show_default=False)],
    device: Device = None,
) -> None:
    """Print p(match): how likely the model finds it that picture and text belong together."""
    print(f"{load_generator(release, device).score(image, text):.4f}")


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    for command in (generate, edit, caption, score):
        app.command(command.__name__)(command)


def load_generator(release: Path, device: str | None) -> "Generator":
    """Load a release on ``device``, by default a GPU if there is one; :class:`UserError` for another name or a missing GPU."""
    import torch

    from gptface_dist.generation import Generator

    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if chosen not in ("cpu", "cuda"):
        raise UserError(f"no device {chosen!r}: use cpu or cuda")
    if chosen == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device here: use --device cpu")
    return Generator.from_pretrained(release, chosen)


@contextmanager
def _progress(doing: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a bar of ``total`` parts; yields the function that advances it by one."""
    with bar() as progress:
        task = progress.add_task(doing, total=total)
        yield lambda: progress.advance(task)
