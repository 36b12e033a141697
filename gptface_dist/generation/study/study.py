"""The whole study: train the judges, then measure prompts, edits, matching and captions."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch

from gptface_dist.data.folder import ShardFolder
from gptface_dist.errors import UserError
from gptface_dist.generation import Generator, Sampling
from gptface_dist.generation.study.captions import CaptionResult, measure_captions
from gptface_dist.generation.study.edits import EditResult, measure_edits
from gptface_dist.generation.study.judge import BATCH, Judge, judged, read_faces, train_judge
from gptface_dist.generation.study.matching import measure_matching
from gptface_dist.generation.study.prompts import MODES, PAIR, SHOWN, ModeResult, measure_prompts, prompt_values
from gptface_dist.generation.study.statistics import Mean, Share, balanced, mean
from gptface_dist.generation.study.traits import TRAITS, Values, prompt


@dataclass(frozen=True)
class StudyOptions:
    """The size of the study."""

    prompts: int = 70
    """Random prompts with each seed, two pictures each."""
    edits: int = 30
    """Edits of each kind, pairs and captions with each seed."""
    seeds: int = 3
    """Seeds of prompts, noise and judges."""
    judge_faces: int = 2000
    """Rendered faces that train the judges."""
    held_out: int = 300
    """Rendered faces that test them, and of which some are edited and captioned."""
    epochs: int = 12
    """Passes over the faces in a judge's training."""
    steps: int = 12
    """Passes of the model for each drawn picture; edits and captions keep their defaults."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")


@dataclass(frozen=True)
class Study:
    """Results."""

    ceiling: dict[str, Mean]
    """The judges' accuracy on held-out faces as the image tokenizer reconstructs them, by trait: the mean over its values."""
    modes: dict[str, ModeResult]
    """By name of the guidance, as in MODES."""
    shown: list[str]
    """Prompts of the pictures kept in each mode."""
    edits: dict[str, EditResult]
    """By kind of edit."""
    matching: dict[str, Share]
    """By trait: share of faces whose true text the matching head prefers."""
    captions: dict[str, CaptionResult]
    """By trait."""
    gpu: str
    """Name of the GPU that computed; empty for a CPU."""


def study(
    generator: Generator, folder: ShardFolder, options: StudyOptions, progress: Callable[[str, int], Callable[[], None]]
) -> Study:
    """Train the judges, then measure. ``progress`` takes the name and size of the next part and returns its advance function.

    :class:`UserError` for too few faces, shards of other pictures, or a model that cannot be guided in each mode.
    """
    for guidance in MODES.values():
        generator.check_guidance(guidance)
    size, total = generator.size, options.judge_faces + options.held_out
    faces = read_faces(folder, total, size, progress("reading faces", total))
    advance = progress("reconstructing", total)
    rebuilt: list[np.ndarray] = []
    for start in range(0, total, BATCH):
        several = [face.pixels for face in faces[start : start + BATCH]]
        rebuilt += generator.reconstruct(several)
        for _ in several:
            advance()
    known, seeds = options.judge_faces, options.seeds
    pictures = [face.pixels for face in faces[:known]] + rebuilt[:known]
    values = [face.values for face in faces[:known]] * 2
    advance = progress("training judges", seeds * options.epochs * (len(pictures) // BATCH))
    judges = [train_judge(pictures, values, options.epochs, seed, advance, generator.device) for seed in range(seeds)]
    held_out = faces[known:]
    draws = sum(guidance.rerank for guidance in MODES.values()) * options.prompts * seeds * PAIR
    sampling = Sampling(options.steps)
    return Study(
        _ceiling(judges, [face.values for face in held_out], rebuilt[known:]),
        measure_prompts(generator, judges, options.prompts, sampling, progress("drawing", draws)),
        [prompt(values) for values in prompt_values(options.prompts, 0)[:SHOWN]],
        measure_edits(generator, judges, held_out, options.edits, progress("editing", 3 * options.edits * seeds)),
        measure_matching(generator, held_out, options.edits, seeds, progress("matching", options.edits * seeds)),
        measure_captions(generator, held_out, options.edits, seeds, progress("describing", options.edits * seeds)),
        torch.cuda.get_device_name(generator.device) if generator.device.type == "cuda" else "",
    )


def _ceiling(judges: list[Judge], truth: list[Values], pictures: list[np.ndarray]) -> dict[str, Mean]:
    seen = [judged(judge, pictures) for judge in judges]
    return {
        name: mean([balanced([values[name] for values in truth], [values[name] for values in of_judge]) for of_judge in seen])
        for name in TRAITS
    }
