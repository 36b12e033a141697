"""``gptface tokenizer``: train, join and examine the tokenizers of text and pictures."""

import contextlib
import functools
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gptface_dist.data.folder import ShardFolder, Unreadable
from gptface_dist.data.pictures import decode_captions, decode_pixels, picture_extension
from gptface_dist.data.stream import Block, BlockReader, Origin, RawSample, Source, StreamOptions
from gptface_dist.errors import UserError
from gptface_dist.files import write_atomically
from gptface_dist.tokenizers import text as text_tokenizer
from gptface_dist.tokenizers import vocabulary
from gptface_dist.tokenizers.image_files import read_config
from gptface_dist.tokenizers.image_options import PRESETS, ImagePreset

if TYPE_CHECKING:
    from torch import Tensor

    from gptface_dist.tokenizers.processes import Processes

app = typer.Typer(no_args_is_help=True, help="Tokenizers of text and pictures, and the vocabulary that joins them.")

Data = Annotated[str, typer.Argument(help="Folder (or URL) of indexed shards of pictures.", show_default=False)]


@app.command("text")
def train_text(
    data: Data,
    out: Annotated[Path, typer.Argument(help="File to write, by convention FOLDER/text.model.", show_default=False)],
    size: Annotated[int, typer.Option(help="Number of pieces.")] = 8192,
    character_coverage: Annotated[
        float, typer.Option(help="Share of characters that become pieces; the rest is spelled in bytes.")
    ] = 0.9995,
    captions: Annotated[int, typer.Option(help="Captions used at most: of more, a uniform sample.")] = 2_000_000,
    seed: Annotated[int, typer.Option(help="Of that sample.")] = 0,
) -> None:
    """Train the text tokenizer on the captions of DATA (`key.txt` and further `captions` of `key.json`)."""
    options = text_tokenizer.TextOptions(size, character_coverage, captions, seed)
    if out.exists():
        raise UserError(f"{out} exists: remove it to train another, and what was made with it")
    folder = ShardFolder.open(data)
    out.parent.mkdir(parents=True, exist_ok=True)
    with _progress() as progress:
        read = progress.add_task("reading captions", total=folder.index.samples)
        found = _captions(folder, lambda: progress.advance(read))
        trained = text_tokenizer.train_text_tokenizer(found, out, options)
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
    precision: Annotated[str | None, typer.Option(help="fp32 or bf16 (autocast).")] = None,
    seed: Annotated[int, typer.Option(help="Of the weights and of the order of pictures.")] = 0,
    held_out: Annotated[
        int, typer.Option(help="Pictures kept out of training for the evaluation, spread evenly over DATA.")
    ] = 256,
    workers: Annotated[int, typer.Option(help="Processes that read pictures; 0 reads in the training process.")] = 0,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
) -> None:
    """Train the image tokenizer on the pictures of DATA; the same command goes on where it stopped.

    Under `torchrun --nproc-per-node N -m gptface_dist.tools.main tokenizer image ...` it trains on N processes.
    """
    if preset not in PRESETS:
        raise UserError(f"there is no preset {preset!r}: choose one of {', '.join(PRESETS)}")
    chosen = ImagePreset(
        replace(PRESETS[preset].architecture, **_given(size=size, codes=codes)),
        replace(
            PRESETS[preset].training,
            seed=seed,
            **_given(steps=steps, batch=batch, learning_rate=learning_rate, adversarial=adversarial, vgg=vgg),
            **_given(vgg_weights=vgg_weights, precision=precision, checkpoint_every=checkpoint_every),
        ),
    )
    pictures = Pictures.open(data, chosen.architecture.size, seed, held_out)
    # torch and diffusers are imported only where they work: `gptface --help` answers at once.
    from gptface_dist.tokenizers.image_training import SHEET_NAME, ImageRun, train_image_tokenizer
    from gptface_dist.tokenizers.processes import processes

    with processes() as group, _progress(disable=group.rank != 0) as progress:
        task = progress.add_task("training", total=chosen.training.steps)

        def on_step(step: int, metrics: dict[str, float] | None) -> None:
            progress.update(task, completed=step)
            if metrics is not None:
                progress.update(
                    task, description="loss {loss:.4f}, PSNR {psnr:.2f} dB, codes {codes_used:.0%}".format(**metrics)
                )

        run = ImageRun(chosen.architecture, chosen.training, pictures.identity)
        batches = functools.partial(pictures.batches, batch=chosen.training.batch, processes=group, workers=workers)
        summary = train_image_tokenizer(batches, lambda: pictures.held_out_batches(), out, run, group, on_step)
    if group.rank == 0:
        grid = chosen.architecture.grid
        print(
            f"{out}: {grid}x{grid} codes a picture, {summary['parameters'] / 1e6:.1f} M parameters, sha256 {summary['sha256']}"
        )
        print(f"held-out pictures: {_in_words(summary['held_out'])}")
        print(f"look at {out / SHEET_NAME}")


