"""`gptface data`: index, verify and tokenize shards, and look into a run's batches."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.filesize import decimal

from gptface_dist.tools.progress import bar

T = TypeVar("T")
Workers = Annotated[int, typer.Option(help="Processes that work side by side, each on whole shards.")]

app = typer.Typer(no_args_is_help=True, help="Shards of pictures with captions, and of tokens: index, verify, tokenize.")


@app.command("index")
def index_command(
    shards: Annotated[str, typer.Argument(help="Folder of .tar files, or a pattern: 'http://host/data/{00000..00012}.tar'.")],
    out: Annotated[Path | None, typer.Argument(help="Folder for the index; for URLs only.")] = None,
    workers: Workers = 2,
    force: Annotated[bool, typer.Option("--force", help="Read again what is indexed already.")] = False,
) -> None:
    """Index shards that others wrote (img2dataset, open_clip, webdataset). Prints damage; status 1 if there is any."""
    from gptface_dist.data.indexing import find_shards, index

    selected = find_shards(shards, out)
    problems = samples = size = kept = 0
    for done in _progress(index(selected, workers, force), len(selected.names), "indexing"):
        for problem in done.problems:
            print(problem)
        problems += len(done.problems)
        samples += done.entry.samples
        size += done.entry.size
        kept += done.kept
    print(
        f"{len(selected.names)} shards ({kept} indexed before), {samples} samples, {decimal(size)}, "
        f"problems: {problems}; index in {selected.out}"
    )
    raise typer.Exit(1 if problems else 0)


@app.command()
def verify(
    location: Annotated[str, typer.Argument(help="Folder of shards, its URL, or a pattern of URLs of .tar files.")],
    tokenizers: Annotated[Path | None, typer.Option(help="Folder of tokenizers that the tokens must be of.")] = None,
    workers: Workers = 2,
) -> None:
    """Read everything, decode every picture, compare with the index. A problem a line: shard, key, what (divided by tabs)."""
    from gptface_dist.data.verify import Verification
    from gptface_dist.tokenizers.vocabulary import VOCABULARY_NAME, Vocabulary

    vocabulary = Vocabulary.load(tokenizers / VOCABULARY_NAME) if tokenizers else None
    verification = Verification(location, vocabulary)
    problems = samples = size = 0
    for report in _progress(verification.run(workers), len(verification.tasks), "verifying"):
        for problem in report.problems:
            print(problem)
        problems += len(report.problems)
        samples += report.samples
        size += report.size
    compared = "" if verification.indexed else "; no index.json: nothing to compare with"
    print(f"{len(verification.tasks)} shards, {samples} samples, {decimal(size)}, problems: {problems}{compared}")
    raise typer.Exit(1 if problems else 0)


@app.command()
def tokenize(
    pictures: Annotated[str, typer.Argument(help="Indexed shards of pictures: a folder, or its URL.")],
    out: Annotated[Path, typer.Argument(help="Folder for the token shards.")],
    tokenizers: Annotated[Path, typer.Option(help="Folder with text.model, image/ and vocabulary.json.")],
    size: Annotated[int, typer.Option(help="Pixels of a side that every picture is brought to.")],
    batch: Annotated[int, typer.Option(help="Pictures decoded and encoded together; no result depends on it.")] = 64,
    workers: Annotated[int, typer.Option(help="Processes, each on whole shards with one thread on the CPU.")] = 1,
    device: Annotated[str, typer.Option(help="Where pictures are encoded: cpu or cuda.")] = "cpu",
    max_bad_fraction: Annotated[
        float, typer.Option(help="Stop where more samples than this share, rounded up, are bad.")
    ] = 0.01,
) -> None:
    """Make token shards of picture shards, one of each. Resumes after an interruption; bad samples are left out."""
    from gptface_dist.data.tokenize import BAD_NAME, Tokenization, TokenizeOptions

    tokenization = Tokenization(pictures, out, tokenizers, TokenizeOptions(size, batch, workers, device, max_bad_fraction))
    samples = kept = bad = 0
    for done in _progress(tokenization.run(), len(tokenization.shards), "tokenizing"):
        for key, reason in done.bad:
            print(f"{done.entry.name}\t{key}\t{reason}")
        samples += done.entry.samples
        kept += done.kept
        bad += len(done.bad)
    print(
        f"{len(tokenization.shards)} shards ({kept} done before), {samples} samples, "
        f"{bad} bad ones left out{f' ({out / BAD_NAME})' if bad else ''}; in {out}"
    )


@app.command("batch")
def batch_command(
    config: Annotated[Path, typer.Argument(help="Configuration of the run.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as for the run.")] = None,
    step: Annotated[int, typer.Option(min=0, help="Step of the run, from 0.")] = 0,
) -> None:
    """What a run sees at a step: a sample a line, with where its text and image come from (divided by tabs).

    The keys are what a skip list takes.
    """
    from gptface_dist.config import load_config
    from gptface_dist.training.config import Config
    from gptface_dist.training.data import batch_loader

    options = load_config(Config, config, overrides or [])
    objective = options.build_objective()
    batches, replaced = batch_loader(options.data, objective).read(step)
    rows = [row for batch in batches for row in objective.describe(batch)]
    print(*rows[0], sep="\t")
    for row in rows:
        print(*row.values(), sep="\t")
    for substitution in replaced:
        print(f"replaced: {substitution.origin}: {substitution.reason}; by {substitution.by}")


def _progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The items, with a bar on stderr that counts shards."""
    with bar("shards") as progress:
        yield from progress.track(items, total, description=what)
