"""Reports on FP8 attention, read from a run's metrics."""

from dataclasses import dataclass
from pathlib import Path

from gptface_dist.errors import UserError
from gptface_dist.training.metrics import read_metrics

PREFIX = "attention/"
SATURATED, FLUSHED = "_saturated", "_flushed"


@dataclass(frozen=True)
class LayerReport:
    """One layer."""

    out_error: float
    """Of the output, against bf16."""
    gradient_error: float | None
    """The worst of the gradients of q, k, v."""
    fallen_back: bool
    """Whether it goes on without FP8."""
    tensors: dict[str, tuple[float, float]]
    """Of each tensor in FP8, the shares that saturate and that are flushed to zero."""


@dataclass(frozen=True)
class Report:
    """All layers at one step."""

    step: int
    """The step."""
    layers: dict[int, LayerReport]
    """By their number in the model."""


def entries(layer: int, report: LayerReport) -> dict[str, float]:
    """A layer's report as entries of a step's metrics: ``attention/LAYER/out_error`` and so on."""
    found = {"out_error": report.out_error, "fallen_back": float(report.fallen_back)}
    if report.gradient_error is not None:
        found["gradient_error"] = report.gradient_error
    for name, (saturated, flushed) in report.tensors.items():
        found |= {name + SATURATED: saturated, name + FLUSHED: flushed}
    return {f"{PREFIX}{layer:02}/{name}": value for name, value in found.items()}


def read(folder: Path, step: int | None = None) -> Report:
    """The report of a step, or the last one, of the run in a folder; :class:`UserError` where there is none."""
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
