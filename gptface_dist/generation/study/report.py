"""The whole study: judge, prompts, edits; its numbers as JSON, its tables in Markdown, its pictures on a sheet."""

import datetime
import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gptface_dist.data.folder import ShardFolder
from gptface_dist.errors import UserError
from gptface_dist.files import write_atomically
from gptface_dist.generation import Generator, Sampling
from gptface_dist.generation.study.edits import EditResult, measure_edits
from gptface_dist.generation.study.judge import Judge, judged, read_faces, train_judge
from gptface_dist.generation.study.prompts import MODES, PAIR, ModeResult, example_prompts, measure_prompts
from gptface_dist.generation.study.statistics import balanced
from gptface_dist.generation.study.traits import TRAITS, Values

HEAD = """# Study: do pictures show what the text says

Made by `{command}`; the numbers are also in `study.json`, pictures in `study.png`.
{where}

"""


@dataclass(frozen=True)
class StudyOptions:
    """The size of the study."""

    prompts: int = 60
    """Random prompts with each seed; two pictures are drawn for each."""
    edits: int = 30
    """Edits of each kind with each seed."""
    seeds: int = 3
    """Seeds of noise and prompts."""
    judge_faces: int = 2000
    """Rendered faces that the judge is trained on."""
    held_out: int = 300
    """Rendered faces that it is tested on; the edited ones are among them."""
    epochs: int = 12
    """Of the judge's training."""
    steps: int = 12
    """Passes of the model a picture."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")


@dataclass(frozen=True)
class Study:
    """What was found."""

    ceiling: dict[str, float]
    """The judge's accuracy on held-out faces as the image tokenizer reconstructs them, by trait: the mean over its values."""
    modes: dict[str, ModeResult]
    """By way of drawing."""
    edits: dict[str, EditResult]
    """By kind of edit."""


