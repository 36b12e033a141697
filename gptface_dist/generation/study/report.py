"""The study's report: numbers as JSON, tables in Markdown, pictures on a sheet."""

import datetime
import json
import os
import platform
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gptface_dist.errors import UserError
from gptface_dist.files import write_atomically
from gptface_dist.generation.study.edits import EditResult
from gptface_dist.generation.study.prompts import PAIR, ModeResult
from gptface_dist.generation.study.statistics import Mean
from gptface_dist.generation.study.study import Study
from gptface_dist.generation.study.traits import TRAITS

HEAD = """# Study: do pictures show what the text says

Made by `{command}`; the numbers are also in `study.json`, pictures in `study.png`.
{where}

Every number is a mean ± its standard deviation over seeds; a seed has prompts, noise and a judge of its own. Shares and gains
have their 95 % interval in brackets.

"""
PROMPTS = """## Prompts
{prompts}
Traits are independent of each other, all values are asked for equally often. Each cell: share of pictures in which the judge
sees what was asked (interval over prompts). *Chance*: the same if pictures had nothing to do with their prompts. *Judge*:
its accuracy on held-out faces as the image tokenizer reconstructs them, mean over a trait's values: about the most that could
be measured. *Gain*: of the mean over the first row, for the same prompts and noise. *Diversity*: root mean square difference of
two pictures of one prompt, in grey levels of 255. *Time*: seconds a picture{clock}.
"""
EDITS = """
## Edits
Rendered faces that the judge was not trained on. *Intended*: edits after which it sees the value that the text asked for;
*without text*: the same of an edit of the same region with no text. *Others kept*: other traits in which the judge sees the
same as before. *Outside*: edits that left all pixels outside the region exactly as they were.
"""
MATCHING = """
## Matching and captions
*True text preferred*: faces whose true text has a higher p(match) than the same text with another value of that trait (chance
50 %). Captions of such faces: those that *tell* the trait, and those of them that tell it *right*; *chance*: the same if
captions had nothing to do with their faces. Captions name glasses only where there are some.
"""
PICTURES = """
## Pictures
![rows of faces, then edits](study.png)

One row a way of drawing ({modes}), for {shown}. Below, edits ({edits}): before, region, after.
"""


def make_folder(out: Path) -> None:
    """Make the report's folder; :class:`UserError` where ``out`` cannot be one."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be a folder for the study: {error.strerror}") from None


def write(study: Study, out: Path, command: str) -> None:
    """Write ``study.md``, ``study.json`` and ``study.png`` into a folder that exists."""
    gpu = f", {study.gpu}" if study.gpu else ""
    where = (
        f"{datetime.date.today().isoformat()}, {platform.machine()} with {os.cpu_count()} CPU cores, "
        f"{torch.get_num_threads()} used{gpu}, torch {torch.__version__}."
    )
    numbers = {
        "command": command,
        "ceiling": {name: asdict(accuracy) for name, accuracy in study.ceiling.items()},
        "modes": {name: _plain(mode) for name, mode in study.modes.items()},
        "edits": {name: _plain(edit) for name, edit in study.edits.items()},
        "matching": {name: asdict(preferred) for name, preferred in study.matching.items()},
        "captions": {name: asdict(caption) for name, caption in study.captions.items()},
    }
    write_atomically(out / "study.json", json.dumps(numbers, indent=1) + "\n")
    write_atomically(out / "study.md", HEAD.format(command=command, where=where) + markdown(study))
    temporary = out / ".study.png"
    _sheet(study).save(temporary, "PNG")
    temporary.replace(out / "study.png")


def markdown(study: Study) -> str:
    """The tables."""
    return "\n".join([*_prompts(study), *_edits(study), *_matching(study), *_pictures(study)])


def _prompts(study: Study) -> list[str]:
    first = next(iter(study.modes.values()))
    prompts = f"{first.mean.trials} prompts such as *{study.shown[0]}*, {PAIR} pictures each."
    clock = " of the whole process on the GPU" if study.gpu else ", of a CPU core"
    lines = [PROMPTS.format(prompts=prompts, clock=clock), *_head("", *TRAITS, "mean", "gain", "diversity", "time")]
    for name, mode in study.modes.items():
        gain = "" if mode is first else str(mode.gain)
        measured = (mode.mean, gain, f"{mode.diversity:.1f}", f"{mode.seconds:.2f} s")
        lines.append(_row(name, *(mode.agreement[trait] for trait in TRAITS), *measured))
    for name, means in (("*chance*", first.chance), ("*judge*", study.ceiling)):
        over_all = np.mean([means[trait].mean for trait in TRAITS])
        lines.append(_row(name, *(f"{means[trait]:.1%}" for trait in TRAITS), f"{over_all:.1%}", "", "", ""))
    return lines


def _edits(study: Study) -> list[str]:
    lines = [EDITS, *_head("", "edits", "intended", "without text", "others kept", "outside")]
    for kind, edit in study.edits.items():
        outside = f"{Mean(edit.outside.share, edit.outside.spread):.1%}"
        lines.append(_row(kind, edit.intended.trials, edit.intended, edit.without_text, edit.kept, outside))
    return lines


def _matching(study: Study) -> list[str]:
    lines = [MATCHING, *_head("", "pairs", "true text preferred", "captions that tell", "right", "chance")]
    for name, preferred in study.matching.items():
        cells: tuple[object, ...] = ("", "", "")
        if caption := study.captions.get(name):
            cells = (caption.named, caption.right or "", f"{caption.chance:.1%}" if caption.chance else "")
        lines.append(_row(name, preferred.trials, preferred, *cells))
    return lines


def _pictures(study: Study) -> list[str]:
    shown = ", ".join(f"*{text}*" for text in study.shown)
    return [PICTURES.format(modes=", ".join(study.modes), shown=shown, edits=", ".join(study.edits))]


def _head(*names: str) -> list[str]:
    return [_row(*names), "|---" * len(names) + "|"]


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _plain(result: ModeResult | EditResult) -> dict[str, object]:
    """Convert to JSON's types, without the pictures."""
    return {name: value for name, value in asdict(result).items() if name not in ("pictures", "strips")}


def _sheet(study: Study, enlarged: int = 2, gap: int = 4) -> Image.Image:
    """Lay out a row of pictures for each mode, then one for each kind of edit, on white."""
    rows = [np.concatenate(mode.pictures, axis=1) for mode in study.modes.values()]
    rows += [np.concatenate(edit.strips, axis=1) for edit in study.edits.values() if edit.strips]
    width = max(row.shape[1] for row in rows) * enlarged
    height = sum(row.shape[0] * enlarged + gap for row in rows) - gap
    sheet = Image.new("RGB", (width, height), "white")
    top = 0
    for row in rows:
        picture = Image.fromarray(row)
        sheet.paste(picture.resize((picture.width * enlarged, picture.height * enlarged), Image.Resampling.BICUBIC), (0, top))
        top += row.shape[0] * enlarged + gap
    return sheet