@app.command("join")
def join(
    folder: Annotated[Path, typer.Argument(help="Folder with text.model and image/.", show_default=False)],
) -> None:
    """Write FOLDER/vocabulary.json: one range of ids over both tokenizers."""
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
        int, typer.Option(help="How many, spread evenly over DATA: as many as were held out are those held out.")
    ] = 256,
    size: Annotated[int | None, typer.Option(help="Pixels of a side; by default those the tokenizer was trained with.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="PNG to write: originals beside reconstructions.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write the figures to.")] = None,
) -> None:
    """Measure what an image tokenizer keeps of pictures: PSNR, SSIM, use of the codebook."""
    side = size or read_config(image_folder).get("sample_size", 32)
    chosen = Pictures.open(data, side, seed=0, held_out=pictures)
    from gptface_dist.tokenizers.image import ImageTokenizer
    from gptface_dist.tokenizers.image_evaluation import evaluate
    from gptface_dist.tokenizers.processes import processes

    with processes() as group, _progress() as progress:
        task = progress.add_task("evaluating", total=chosen.held_out_count)

        def counted() -> Iterator["Tensor"]:
            for batch in chosen.held_out_batches():
                yield batch
                progress.advance(task, len(batch))

        tokenizer = ImageTokenizer.load(image_folder, group.device)
        result, image = evaluate(tokenizer, counted())
    print(_in_words(asdict(result)))
    if sheet is not None:
        image.save(sheet)
    if out is not None:
        write_atomically(out, json.dumps({"sha256": tokenizer.sha256, "data": data, **asdict(result)}, indent=1) + "\n")


@dataclass(frozen=True)
class Pictures:
    """A folder of shards as pixels for the image tokenizer: an endless order to train on, and pictures kept out of it."""

    folder: ShardFolder
    """The shards."""
    size: int
    """Pixels of a side."""
    seed: int
    """Of the order."""
    held_out: tuple[tuple[int, int], ...]
    """(shard, sample) of the pictures that are not trained on."""
    skip: frozenset[str]
    """Their keys."""

    @classmethod
    def open(cls, data: str, size: int, seed: int, held_out: int) -> "Pictures":
        """Open shards and choose ``held_out`` pictures, spread evenly over them."""
        folder = ShardFolder.open(data)
        total = folder.index.samples
        if not 0 < held_out < total:
            raise UserError(f"{data} holds {total} pictures: hold out at least 1 and fewer than that, not {held_out}")
        starts = np.concatenate([[0], np.cumsum(folder.counts)])
        numbers = np.arange(held_out) * total // held_out
        shards = np.searchsorted(starts, numbers, side="right") - 1
        places = tuple((int(shard), int(number - starts[shard])) for shard, number in zip(shards, numbers, strict=True))
        sidecars = {shard: _sidecar(folder, shard) for shard in dict.fromkeys(shards.tolist())}
        keys = frozenset(sidecars[shard].samples[sample][0] for shard, sample in places)
        return cls(folder, size, seed, places, keys)

    @property
    def held_out_count(self) -> int:
        """Pictures kept out."""
        return len(self.held_out)

    @property
    def identity(self) -> str:
        """Hash of the pictures and their order."""
        with_reader = self.reader()
        with_reader.close()
        return f"{with_reader.order_id}-{self.size}-{self.held_out_count}"

    def reader(self) -> BlockReader[np.ndarray]:
        """Reader of single pictures in the run's order; those held out are passed over."""
        decode = functools.partial(_decode, size=self.size)
        options = StreamOptions(seed=self.seed, block=1, streams=min(16, self.folder.index.samples))
        return BlockReader([Source(self.folder)], decode, options, self.skip)

    def batches(self, start_step: int, batch: int, processes: "Processes", workers: int) -> Iterator["Tensor"]:
        """This process's pictures of a step and of every one after it: float32 [b, 3, S, S] in [-1, 1]."""
        from gptface_dist.data.loader import Deal, Loader, Position

        deal = Deal(batch, processes.share(batch), block=1, rank=processes.rank, ranks=processes.count)
        loader = Loader(self.reader, _stack, deal, workers)
        reader = self.reader()
        reader.close()
        for pictures, _ in loader.steps(Position(start_step * deal.blocks, reader.order_id)):
            yield _to_tensor(pictures[0])

    def held_out_batches(self) -> Iterator["Tensor"]:
        """The pictures held out, 16 at a time; unreadable ones are passed over."""
        found: list[np.ndarray] = []
        for shard in dict.fromkeys(shard for shard, _ in self.held_out):
            file, sidecar = self.folder.open_shard(shard), _sidecar(self.folder, shard)
            for key, extents in (sidecar.samples[sample] for number, sample in self.held_out if number == shard):
                origin = Origin(self.folder.location, self.folder.index.shards[shard].name, key, 0)
                try:
                    found.append(_decode(RawSample(origin, file, extents), self.size))
                except Unreadable:
                    continue
            file.close()
        for start in range(0, len(found), 16):
            yield _to_tensor(np.stack(found[start : start + 16]))


def _decode(raw: RawSample, size: int) -> np.ndarray:
    """uint8 [S, S, 3] of a sample; captions are not needed here."""
    return decode_pixels(raw.read(picture_extension(list(raw.extents))), size)


def _stack(blocks: list[Block[np.ndarray]]) -> np.ndarray:
    return np.stack([sample.value for block in blocks for sample in block.samples])


def _to_tensor(pictures: np.ndarray) -> "Tensor":
    """uint8 [B, S, S, 3] -> float32 [B, 3, S, S] in [-1, 1]."""
    import torch

    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def _sidecar(folder: ShardFolder, shard: int) -> Any:
    try:
        return folder.sidecar(shard)
    except Unreadable as error:
        raise UserError(f"{folder.location}, shard {folder.index.shards[shard].name}: {error}") from None


def _captions(folder: ShardFolder, on_sample: Any) -> Iterator[str]:
    """All captions, shard by shard; samples without a readable one are passed over."""
    for shard, entry in enumerate(folder.index.shards):
        sidecar = _sidecar(folder, shard)
        try:
            file = folder.open_shard(shard)
        except Unreadable as error:
            raise UserError(f"{folder.location}, shard {entry.name}: {error}") from None
        for key, extents in sidecar.samples:
            raw = RawSample(Origin(folder.location, entry.name, key, 0), file, extents)
            with contextlib.suppress(Unreadable):
                yield from decode_captions(raw.read("txt"), raw.read("json") if "json" in extents else None)
            on_sample()
        file.close()


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def _in_words(held_out: dict[str, Any]) -> str:
    return (
        "{pictures} pictures, PSNR {psnr:.2f} dB, SSIM {ssim:.4f}, {codes_used:.1%} of the codes used, "
        "perplexity {perplexity:.1f}".format(**held_out)
    )


def _progress(disable: bool = False) -> Progress:
    """A progress bar on stderr."""
    columns: Iterable[Any] = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), disable=disable)
