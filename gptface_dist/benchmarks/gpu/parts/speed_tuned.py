"""The telling ones of ``speed``'s shapes once more, with the launches that ``tune`` found."""

from gptface_dist.benchmarks.gpu.context import Context
from gptface_dist.benchmarks.gpu.parts.speed import DRY_SHAPES, SHAPES, measure
from gptface_dist.benchmarks.gpu.parts.tune import TABLE
from gptface_dist.kernels.attention.benchmark import Comparison


def run(context: Context) -> None:
    """Time every way, or say that nothing was tuned."""
    table = context.beside("tune", TABLE)
    # A dry run has both at the same time, and shows that this one runs by the package's table.
    if not table.exists() and not context.dry:
        context.record("left out", about={}, why="tune has written no table")
        return
    what = Comparison(launches=str(table) if table.exists() else "")
    measure(context, DRY_SHAPES[:1] if context.dry else SHAPES[:6], what)
