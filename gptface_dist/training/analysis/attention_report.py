"""Reports on FP8 attention as entries of a run's metrics."""

from dataclasses import dataclass
from pathlib import Path

from gptface_dist.errors import UserError
from gptface_dist.training.metrics import read_metrics

PREFIX = "attention/"
SATURATED, FLUSHED = "_saturated", "_flushed"


@dataclass(frozen=True)
class LayerReport:
    """Errors of FP8 attention in one layer; errors are relative root mean squares."""

    out_error: float
    """Error of the output against bf16."""
    gradient_error: float | None
    """Largest error of the gradients of q, k, v; None if not measured."""
    fallen_back: bool
    """Whether the layer fell back from FP8."""
    tensors: dict[str, tuple[float, float]]
    """Fractions of values that saturate / flush to zero in FP8, by tensor."""


@dataclass(frozen=True)
class Report:
    """Reports of all layers at one step."""

    step: int
    """Optimizer steps done."""
    layers: dict[int, LayerReport]
    """Reports by global number of the layer."""


def entries(layer: int, report: LayerReport) -> dict[str, float]:
    """A layer's report as metrics ``attention/LAYER/out_error`` and so on."""
    metrics = {"out_error": report.out_error, "fallen_back": float(report.fallen_back)}
    if report.gradient_error is not None:
        metrics["gradient_error"] = report.gradient_error
    for name, (saturated, flushed) in report.tensors.items():
        metrics |= {name + SATURATED: saturated, name + FLUSHED: flushed}
    return {f"{PREFIX}{layer:02}/{name}": value for name, value in metrics.items()}


def read(folder: Path, step: int | None = None) -> Report:
    """Report of a step (None: the last one) of the run in a folder; :class:`UserError` if there is none."""
    records = read_metrics(folder)
    reported = [record for record in records if any(key.startswith(PREFIX) for key in record)]
    chosen = [record for record in reported if step is None or record["step"] == step]
    if not chosen:
        steps = ", ".join(str(record["step"]) for record in reported) or "none: set attention_health.interval"
        raise UserError(f"{folder} has no report on attention{'' if step is None else f' at step {step}'}; there are {steps}")
    layers: dict[int, dict[str, float]] = {}
    for key, value in chosen[-1].items():
        if key.startswith(PREFIX):
            number, name = key.removeprefix(PREFIX).split("/")
            layers.setdefault(int(number), {})[name] = value
    return Report(int(chosen[-1]["step"]), {number: _layer(values) for number, values in layers.items()})


def _layer(values: dict[str, float]) -> LayerReport:
    names = [name.removesuffix(SATURATED) for name in values if name.endswith(SATURATED)]
    return LayerReport(
        values["out_error"],
        values.get("gradient_error"),
        bool(values["fallen_back"]),
        {name: (values[name + SATURATED], values[name + FLUSHED]) for name in names},
    )