def study(
    generator: Generator, faces: ShardFolder, options: StudyOptions, progress: Callable[[str, int], Callable[[], None]]
) -> Study:
    """Train the judge, then measure. ``progress`` is told what comes next and how much of it; it gives what to call."""
    size, total = generator.size, options.judge_faces + options.held_out
    found = read_faces(faces, total, size, progress("reading faces", total))
    advance = progress("reconstructing", total)
    rebuilt = []
    for face in found:
        rebuilt.append(generator.reconstruct(face.pixels))
        advance()
    known = options.judge_faces
    pictures = [face.pixels for face in found[:known]] + rebuilt[:known]
    values = [face.values for face in found[:known]] * 2
    judge = train_judge(pictures, values, options.epochs, 0, progress("training the judge", options.epochs * 2 * known // 32))
    ceiling = _ceiling(judge, [face.values for face in found[known:]], rebuilt[known:])
    draws = sum(guidance.rerank for guidance in MODES.values()) * options.prompts * options.seeds * PAIR
    modes = measure_prompts(
        generator, judge, options.prompts, options.seeds, Sampling(options.steps), progress("drawing", draws)
    )
    kinds = 3 * options.edits * options.seeds
    edits = measure_edits(generator, judge, found[known:], options.edits, options.seeds, progress("editing", kinds))
    return Study(ceiling, modes, edits)


def _ceiling(judge: Judge, truth: list[Values], pictures: list[np.ndarray]) -> dict[str, float]:
    seen = judged(judge, pictures)
    return {name: balanced([values[name] for values in truth], [values[name] for values in seen]) for name in TRAITS}


def write(found: Study, out: Path, command: str) -> None:
    """Write ``study.md``, ``study.json`` and ``study.png`` into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    where = (
        f"{datetime.date.today().isoformat()}, {platform.machine()} with {os.cpu_count()} CPU cores, "
        f"{torch.get_num_threads()} used, torch {torch.__version__}."
    )
    numbers = {
        "command": command,
        "ceiling": found.ceiling,
        "modes": {name: _plain(one) for name, one in found.modes.items()},
        "edits": {name: _plain(one) for name, one in found.edits.items()},
    }
    write_atomically(out / "study.json", json.dumps(numbers, indent=1) + "\n")
    write_atomically(out / "study.md", HEAD.format(command=command, where=where) + markdown(found))
    temporary = out / ".study.png"
    _sheet(found).save(temporary, "PNG")
    temporary.replace(out / "study.png")


def markdown(found: Study) -> str:
    """The tables."""
    first = next(iter(found.modes.values()))
    lines = [
        "## Prompts",
        f"{first.mean.trials} prompts such as *{example_prompts(1)[0]}*, {PAIR} pictures each, traits uniform and independent.",
        "Each cell: share of pictures in which the judge sees what was asked (95 % interval over prompts). *Chance*: the same",
        "if pictures had nothing to do with their prompts. *Judge*: its accuracy on held-out faces as the image tokenizer",
        "reconstructs them, mean over a trait's values: about the most that could be measured. *Gain*: 95 % interval of the",
        "mean's gain over the first row, over the same prompts and noise. *Seeds*: standard deviation of the mean over seeds.",
        "*Diversity*: root mean square difference of two pictures of one prompt, in grey levels of 255. *Time*: CPU seconds a",
        "picture.",
        "",
        "| | " + " | ".join(TRAITS) + " | mean | seeds | gain | diversity | time |",
        "|---" * (len(TRAITS) + 6) + "|",
    ]
    for mode, one in found.modes.items():
        cells = [str(one.agreement[name]) for name in TRAITS]
        gain = "" if one is first else f"{one.gain[0]:+.1%} to {one.gain[1]:+.1%}"
        cells += [str(one.mean), f"{one.mean.spread:.1%}", gain, f"{one.diversity:.1f}", f"{one.seconds:.2f} s"]
        lines.append(f"| {mode} | " + " | ".join(cells) + " |")
    chances = [f"{first.chance[name]:.1%}" for name in TRAITS]
    lines.append("| *chance* | " + " | ".join([*chances, f"{np.mean(list(first.chance.values())):.1%}"]) + " | | | | |")
    ceilings = [f"{found.ceiling[name]:.1%}" for name in TRAITS]
    lines.append("| *judge* | " + " | ".join([*ceilings, f"{np.mean(list(found.ceiling.values())):.1%}"]) + " | | | | |")
    lines += [
        "",
        "## Edits",
        "Rendered faces that the judge was not trained on. *Intended*: edits after which it sees the value that the text",
        "asked for; *without text*: the same of an edit of the same region with no text. *Others kept*: other traits in which",
        "the judge sees the same as before. *Outside*: edits that left all pixels outside the region exactly as they were.",
        "",
        "| | edits | intended | without text | others kept | outside |",
        "|---|---|---|---|---|---|",
    ]
    for kind, edit in found.edits.items():
        outside = f"{edit.outside.share:.1%}"
        lines.append(f"| {kind} | {edit.intended.trials} | {edit.intended} | {edit.without_text} | {edit.kept} | {outside} |")
    shown = ", ".join(f"*{text}*" for text in example_prompts(first.mean.trials))
    lines += [
        "",
        "## Pictures",
        "![rows of faces, then edits](study.png)",
        f"One row a way of drawing ({', '.join(found.modes)}), for {shown}. Below, edits ({', '.join(found.edits)}): before,",
        "region, after.",
        "",
    ]
    return "\n".join(lines)


def _plain(one: ModeResult | EditResult) -> dict[str, object]:
    """Without the pictures."""
    return {name: value for name, value in asdict(one).items() if name not in ("pictures", "strips")}


def _sheet(found: Study, enlarged: int = 2, gap: int = 4) -> Image.Image:
    """Rows of pictures on white."""
    rows = [np.concatenate(one.pictures, axis=1) for one in found.modes.values()]
    rows += [np.concatenate(one.strips, axis=1) for one in found.edits.values() if one.strips]
    width = max(row.shape[1] for row in rows) * enlarged
    height = sum(row.shape[0] * enlarged + gap for row in rows) - gap
    sheet = Image.new("RGB", (width, height), "white")
    top = 0
    for row in rows:
        picture = Image.fromarray(row)
        sheet.paste(picture.resize((picture.width * enlarged, picture.height * enlarged), Image.Resampling.BICUBIC), (0, top))
        top += row.shape[0] * enlarged + gap
    return sheet
