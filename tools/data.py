"""`gptface data`: index, verify and tokenize shards."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

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

    found = find_shards(shards, out)
    problems = samples = size = kept = 0
    for done in _progress(index(found, workers, force), len(found.names), "indexing"):
        for problem in done.problems:
            print(problem)
        problems += len(done.problems)
        samples += done.entry.samples
        size += done.entry.size
        kept += done.kept
    print(
        f"{len(found.names)} shards ({kept} indexed before), {samples} samples, {decimal(size)}, "
        f"{problems} problems; index in {found.out}"
    )
    raise typer.Exit(1 if problems else 0)


@app.command()
def verify(
    location: Annotated[str, typer.Argument(help="Folder of shards, its URL, or a pattern of URLs of .tar files.")],
    tokenizers: Annotated[Path | None, typer.Option(help="Folder of tokenizers: token ids must lie in their ranges.")] = None,
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
    print(f"{len(verification.tasks)} shards, {samples} samples, {decimal(size)}, {problems} problems{compared}")
    raise typer.Exit(1 if problems else 0)


def _progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The items, with a bar on stderr that counts shards."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("shards"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # Lines go through the bar's console where both are on a terminal, and untouched to a file or pipe.
    terminal = sys.stdout.isatty()
    console = Console(stderr=True, soft_wrap=True)
    with Progress(*columns, console=console, transient=True, redirect_stdout=terminal, redirect_stderr=terminal) as progress:
        yield from progress.track(items, total, description=what)
