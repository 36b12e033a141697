"""Matching: whether the head that guides prefers the true text of a face to one with another value of a trait."""

from collections.abc import Callable, Sequence

import numpy as np

from gptface_dist.generation import Generator
from gptface_dist.generation.study.judge import Face, some
from gptface_dist.generation.study.statistics import Share, share
from gptface_dist.generation.study.traits import TRAITS, changed, prompt


def measure_matching(
    generator: Generator, faces: Sequence[Face], pairs: int, seeds: int, on_pair: Callable[[], None]
) -> dict[str, Share]:
    """By trait: share of faces whose true text has a higher p(match) than the same text with another value of the trait.

    Takes ``pairs`` faces with each seed among those that show all traits, fewer if there are fewer; chance is 50 %.
    """
    fit = [face for face in faces if face.whole]
    right: dict[str, list[list[float]]] = {name: [[] for _ in range(seeds)] for name in TRAITS}
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        for face in some(fit, pairs, rng):
            picture = generator.read_picture(face.pixels)
            true = generator.score(picture, prompt(face.values))
            for name in TRAITS:
                false = generator.score(picture, prompt(changed(face.values, name, rng)))
                right[name][seed].append(float(true > false))
            on_pair()
    return {name: share(scores) for name, scores in right.items()}
