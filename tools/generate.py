"""`gptface generate`, `edit`, `caption`, `score`: what a release can do with pictures and text."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptface_dist.errors import UserError
from gptface_dist.tools.progress import bar

if TYPE_CHECKING:
    from gptface_dist.generation import Generator, Guidance, Sampling

# torch, diffusers and sentencepiece are imported inside the commands: `gptface --help` answers at once.

Release = Annotated[Path, typer.Argument(help="Folder of a release.", show_default=False)]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda where there is one.", show_default=False)]
Steps = Annotated[int | None, typer.Option(help="Passes of the model a picture.", show_default="12")]
Temperature = Annotated[float | None, typer.Option(help="Divides the logits; 0 takes the likeliest.", show_default="1")]
TopK = Annotated[int | None, typer.Option(help="Draw among so many likeliest tokens; 0: all.", show_default="0")]
Seed = Annotated[int, typer.Option(help="Of the noise; the same seed gives the same results.")]
GradientStrength = Annotated[float | None, typer.Option(help="Guidance by the matching loss's gradient.", show_default="0")]
ClassifierFree = Annotated[float | None, typer.Option(help="Strength of classifier-free guidance.", show_default="0")]
Rerank = Annotated[int | None, typer.Option(help="Draw so many for each result, keep the best match.", show_default="1")]


def generate(
    release: Release,
    out: Annotated[Path, typer.Argument(help="Picture to write; of several, a sheet.", show_default=False)],
    text: Annotated[list[str], typer.Option(help="What the faces show; may be given again.", show_default=False)],
    n: Annotated[int, typer.Option("-n", help="Faces for each text.")] = 1,
    seed: Seed = 0,
    steps: Steps = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    classifier_free: ClassifierFree = None,
    gradient: GradientStrength = None,
    rerank: Rerank = None,
    columns: Annotated[int | None, typer.Option(help="Faces in a row; by default those of one text.")] = None,
    device: Device = None,
) -> None:
    """Draw faces for a text."""
    from gptface_dist.generation import Guidance, Sampling
    from gptface_dist.generation.pictures import check_out, strip, write_image

    check_out(out)
    sampling = _sampling(Sampling(), seed, steps, temperature, top_k)
    guidance = _guidance(Guidance(), classifier_free, gradient, rerank)
    generator = load(release, device)
    with _progress("drawing", len(text) * n * guidance.rerank) as on_step:
        drawn = generator.generate(text, n, sampling, guidance, on_step)
    write_image(strip([picture.image for picture in drawn], columns or n), out)
    for words in text:
        found = ", ".join(f"{picture.match:.3f}" for picture in drawn if picture.text == words)
        print(f"{words} p(match) {found}")
    print(f"{len(drawn)} of {generator.size}x{generator.size} pixels in {out}")


def edit(
    release: Release,
    out: Annotated[Path, typer.Argument(help="Picture to write: PNG keeps pixels exactly.", show_default=False)],
    image: Annotated[Path, typer.Option(help="Picture to edit.", show_default=False)],
    text: Annotated[
        list[str] | None, typer.Option(help="What it is to show. Given again: the next edit, of what came out.")
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
    seed: Seed = 0,
    steps: Steps = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    classifier_free: ClassifierFree = None,
    gradient: GradientStrength = None,
    rerank: Rerank = None,
    feather: Annotated[int, typer.Option(help="Pixels inside the region over which the new picture fades in.")] = 2,
    resize: Annotated[bool, typer.Option("--resize", help="Cut and scale a picture of another size.")] = False,
    strip: Annotated[Path | None, typer.Option(help="Also write a sheet of the picture before and after each edit.")] = None,
    device: Device = None,
) -> None:
    """Draw a region of a picture anew for a text; the rest stays as it is. Several --text make one edit after the other."""
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
    sampling = _sampling(preset.sampling, seed, steps, temperature, top_k)
    guidance = _guidance(preset.guidance, classifier_free, gradient, rerank)
    generator = load(release, device)
    chosen = [regions.region(where, generator.size, parsing) for where in wheres]
    current = generator.read(image, resize)
    shown = [current]
    with _progress("editing", (len(texts) - 1 + n) * guidance.rerank) as on_step:
        for number, (words, where) in enumerate(zip(texts, chosen, strict=True), 1):
            results = n if number == len(texts) else 1
            drawn = generator.edit(current, words, where, task, results, sampling, guidance, feather, on_step=on_step)
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
    n: Annotated[int, typer.Option("-n", help="Captions, the best match first.")] = 1,
    seed: Seed = 0,
    steps: Steps = None,
    temperature: Annotated[float | None, typer.Option(help="Divides the logits.", show_default="0.5")] = None,
    top_k: TopK = None,
    gradient: GradientStrength = None,
    rerank: Rerank = None,
    device: Device = None,
) -> None:
    """Describe a picture; each line is p(match) and a caption."""
    from gptface_dist.generation import Guidance
    from gptface_dist.generation.presets import CAPTION_LENGTHS, CAPTION_SAMPLING

    sampling = _sampling(CAPTION_SAMPLING, seed, steps, temperature, top_k)
    guidance = _guidance(Guidance(), None, gradient, rerank)
    generator = load(release, device)
    with _progress("describing", n * len(CAPTION_LENGTHS) * guidance.rerank) as on_step:
        found = generator.caption(image, n, sampling, guidance, on_step=on_step)
    for one in found:
        print(f"{one.match:.3f}  {one.text}")


def score(
    release: Release,
    image: Annotated[Path, typer.Argument(help="Picture.", show_default=False)],
    text: Annotated[str, typer.Argument(help="Text.", show_default=False)],
    device: Device = None,
) -> None:
    """Print p(match): how likely the model finds it that picture and text belong together."""
    print(f"{load(release, device).score(image, text):.4f}")


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    for command in (generate, edit, caption, score):
        app.command(command.__name__)(command)


def load(release: Path, device: str | None) -> "Generator":
    """A release on ``device``: by default a GPU where there is one; :class:`UserError` for another name or no GPU."""
    import torch

    from gptface_dist.generation import Generator

    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if chosen not in ("cpu", "cuda"):
        raise UserError(f"no device {chosen!r}: use cpu or cuda")
    if chosen == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device here: use --device cpu")
    return Generator.from_pretrained(release, chosen)


def _sampling(base: "Sampling", seed: int, steps: int | None, temperature: float | None, top_k: int | None) -> "Sampling":
    """``base`` with what was given."""
    return replace(
        base,
        seed=seed,
        steps=base.steps if steps is None else steps,
        temperature=base.temperature if temperature is None else temperature,
        top_k=base.top_k if top_k is None else top_k,
    )


def _guidance(base: "Guidance", classifier_free: float | None, gradient: float | None, rerank: int | None) -> "Guidance":
    """``base`` with what was given."""
    return replace(
        base,
        gradient=base.gradient if gradient is None else replace(base.gradient, strength=gradient),
        classifier_free=base.classifier_free if classifier_free is None else classifier_free,
        rerank=base.rerank if rerank is None else rerank,
    )


@contextmanager
def _progress(doing: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar of one task, and what to call when a part of it is done."""
    with bar() as progress:
        task = progress.add_task(doing, total=total)
        yield lambda: progress.advance(task)
