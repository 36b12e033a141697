"""`gptface tokenizer`: train, join and examine the tokenizers of text and pictures."""

import functools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptface_dist.errors import UserError
from gptface_dist.tokenizers.image_options import PRESETS, ImagePreset
from gptface_dist.tools.progress import bar

if TYPE_CHECKING:
    from torch import Tensor

app = typer.Typer(no_args_is_help=True, help="Tokenizers of text and pictures, and the vocabulary that joins them.")

Data = Annotated[str, typer.Argument(help="Indexed shards of pictures: a folder, or its URL.", show_default=False)]

# torch, diffusers and sentencepiece are imported inside the commands: `gptface --help` answers at once.


@app.command("text")
def train_text(
    data: Data,
    out: Annotated[Path, typer.Argument(help="File to write, by convention FOLDER/text.model.", show_default=False)],
    size: Annotated[int, typer.Option(help="Number of pieces.")] = 8192,
    kind: Annotated[str, typer.Option(help="unigram, or bpe: better on a small corpus.")] = "unigram",
    character_coverage: Annotated[
        float, typer.Option(help="Share of characters that become pieces; the rest is spelled in bytes.")
    ] = 0.9995,
    captions: Annotated[int, typer.Option(help="Captions used at most: of more, a uniform sample.")] = 2_000_000,
    seed: Annotated[int, typer.Option(help="Of that sample.")] = 0,
) -> None:
    """Train the text tokenizer on the captions of DATA (`key.txt` and further `captions` of `key.json`)."""
    from gptface_dist.data import tokenizer_corpus as corpus
    from gptface_dist.tokenizers.text import TextOptions, train_text_tokenizer

    options = TextOptions(size, character_coverage, kind, captions, seed)
    folder = corpus.open_pictures(data)
    unreadable = 0
    with bar() as progress:
        task = progress.add_task("reading captions", total=folder.index.samples)

        def on_sample(readable: bool) -> None:
            nonlocal unreadable
            unreadable += not readable
            progress.advance(task)

        trained = train_text_tokenizer(corpus.captions(folder, on_sample), out, options)
    if unreadable:
        print(f"samples without a readable caption, passed over: {unreadable}")
    print(f"{out}: {trained.size} pieces, sha256 {trained.sha256}")


