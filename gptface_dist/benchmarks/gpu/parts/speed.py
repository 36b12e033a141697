"""Attention forward and backward over lengths, head sizes and kinds of batches, ours in FP8 beside PyTorch's and cuDNN's."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from gptface_dist.benchmarks.gpu.context import POISON, Context
from gptface_dist.kernels.attention.benchmark import Comparison, Speed, Untimed, compare, crossover
from gptface_dist.kernels.attention.options import BACKWARDS
from gptface_dist.kernels.attention.shapes import PACKED, PADDED, Shape
from gptface_dist.model.attention import sdpa

_FIRST = ((4096, 128), (1024, 128), (1024, 64), (4096, 64), (333, 64), (333, 128))
_THEN = ((8192, 128), (2048, 128), (2048, 64), (8192, 64), (16384, 128), (16384, 64))
SHAPES = (
    *(Shape.usual(tokens, size) for tokens, size in _FIRST),
    *(Shape.usual(1024, 64, kind) for kind in (PADDED, PACKED)),
    *(Shape.usual(tokens, size) for tokens, size in _THEN),
)
"""The most telling first: what does not fit the time is left out."""

DRY_SHAPES = (Shape(40, 64, 1, 1), Shape(40, 64, 2, 1, PACKED))


def run(context: Context) -> None:
    """Time every way on every shape, with the package's table of launches."""
    speeds = measure(context, DRY_SHAPES if context.dry else SHAPES, Comparison(model=sdpa))
    for backward in BACKWARDS:
        context.record("crossover", backward=backward, fp8_from=crossover(speeds, backward))


def measure(context: Context, shapes: Sequence[Shape], what: Comparison) -> list[Speed]:
    """Time every way on the shapes, and record each at once."""
    timer, speeds = context.timer(20), []

    def time_ways(shape: Shape, about: dict[str, Any]) -> None:
        for found in compare(shape, timer, context.device(), what):
            if isinstance(found, Untimed):
                if any(word in found.reason for word in POISON):
                    raise RuntimeError(found.reason)
                context.record("untimed", **about, way=found.way, why=found.reason)
                continue
            if found.parts is None:
                speeds.append(found)
                context.record(
                    "speed", **about, way=found.way, forward_ms=found.forward, backward_ms=found.backward,
                    forward_tflops=shape.teraflops(found.forward, 2), backward_tflops=shape.teraflops(found.backward, 5),
                    out_error=found.out_error, gradient_error=found.gradient_error,
                )  # fmt: skip
            else:
                context.record("kernels_ms", **about, way=found.way, **found.parts)
            if context.left() < 5:
                context.record("left out", about={**about, "after": found.way}, why="the time is over")
                return

    for shape in shapes:
        # "kind" is that of a record.
        about = {"batches" if name == "kind" else name: value for name, value in asdict(shape).items()}
        context.attempt(about, lambda shape=shape, about=about: time_ways(shape, about), 12)  # type: ignore[misc]
    return speeds
