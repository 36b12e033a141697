"""Edits of rendered faces: whether they show what the text asks for and leave everything else unchanged."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gptface_dist.generation import Generator, Guidance
from gptface_dist.generation.presets import TASKS
from gptface_dist.generation.region import GROUPS, LABELS, grown
from gptface_dist.generation.study.judge import Face, Judge, judged, some
from gptface_dist.generation.study.statistics import Share, share
from gptface_dist.generation.study.traits import TRAITS, UNKNOWN, Values, changed, prompt

MARGIN = 2
"""Pixels by which a region reaches beyond its classes of the parsing mask."""


@dataclass(frozen=True)
class EditResult:
    """Measurements of one kind of edit."""

    intended: Share
    """Edits after which the judge sees the value that the text asked for."""
    without_text: Share
    """The same for edits of the same regions with an empty text and no guidance."""
    kept: Share
    """Other traits in which the judge sees the same value as before the edit."""
    outside: Share
    """Edits that left every pixel outside the region exactly as it was."""
    strips: list[np.ndarray]
    """The first four: before, region in white, after; each uint8 [S, 3 S, 3]."""


def measure_edits(
    generator: Generator, judges: Sequence[Judge], faces: Sequence[Face], edits: int, on_edit: Callable[[], None]
) -> dict[str, EditResult]:
    """Make ``edits`` edits of each kind with each seed, each of another face; fewer if fewer faces fit the kind.

    ``judges`` has one judge for each seed.
    """
    kinds: dict[str, tuple[str, str, Callable[[Face], np.ndarray]]] = {
        "hair colour": ("hair", "attribute", lambda face: grown(face.labels == LABELS.index("hair"), MARGIN)),
        "glasses on": ("glasses", "attribute", lambda face: _box(face, GROUPS["brows"] + GROUPS["eyes"])),
        "expression": ("expression", "expression", lambda face: _box(face, GROUPS["face"])),
    }
    results = {}
    for number, (kind, (trait, task, where)) in enumerate(kinds.items()):
        fit = [face for face in faces if _fits(face, trait) and where(face).any()]
        intended, without, kept, outside = (_empty(len(judges)) for _ in range(4))
        strips: list[np.ndarray] = []
        for seed, judge in enumerate(judges):
            rng = np.random.default_rng((seed, number))
            for face in some(fit, edits, rng):
                values = changed(face.values, trait, rng)
                chosen = where(face)
                after, plain = _both(generator, face, _text(values), chosen, task, int(rng.integers(1 << 31)))
                before_seen, seen, plain_seen = judged(judge, [face.pixels, after, plain])
                intended[seed].append(seen[trait] == values[trait])
                without[seed].append(plain_seen[trait] == values[trait])
                kept[seed].append(float(np.mean([seen[name] == before_seen[name] for name in TRAITS if name != trait])))
                outside[seed].append(bool((after[~chosen] == face.pixels[~chosen]).all()))
                if len(strips) < 4:
                    marked = np.where(chosen[..., None], np.uint8(255), face.pixels)
                    strips.append(np.concatenate([face.pixels, marked, after], axis=1))
                on_edit()
        results[kind] = EditResult(share(intended), share(without), share(kept), share(outside), strips)
    return results


def _empty(seeds: int) -> list[list[float]]:
    return [[] for _ in range(seeds)]


def _fits(face: Face, trait: str) -> bool:
    return face.values[trait] != UNKNOWN and not (trait == "glasses" and face.values["glasses"])


def _box(face: Face, classes: Sequence[str]) -> np.ndarray:
    """bool [S, S]: the smallest box around ``classes`` of the parsing mask plus MARGIN; all false without any of them."""
    inside = np.isin(face.labels, [LABELS.index(name) for name in classes])
    chosen = np.zeros_like(inside)
    if inside.any():
        rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
        chosen[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    return grown(chosen, MARGIN)


def _text(values: Values) -> str:
    """Prompt for the whole picture; a trait that the face does not show gets its first value."""
    return prompt({name: max(0, value) for name, value in values.items()})


def _both(
    generator: Generator, face: Face, text: str, chosen: np.ndarray, task: str, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Edit a region for the text, and the same region without a text: pixels of both."""
    sampling = replace(TASKS[task].sampling, seed=seed)
    after = generator.edit(face.pixels, text, chosen, task, sampling=sampling)[0]
    plain = generator.edit(face.pixels, "", chosen, "inpainting", sampling=sampling, guidance=Guidance())[0]
    return after.pixels, plain.pixels
