"""Prompt agreement: a judge looks at faces drawn for random prompts, unguided and guided."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gptface_dist.generation import Generator, Gradient, Guidance, Sampling
from gptface_dist.generation.study.judge import Judge, judged
from gptface_dist.generation.study.statistics import Gain, Mean, Share, chance, gain, mean, share
from gptface_dist.generation.study.traits import TRAITS, Values, prompt, random_values

MODES = {
    "unguided": Guidance(),
    "ITM gradient": Guidance(gradient=Gradient(strength=0.5)),
    "ITM rerank": Guidance(rerank=4),
    "classifier-free 2": Guidance(classifier_free=2.0),
    "classifier-free 5": Guidance(classifier_free=5.0),
    "classifier-free 5 + ITM rerank": Guidance(classifier_free=5.0, rerank=4),
}
"""Guidance by name; gains are measured against the first."""
PAIR = 2
"""Pictures for each prompt; their difference is the diversity."""
SHOWN = 8
"""Number of prompts of the first seed whose pictures are kept."""


@dataclass(frozen=True)
class ModeResult:
    """Measurements of one way of drawing."""

    agreement: dict[str, Share]
    """By trait: share of pictures in which the judge sees what the prompt asked for."""
    chance: dict[str, Mean]
    """By trait: expected share for pictures independent of their prompts."""
    mean: Share
    """The agreement over all traits."""
    gain: Gain
    """Difference of :attr:`mean` from the first mode's, for the same prompts and noise."""
    diversity: Mean
    """Root mean square difference of two pictures of one prompt, in grey levels of 255."""
    seconds: Mean
    """Seconds a picture: CPU time of the process on a CPU, wall-clock time on a GPU."""
    pictures: list[np.ndarray]
    """The first picture of each of the first SHOWN prompts, uint8 [S, S, 3]."""


def measure_prompts(
    generator: Generator, judges: Sequence[Judge], prompts: int, sampling: Sampling, on_picture: Callable[[], None]
) -> dict[str, ModeResult]:
    """Draw PAIR faces for each of ``prompts`` random prompts with each seed, in each mode; ``judges`` has one for each seed."""
    clock = time.process_time if generator.device.type == "cpu" else time.perf_counter
    prompted = [prompt_values(prompts, seed) for seed in range(len(judges))]
    wanted = [[values for values in of_seed for _ in range(PAIR)] for of_seed in prompted]
    first: list[np.ndarray] | None = None
    results: dict[str, ModeResult] = {}
    for mode, guidance in MODES.items():
        drawn: list[list[np.ndarray]] = []
        seconds = []
        for seed, of_seed in enumerate(prompted):
            started = clock()
            texts = [prompt(values) for values in of_seed]
            pictures = generator.generate(texts, PAIR, replace(sampling, seed=seed), guidance, on_picture)
            drawn.append([picture.pixels for picture in pictures])
            seconds.append((clock() - started) / len(pictures))
        seen = [judged(*both) for both in zip(judges, drawn, strict=True)]
        # A trial is a prompt: its pictures are not independent of each other, so its score is their mean.
        scores = {name: [_scores(name, *both) for both in zip(wanted, seen, strict=True)] for name in TRAITS}
        means = [np.mean([scores[name][seed] for name in TRAITS], axis=0) for seed in range(len(judges))]
        first = means if first is None else first
        results[mode] = ModeResult(
            {name: share(scores[name]) for name in TRAITS},
            {name: mean([_chance(name, *both) for both in zip(wanted, seen, strict=True)]) for name in TRAITS},
            share(means),
            gain(first, means),
            mean([_diversity(of_seed) for of_seed in drawn]),
            mean(seconds),
            drawn[0][: SHOWN * PAIR : PAIR],
        )
    return results


def prompt_values(prompts: int, seed: int) -> list[Values]:
    """Draw the trait values that the prompts of a seed ask for."""
    return random_values(prompts, np.random.default_rng(seed))


def _scores(name: str, wanted: list[Values], seen: list[Values]) -> np.ndarray:
    """Float64 [prompts]: share of each prompt's pictures that show the value it asks for."""
    right = [values[name] == verdict[name] for values, verdict in zip(wanted, seen, strict=True)]
    return np.array(right, dtype=float).reshape(-1, PAIR).mean(axis=1)


def _chance(name: str, wanted: list[Values], seen: list[Values]) -> float:
    return chance([values[name] for values in wanted], [values[name] for values in seen])


def _diversity(drawn: list[np.ndarray]) -> float:
    pairs = zip(drawn[::PAIR], drawn[1::PAIR], strict=True)
    return float(np.mean([np.sqrt(np.mean((first.astype(float) - second) ** 2)) for first, second in pairs]))
