"""`gptface study`: measure whether pictures show what the text says."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from gptface_dist.tools.generate import Device, load_generator
from gptface_dist.tools.progress import bar


def study(
    release: Annotated[Path, typer.Argument(help="Folder of a release.", show_default=False)],
    faces: Annotated[
        str, typer.Argument(help="Shards of `gptface faces render`, of another seed than training's.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="Folder for study.md, study.json and study.png.", show_default=False)],
    prompts: Annotated[int, typer.Option(help="Random prompts with each seed, two pictures each.")] = 70,
    edits: Annotated[int, typer.Option(help="Edits of each kind, pairs and captions with each seed.")] = 30,
    seeds: Annotated[int, typer.Option(help="Seeds of prompts, noise and judges.")] = 3,
    judge_faces: Annotated[int, typer.Option(help="Faces that train the judges.")] = 2000,
    held_out: Annotated[int, typer.Option(help="Further faces that test them and are edited.")] = 300,
    epochs: Annotated[int, typer.Option(help="Passes over the faces in a judge's training.")] = 12,
    steps: Annotated[int, typer.Option(help="Passes of the model a picture.")] = 12,
    device: Device = None,
) -> None:
    """Measure prompt agreement, guidance, diversity and edits, judged by a classifier trained on rendered faces."""
    from gptface_dist.data.tokenizer_corpus import open_pictures
    from gptface_dist.generation.study import report
    from gptface_dist.generation.study.study import StudyOptions
    from gptface_dist.generation.study.study import study as measure

    options = StudyOptions(prompts, edits, seeds, judge_faces, held_out, epochs, steps)
    folder = open_pictures(faces)
    generator = load_generator(release, device)
    # Before the work, not after it.
    report.make_folder(out)
    with bar() as progress:

        def begin(doing: str, total: int) -> Callable[[], None]:
            task = progress.add_task(doing, total=total)
            if progress.disable:  # to a log: where a bar would show, a line for each part
                print(f"{doing} ({total})", file=sys.stderr, flush=True)
            return lambda: progress.advance(task)

        result = measure(generator, folder, options, begin)
    report.write(result, out, " ".join(["gptface", *sys.argv[1:]]))
    print(report.markdown(result))
