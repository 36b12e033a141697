"""What a model gave for the reference batch, and the file that keeps it.

A training run records its distributed model's outputs with every checkpoint; conversion and loading ask whether the plain
model, with the weights that were written, gives the same. Outputs of all heads are compared, not features, so that the output
embeddings and heads are covered.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gptface_dist.errors import UserError, one_line
from gptface_dist.files import write_atomically
from gptface_dist.model.plain import Transformer
from gptface_dist.model.reference_batch import ReferenceBatch
from gptface_dist.objectives.objective import Objective

REFERENCE_NAME = "reference.safetensors"
REFERENCE_FORMAT = "gptface-reference-2"
BATCH = ("tokens", "labels", "segments", "positions", "lengths")
OUTPUT = "output."
"""Prefix of the outputs' names in the file."""


@dataclass(frozen=True)
class ReferenceOutputs:
    """A batch and what a model gave for it."""

    batch: ReferenceBatch
    """The sequences."""
    outputs: Mapping[str, Tensor]
    """Float32 outputs by name: ``Objective.reference_outputs``."""
    dtype: str
    """What the model computed in: ``float32`` or ``bfloat16``."""

    def content(self) -> bytes:
        """The file: safetensors named as the fields of the batch, and ``output.NAME``."""
        tensors = {name: getattr(self.batch, name) for name in BATCH} | {OUTPUT + k: v for k, v in self.outputs.items()}
        data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        return save(data, {"format": REFERENCE_FORMAT, "dtype": self.dtype})

    def save(self, path: Path) -> None:
        """Write :meth:`content`, whole or not at all."""
        write_atomically(path, self.content())

    @classmethod
    def load(cls, path: Path) -> "ReferenceOutputs":
        """Read what :meth:`save` wrote; :class:`UserError` where it is missing, damaged or of another format."""
        if not path.is_file():
            raise UserError(f"{path} does not exist: without it nothing says what the model should compute")
        try:
            with safe_open(path, framework="pt") as file:
                said = file.metadata() or {}
                if said.get("format") != REFERENCE_FORMAT:
                    raise UserError(f"{path} has the format {said.get('format')!r}, not {REFERENCE_FORMAT!r}")
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            batch = ReferenceBatch(**{name: tensors.pop(name) for name in BATCH}, padded=True)
            outputs = {name.removeprefix(OUTPUT): tensor for name, tensor in tensors.items()}
            return cls(batch, outputs, said["dtype"])
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            raise UserError(f"{path} holds no reference outputs ({one_line(error)})") from None


@torch.no_grad()
def reference_outputs(objective: Objective, model: Transformer, batch: ReferenceBatch) -> dict[str, Tensor]:
    """What the plain model gives, without dropout, in the dtype of its weights. Model and batch lie on one device."""
    training = model.training
    model.eval()
    try:
        features = model.encode(objective.embed(model.embeddings, batch), batch.lengths)
        return objective.reference_outputs(features, batch, model)
    finally:
        model.train(training)


def difference(outputs: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative error of each output: norm of the difference over norm of ``wanted``; NaN where not finite.

    :class:`UserError` where they are not outputs of the same names and shapes.
    """
    shapes = [{name: tuple(tensor.shape) for name, tensor in each.items()} for each in (outputs, wanted)]
    if shapes[0] != shapes[1]:
        raise UserError(f"reference outputs {shapes[1]} are another model's: this one gives {shapes[0]}")
    errors = {}
    for name, reference in wanted.items():
        reference = reference.double()
        errors[name] = float((outputs[name].double() - reference).norm() / reference.norm().clamp(min=1e-30))
    return errors
