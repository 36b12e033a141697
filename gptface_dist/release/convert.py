"""Convert a training checkpoint to a release, one tensor at a time; refused unless the plain model has equal outputs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from gptface_dist.errors import UserError
from gptface_dist.model.reference_batch import ReferenceBatch
from gptface_dist.objectives.reference_outputs import REFERENCE_NAME, ReferenceOutputs, difference, reference_outputs
from gptface_dist.release.card import UNKNOWN, Card
from gptface_dist.release.checkpoint import TrainingCheckpoint
from gptface_dist.release.config import CONFIG_NAME, DTYPES, ReleaseConfig
from gptface_dist.release.streamed import streamed_model, values_read
from gptface_dist.release.tensors import SHARD_BYTES, Weights, check_table
from gptface_dist.release.writer import finish, publishing, write_model
from gptface_dist.tokenizers import vocabulary as vocabularies

TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}
"""Largest relative error of the heads' outputs. Rounding alone makes about 1e-6 and 1e-2."""

BLOCK = 2**22
"""Number of values compared at a time."""

Report = Callable[[str, int, int], None]
"""Called with the current action, the number of values that it has just processed, and its total."""


@dataclass(frozen=True)
class ConvertOptions:
    """Dtype, choice of weights, tokenizers and model card of a release."""

    dtype: str = "bfloat16"
    """Dtype of the released weights: ``bfloat16`` or ``float32``."""
    ema: bool = False
    """Release the EMA of the weights instead of the last step's."""
    tokenizers: Path | None = None
    """Folder of the run's tokenizers; None: the one in the run's configuration."""
    name: str = "GPTFace"
    """Title of the model card."""
    license: str = UNKNOWN
    """Licence of the weights."""
    data_license: str = UNKNOWN
    """Licence of the training data."""
    shard_bytes: int = SHARD_BYTES
    """Largest file of weights in bytes, unless one tensor alone is larger."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"a release is one of {', '.join(DTYPES)}, not {self.dtype!r}")


def convert(source: Path, path: Path, options: ConvertOptions, report: Report = lambda what, done, total: None) -> Card:
    """Write the release ``path`` of a training checkpoint, or of a run's latest one.

    Before anything is written, the plain model runs with the checkpoint's master weights and must reproduce the outputs that
    the distributed model recorded. The written files are then read back: each tensor must equal the source's, rounded, and
    the model must reproduce the source's outputs up to rounding. No more than about two tensors are in memory at a time.

    :class:`UserError` where the checkpoint or the tokenizers are missing, damaged or not of one model, ``path`` exists, or
    a check fails; then nothing is left on disk.
    """
    if (source / CONFIG_NAME).is_file():
        raise UserError(
            f"{source} is no checkpoint but a release, by its {CONFIG_NAME}: give the folder of a checkpoint or of a run"
        )
    checkpoint = TrainingCheckpoint.open(source)
    if path.exists():
        raise UserError(f"{path} exists: remove it or give another name")
    tokenizers = options.tokenizers or Path(checkpoint.record.config["data"]["tokenizers"])
    if not tokenizers.is_dir():
        raise UserError(f"{tokenizers}, where the run had its tokenizers, is no folder: say where they are with --tokenizers")
    if vocabularies.verify(tokenizers) != checkpoint.vocabulary:
        raise UserError(f"{tokenizers} are not the tokenizers of {checkpoint.path}: say where those are with --tokenizers")
    weights = checkpoint.ema if options.ema else checkpoint.weights
    if options.ema and not weights:
        raise UserError(f"{checkpoint.path} holds no running average: convert without --ema")
    recorded = checkpoint.reference
    grid = recorded.batch.grid
    model = ReleaseConfig(checkpoint.objective, checkpoint.options, checkpoint.vocabulary, grid, options.dtype, Card())
    total = sum(torch.Size(shape).numel() for shape in model.shapes.values())
    check_table(checkpoint.weights, model.shapes, f"{checkpoint.path}")

    wanted = _run(model, checkpoint.weights, recorded.batch, "comparing with the training run", report)
    parity = difference(wanted, recorded.outputs)
    _refuse(
        parity, TOLERANCES[recorded.dtype], f"{checkpoint.path}: the plain model's outputs are not those of the training run"
    )
    if options.ema:
        wanted = _run(model, weights, recorded.batch, "running the average", report)

    with publishing(path) as folder:
        hashes = write_model(
            folder, model, tokenizers, weights, options.shard_bytes, lambda values: report("writing", values, total)
        )
        _compare(Weights(folder), weights, DTYPES[options.dtype], lambda values: report("reading back", values, total))
        outputs = _run(model, Weights(folder), recorded.batch, "running the release", report)
        rounding = difference(outputs, wanted)
        _refuse(rounding, TOLERANCES[options.dtype], f"{path}: {options.dtype} changes the outputs too much")
        ReferenceOutputs(recorded.batch, outputs, "float32").save(folder / REFERENCE_NAME)
        card = replace(
            checkpoint.card,
            name=options.name,
            license=options.license,
            data_license=options.data_license,
            ema=options.ema,
            parity=parity,
            rounding=rounding,
        )
        finish(folder, replace(model, card=card), hashes)
    return card


def _run(
    model: ReleaseConfig, weights: Mapping[str, Tensor], batch: ReferenceBatch, what: str, report: Report
) -> dict[str, Tensor]:
    objective = model.build_objective()
    total = values_read(objective, model.options, model.vocabulary)
    streamed = streamed_model(objective, model.options, model.vocabulary, weights, lambda values: report(what, values, total))
    return reference_outputs(objective, streamed, batch)


def _refuse(errors: dict[str, float], tolerance: float, what: str) -> None:
    """:class:`UserError` unless all errors are within the tolerance; NaN is not."""
    if not all(error <= tolerance for error in errors.values()):
        listed = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        raise UserError(f"{what} (relative error: {listed}; at most {tolerance:g}): nothing was written")


def _compare(written: Weights, weights: Mapping[str, Tensor], dtype: torch.dtype, done: Callable[[int], None]) -> None:
    """:class:`UserError` unless every tensor on disk is the source's to the bit, after rounding."""
    # As integers, so that NaN equals itself; the comparison of outputs refuses NaN.
    bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
    for name, shape in written.shapes.items():
        source = weights[name]
        each = max(1, BLOCK * shape[0] // source.numel())
        for start in range(0, shape[0], each):
            rows = source[start : start + each].to(dtype)
            if not torch.equal(written.rows(name, start, start + each).view(bits), rows.view(bits)):
                raise UserError(f"{name} was not written as it is in the checkpoint: nothing was kept; the disk may be failing")
            done(rows.numel())
        # Free it before the next tensor is read.
        del source