@app.command("image")
def train_image(
    data: Data,
    out: Annotated[Path, typer.Argument(help="Folder to make, by convention FOLDER/image.", show_default=False)],
    preset: Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}; the options below change it.")] = "tiny",
    size: Annotated[int | None, typer.Option(help="Pixels of a side.")] = None,
    codes: Annotated[int | None, typer.Option(help="Entries of the codebook.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    batch: Annotated[int | None, typer.Option(help="Pictures a step, over all processes.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    adversarial: Annotated[float | None, typer.Option(help="Weight of the patch discriminator; 0 trains none.")] = None,
    vgg: Annotated[float | None, typer.Option(help="Weight of the VGG-16 feature loss.")] = None,
    vgg_weights: Annotated[str | None, typer.Option(help="Safetensors file with a VGG-16 under torchvision's names.")] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="fp32, bf16 (autocast), or auto: as begun, else bf16 where the hardware has it."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the weights and of the order of pictures.")] = 0,
    held_out: Annotated[int, typer.Option(help="Pictures kept out of training for the evaluation.")] = 256,
    workers: Annotated[int, typer.Option(help="Processes that read pictures; 0 reads in the training process.")] = 0,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
) -> None:
    """Train the image tokenizer on the pictures of DATA. The same command resumes an interrupted training.

    On N processes: `torchrun --nproc-per-node N -m gptface_dist.tools.main tokenizer image ...`
    """
    if preset not in PRESETS:
        raise UserError(f"there is no preset {preset!r}: choose one of {', '.join(PRESETS)}")
    chosen = ImagePreset(
        replace(PRESETS[preset].architecture, **_given(size=size, codes=codes)),
        replace(
            PRESETS[preset].training,
            seed=seed,
            **_given(steps=steps, batch=batch, learning_rate=learning_rate, adversarial=adversarial, vgg=vgg),
            **_given(vgg_weights=vgg_weights, precision=_precision(precision, out), checkpoint_every=checkpoint_every),
        ),
    )
    from gptface_dist.data import tokenizer_corpus as corpus
    from gptface_dist.tokenizers.image_training import SHEET_NAME, ImageRun, train_image_tokenizer
    from gptface_dist.tokenizers.processes import processes

    pictures = corpus.TrainingPictures(corpus.open_pictures(data), chosen.architecture.size, seed, held_out)
    run = ImageRun(chosen.architecture, chosen.training, pictures.order_id, held_out)
    with processes() as group, bar(shown=group.rank == 0) as progress:

        def on_step(step: int, metrics: dict[str, float] | None) -> None:
            if not progress.tasks:
                progress.add_task("training", total=chosen.training.steps, completed=step)
            progress.update(progress.task_ids[0], completed=step)
            if metrics is not None:
                words = "loss {loss:.4f}, PSNR {psnr:.2f} dB, codes {codes_used:.0%}".format(**metrics)
                progress.update(progress.task_ids[0], description=words)
                if group.rank == 0 and progress.disable:
                    # To a log: what a bar would show, a line at a time.
                    left = (chosen.training.steps - step) * chosen.training.batch / metrics["pictures_per_second"]
                    print(f"step {step}/{chosen.training.steps}: {words}, {left / 60:.1f} min left", flush=True)

        batches = functools.partial(pictures.batches, chosen.training.batch, group, workers)
        summary = train_image_tokenizer(batches, pictures.held_out_batches, out, run, group, on_step)
        if group.rank == 0:
            codes_a_picture = f"{chosen.architecture.grid}x{chosen.architecture.grid} codes a picture"
            print(f"{out}: {codes_a_picture}, {summary['parameters'] / 1e6:.1f} M parameters, sha256 {summary['sha256']}")
            print(f"held out: {_in_words(summary['held_out'])}; see {out / SHEET_NAME}")


@app.command("join")
def join(
    folder: Annotated[Path, typer.Argument(help="Folder with text.model and image/.", show_default=False)],
) -> None:
    """Write FOLDER/vocabulary.json: one range of ids over both tokenizers."""
    from gptface_dist.tokenizers import vocabulary

    made = vocabulary.join(folder)
    print(f"{folder / vocabulary.VOCABULARY_NAME}: {made.size} ids")
    for name, ids in (("text", made.text_range), ("image", made.image_range), ("specials", range(made.pad_id, made.size))):
        print(f"  {name:8} {ids.start} to {ids.stop - 1}")


@app.command("evaluate")
def evaluate_image(
    image_folder: Annotated[
        Path, typer.Argument(help="Folder of an image tokenizer (a diffusers VQModel).", show_default=False)
    ],
    data: Data,
    pictures: Annotated[
        int, typer.Option(help="How many at most, at even distances; so training chooses its held-out ones.")
    ] = 256,
    size: Annotated[int | None, typer.Option(help="Pixels of a side; by default those the tokenizer was trained with.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="PNG to write: originals beside reconstructions.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write the figures to.")] = None,
) -> None:
    """Measure what an image tokenizer keeps of pictures: PSNR, SSIM, use of the codebook."""
    for file in (sheet, out):
        if file is not None and not file.parent.is_dir():
            raise UserError(f"no folder {file.parent} for {file.name}: make it first")
    from gptface_dist.data import tokenizer_corpus as corpus
    from gptface_dist.files import write_atomically
    from gptface_dist.tokenizers.image import ImageTokenizer
    from gptface_dist.tokenizers.image_evaluation import evaluate, to_png
    from gptface_dist.tokenizers.image_files import read_config
    from gptface_dist.tokenizers.processes import processes

    side = size or read_config(image_folder).get("sample_size", 32)
    folder = corpus.open_pictures(data)
    places = corpus.spread(folder, min(pictures, folder.index.samples))
    with processes() as group, bar() as progress:
        tokenizer = ImageTokenizer.load(image_folder, group.device)
        task = progress.add_task("evaluating", total=len(places))

        def counted() -> Iterator["Tensor"]:
            for batch in corpus.pictures_at(folder, places, side):
                yield batch
                progress.advance(task, len(batch))

        result, image = evaluate(tokenizer, counted())
    print(_in_words(asdict(result)))
    if sheet is not None:
        write_atomically(sheet, to_png(image))
    if out is not None:
        write_atomically(out, json.dumps({"sha256": tokenizer.sha256, "data": data, **asdict(result)}, indent=1) + "\n")


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def _in_words(evaluation: dict[str, Any]) -> str:
    return (
        "{pictures} pictures, PSNR {psnr:.2f} dB, SSIM {ssim:.4f}, {codes_used:.1%} of the codes used, "
        "perplexity {perplexity:.1f}".format(**evaluation)
    )


def _precision(option: str | None, out: Path) -> str | None:
    """``auto``: that of the training which ``out`` holds, else what is fast on this machine."""
    from gptface_dist import host

    if option != "auto":
        host.warn_of_emulation(option, "--precision")
        return option
    from gptface_dist.tokenizers.image_training import begun_precision

    native = host.native_bfloat16(host.device())
    begun = begun_precision(out)
    chosen = begun or ("bf16" if native else "fp32")
    why = f"as {out} was begun" if begun else f"this machine {'multiplies' if native else 'only emulates'} bfloat16"
    # Standard output has the results.
    print(f"--precision auto: {chosen} ({why})", file=sys.stderr)
    return chosen
