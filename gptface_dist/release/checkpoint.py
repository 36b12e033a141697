"""Read a training checkpoint in one process, without a process group, one tensor at a time."""

import io
import math
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from gptface_dist.checkpoint.chunk_spec import ChunkSpec
from gptface_dist.checkpoint.fingerprint import fingerprint
from gptface_dist.checkpoint.folder import resolve
from gptface_dist.checkpoint.local_shard import EMA, WEIGHTS
from gptface_dist.checkpoint.manifest import Manifest
from gptface_dist.checkpoint.record import RECORD_NAME, RunRecord
from gptface_dist.checkpoint.save import STATE_NAME
from gptface_dist.checkpoint.storage import METADATA_NAME, read_metadata
from gptface_dist.errors import Damaged, UserError, one_line
from gptface_dist.model.options import ModelOptions
from gptface_dist.objectives.reference_outputs import REFERENCE_NAME, ReferenceOutputs
from gptface_dist.objectives.registry import ObjectiveOptions, build_objective
from gptface_dist.parallel.layout import Layout
from gptface_dist.release.card import Card
from gptface_dist.tokenizers.vocabulary import Vocabulary


@dataclass(frozen=True)
class TrainingCheckpoint:
    """A published checkpoint, opened; its small files are checked against the manifest."""

    path: Path
    """Folder of the checkpoint."""
    manifest: Manifest
    """Files, tensors and hashes."""
    record: RunRecord
    """Step, state, configuration and metrics of its run."""
    objective: ObjectiveOptions
    """The run's objective."""
    options: ModelOptions
    """Size and form of the model."""
    vocabulary: Vocabulary
    """The joint ids."""
    layout: Layout
    """Parallel layout of the run that wrote it."""

    @classmethod
    def open(cls, path: Path) -> "TrainingCheckpoint":
        """Open a checkpoint, or the latest one of a run's folder; :class:`UserError` where it is missing or damaged."""
        folder = resolve(path)
        try:
            manifest = Manifest.read(folder)
        except Damaged as damage:
            raise UserError(f"{damage}: use another checkpoint") from None
        small = [name for name in (RECORD_NAME, REFERENCE_NAME, f"{STATE_NAME}/{METADATA_NAME}") if name in manifest.files]
        for problem in manifest.problems(folder, small):
            raise UserError(f"{problem}: the checkpoint is damaged, use another")
        record = RunRecord.read(folder)
        try:
            options, layout = ModelOptions(**record.config["model"]), Layout(**record.config["layout"])
            objective = ObjectiveOptions(**record.config["objective"])
            build_objective(objective, {})
            vocabulary = Vocabulary(**record.vocabulary)
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder / RECORD_NAME} describes no model of this version ({error})") from None
        return cls(folder, manifest, record, objective, options, vocabulary, layout)

    @cached_property
    def reference(self) -> ReferenceOutputs:
        """The distributed model's outputs on the reference batch when the checkpoint was written."""
        return ReferenceOutputs.load(self.path / REFERENCE_NAME)

    @property
    def card(self) -> Card:
        """Provenance of a release of this checkpoint, without licences and checks."""
        sources = self.record.config["data"]["sources"]
        equal = len({source["weight"] for source in sources}) == 1
        return Card(
            data=[source["path"] + ("" if equal else f" (weight {source['weight']:g})") for source in sources],
            step=self.record.step,
            samples=self.record.state.get("samples"),
            tokens=self.record.state.get("tokens"),
            losses={
                name: value
                for name, value in self.record.metrics.items()
                if name.startswith(("loss", "accuracy")) and math.isfinite(value)
            },
            layout=str(self.layout),
            versions=self.record.versions,
            config=self.record.config,
        )

    @property
    def weights(self) -> "StoredTensors":
        """The float32 master weights."""
        return StoredTensors(self, WEIGHTS)

    @property
    def ema(self) -> "StoredTensors":
        """The float32 EMA of the weights; empty where the run kept none."""
        return StoredTensors(self, EMA)

    @cached_property
    def metadata(self) -> Metadata:
        """The metadata of torch.distributed.checkpoint; :class:`UserError` where it is unreadable."""
        path = self.path / STATE_NAME / METADATA_NAME
        try:
            return read_metadata(path)
        except (OSError, EOFError, pickle.UnpicklingError, AttributeError) as error:
            raise UserError(f"{path} cannot be read ({error}): use another checkpoint") from None


class StoredTensors(Mapping[str, Tensor]):
    """Whole float32 tensors of one kind by name; each access assembles one from its chunks and checks its fingerprint.

    Beyond the tensor, an access takes the memory of two chunks.
    """

    def __init__(self, checkpoint: TrainingCheckpoint, kind: str):
        self._checkpoint, self._prefix = checkpoint, f"{kind}/"
        self._names = [key.removeprefix(self._prefix) for key in checkpoint.manifest.tensors if key.startswith(self._prefix)]

    def __getitem__(self, name: str) -> Tensor:
        key = self._prefix + name
        entry = self._checkpoint.manifest.tensors[key]
        tensor = torch.empty(entry.shape)
        try:
            self._read(key, tensor)
            whole = ChunkSpec((0,) * tensor.dim(), entry.shape)
            # Also detects a missing chunk: uninitialised memory has another fingerprint.
            if f"{fingerprint([(whole, tensor)], entry.shape):016x}" != entry.fingerprint:
                raise ValueError("its numbers are not those that were written")
        except (OSError, KeyError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = one_line(error)
            raise UserError(f"{self._checkpoint.path}: {key} cannot be read ({reason}): use another checkpoint") from None
        return tensor

    def _read(self, key: str, tensor: Tensor) -> None:
        metadata = self._checkpoint.metadata
        stored: Any = metadata.state_dict_metadata[key]
        if not isinstance(stored, TensorStorageMetadata) or metadata.storage_data is None:
            raise ValueError("it is stored as something else than a tensor")
        for chunk in stored.chunks:
            place = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
            with (self._checkpoint.path / STATE_NAME / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                values = torch.load(io.BytesIO(file.read(place.length)), map_location="cpu", weights_only=True)
            target = tensor
            for axis, (start, length) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                target = target.narrow(axis, start, length)
            target.copy_(values)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
