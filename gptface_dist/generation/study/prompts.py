"""Prompt agreement: faces drawn for random prompts, unguided and guided, looked at by the judge."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from gptface_dist.generation import Generator, Gradient, Guidance, Sampling
from gptface_dist.generation.study.judge import Judge, judged
from gptface_dist.generation.study.statistics import Share, chance, paired_difference, share
from gptface_dist.generation.study.traits import TRAITS, Values, prompt, random_values

MODES = {
    "unguided": Guidance(),
    "ITM gradient": Guidance(gradient=Gradient(strength=0.5)),
    "ITM rerank": Guidance(rerank=4),
    "classifier-free 2": Guidance(classifier_free=2.0),
    "classifier-free 5": Guidance(classifier_free=5.0),
    "classifier-free 5 + ITM rerank": Guidance(classifier_free=5.0, rerank=4),
}
"""What is compared; the first one is what the others are measured against."""
PAIR = 2
"""Pictures a prompt: how much two differ is the diversity."""


@dataclass(frozen=True)
class ModeResult:
    """What one way of drawing gave."""

    agreement: dict[str, Share]
    """By trait: share of pictures in which the judge sees what the prompt asked for."""
    chance: dict[str, float]
    """By trait: that share if pictures had nothing to do with their prompts."""
    mean: Share
    """Over all traits."""
    gain: tuple[float, float]
    """95 % interval of the mean's gain over the first mode, over the same prompts and noise."""
    diversity: float
    """Root mean square difference of two pictures of one prompt, in grey levels of 255."""
    seconds: float
    """CPU time a picture."""
    pictures: list[np.ndarray]
    """A few of them, uint8 [S, S, 3]."""


def measure_prompts(
    generator: Generator, judge: Judge, prompts: int, seeds: int, sampling: Sampling, on_picture: Callable[[], None]
) -> dict[str, ModeResult]:
    """Draw PAIR faces for each of ``prompts`` random prompts with each of ``seeds`` seeds, in every mode."""
    asked = [[random_values(np.random.default_rng((seed, number))) for number in range(prompts)] for seed in range(seeds)]
    overall: dict[str, np.ndarray] = {}
    results: dict[str, ModeResult] = {}
    for mode, guidance in MODES.items():
        started = time.process_time()
        drawn: list[list[np.ndarray]] = []
        for seed in range(seeds):
            texts = [prompt(values) for values in asked[seed]]
            found = generator.generate(texts, PAIR, replace(sampling, seed=seed), guidance, on_picture)
            drawn.append([picture.pixels for picture in found])
        seconds = (time.process_time() - started) / (seeds * prompts * PAIR)
        seen = [judged(judge, pictures) for pictures in drawn]
        wanted = [[values for values in asked[seed] for _ in range(PAIR)] for seed in range(seeds)]
        # A trial is a prompt: its score is the mean over its pictures, which are not independent of each other.
        scores = {name: [_scores(name, *both) for both in zip(wanted, seen, strict=True)] for name in TRAITS}
        means = [np.mean([scores[name][seed] for name in TRAITS], axis=0) for seed in range(seeds)]
        overall[mode] = np.concatenate(means)
        results[mode] = ModeResult(
            {name: share(scores[name]) for name in TRAITS},
            {name: chance(_flat(wanted, name), _flat(seen, name)) for name in TRAITS},
            share(means),
            paired_difference(overall[next(iter(MODES))], overall[mode]),
            _diversity(drawn),
            seconds,
            drawn[0][: 8 * PAIR : PAIR],
        )
    return results


def example_prompts(prompts: int) -> list[str]:
    """The prompts of :attr:`ModeResult.pictures`."""
    return [prompt(random_values(np.random.default_rng((0, number)))) for number in range(min(8, prompts))]


def _scores(name: str, wanted: list[Values], seen: list[Values]) -> np.ndarray:
    """Float64 [prompts]: share of each prompt's pictures that show the trait it asked for."""
    right = [asked[name] == found[name] for asked, found in zip(wanted, seen, strict=True)]
    return np.array(right, dtype=float).reshape(-1, PAIR).mean(axis=1)


def _flat(values: list[list[Values]], name: str) -> list[int]:
    return [one[name] for of_seed in values for one in of_seed]


def _diversity(drawn: list[list[np.ndarray]]) -> float:
    pairs = [
        (of_seed[i].astype(float), of_seed[i + 1].astype(float)) for of_seed in drawn for i in range(0, len(of_seed), PAIR)
    ]
    return float(np.mean([np.sqrt(np.mean((one - other) ** 2)) for one, other in pairs]))
