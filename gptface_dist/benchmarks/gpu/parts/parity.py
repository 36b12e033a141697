"""One process on the device against the plain model, as ``gptface parity`` compares them: loss, norm, every gradient."""

from pathlib import Path

from gptface_dist.benchmarks.gpu.context import Context
from gptface_dist.engine import parity, parity_case
from gptface_dist.parallel.layout import Layout
from gptface_dist.parallel.options import EngineOptions


def run(context: Context) -> None:
    """Compare one ZeRO stage in float32, or ZeRO-1 in bfloat16."""
    bfloat16 = context.variant == "bfloat16"
    zero = 1 if bfloat16 else int(context.variant.removeprefix("zero"))
    engine = EngineOptions("bfloat16" if bfloat16 else "float32")
    case = parity_case.Case(Layout(zero=zero), steps=1 if context.dry else 3, engine=engine)
    about = {"zero": zero, "dtype": engine.dtype}
    context.attempt(about, lambda: _compare(context, case, about))


def _compare(context: Context, case: parity_case.Case, about: dict[str, object]) -> None:
    (result,) = parity.run_parity([case], Path("results.jsonl"))
    measured = {name: (getattr(result, name), result.tolerance) for name in ("loss", "norm", "gradient")}
    context.check({**about, "worst": result.worst}, measured, compared=result.compared > 0)
