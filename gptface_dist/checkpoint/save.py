"""Saving a checkpoint: all ranks write in parallel, a chunk at a time; it is published whole or not at all."""

import hashlib
import os
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptface_dist.checkpoint import folder
from gptface_dist.checkpoint.fingerprint import fingerprint
from gptface_dist.checkpoint.manifest import MANIFEST_NAME, FileEntry, Manifest, TensorEntry
from gptface_dist.checkpoint.record import RECORD_NAME, RunRecord
from gptface_dist.checkpoint.storage import METADATA_NAME, StoredChunk, metadata_of, write_chunks
from gptface_dist.checkpoint.tensor_shards import TensorShards
from gptface_dist.distributed.collectives import Failed, RankGroup
from gptface_dist.errors import UserError

STATE_NAME = "state"


@dataclass(frozen=True)
class Content:
    """One rank's input to :func:`save_checkpoint`."""

    pieces: Mapping[str, TensorShards]
    """Shards that this rank writes, by key: over all ranks each element once."""
    record: RunRecord
    """Record of the run; rank 0's is written."""
    files: Mapping[str, bytes]
    """Small files beside the tensors, by name; rank 0's are written."""


def save_checkpoint(checkpoints: Path, content: Content, ranks: RankGroup) -> Path:
    """Write and publish a checkpoint; returns its folder. Collective.

    Beyond ``content``, a rank needs the memory of three chunks. :class:`Failed`, on all ranks, if one of them cannot write (a
    full disk, for example): then nothing is published, and the files are removed. :class:`UserError`, before anything is
    written, if a value of any rank is not finite: no run could go on from such a checkpoint.
    """
    step = content.record.step
    ranks.all_gather(lambda: check_finite(content.pieces, step))
    try:
        new = Path(ranks.on_rank0(lambda: str(folder.begin(checkpoints, step))))
        # Before any file: a bug in the state should fail before gigabytes are written.
        prints = ranks.all_gather(lambda: fingerprints(content.pieces))
        written = ranks.all_gather(lambda: _write_state(new / STATE_NAME, ranks.rank, content.pieces))
        return Path(ranks.on_rank0(lambda: str(_publish(new, checkpoints, content, prints, written))))
    except Failed:
        # Collective: no rank continues, or tries again, before the folder is clean.
        ranks.on_rank0(lambda: folder.abandon(checkpoints, step))
        raise


def check_finite(shards: Mapping[str, TensorShards], step: int) -> None:
    """Raise :class:`UserError`, which names the tensors, if one of this rank's values is NaN or infinite."""
    bad = {key: sum(_not_finite(chunk.memory) for chunk in tensor.pieces) for key, tensor in shards.items()}
    names = [key for key, count in bad.items() if count]
    if names:
        more = f" (and {len(names) - 1} tensors more)" if len(names) > 1 else ""
        raise UserError(
            f"step {step}: the update made {bad[names[0]]} values of {names[0]}{more} NaN or infinite: no checkpoint of it is "
            "written, and the one before is sound; a lower optimizer.lr, a larger optimizer.eps or other data may help"
        )


def _not_finite(values: Tensor) -> int:
    # The largest value first, which takes no memory beside the chunk.
    if values.numel() == 0 or torch.linalg.vector_norm(values, torch.inf).isfinite():
        return 0
    return values.numel() - int(values.isfinite().sum())


def fingerprints(shards: Mapping[str, TensorShards]) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape and this rank's summand of the fingerprint of each tensor, by key."""
    return {
        key: (tensor.shape, fingerprint(((chunk.box, chunk.memory) for chunk in tensor.pieces), tensor.shape))
        for key, tensor in shards.items()
    }


def together(prints: list[dict[str, tuple[tuple[int, ...], int]]]) -> dict[str, TensorEntry]:
    """Sum the :func:`fingerprints` of all ranks, as JSON or not, to the tensors' entries, by key."""
    shapes: dict[str, tuple[int, ...]] = {}
    totals: dict[str, int] = {}
    for local in prints:
        for key, (shape, summand) in local.items():
            shapes[key] = tuple(shape)
            totals[key] = (totals.get(key, 0) + summand) % 2**64
    return {key: TensorEntry(shapes[key], f"{totals[key]:016x}") for key in sorted(shapes)}


def _write_state(state: Path, rank: int, shards: Mapping[str, TensorShards]) -> dict[str, Any] | None:
    state.mkdir(exist_ok=True)
    written = write_chunks(state, rank, shards)
    return None if written is None else asdict(written)


def _publish(
    new: Path,
    checkpoints: Path,
    content: Content,
    prints: list[dict[str, tuple[tuple[int, ...], int]]],
    written: list[dict[str, Any] | None],
) -> Path:
    entries, all_written = together(prints), [each for each in written if each]
    files = {f"{STATE_NAME}/{each['name']}": FileEntry(each["size"], each["sha256"]) for each in all_written}
    for name, entry in files.items():
        # On a shared file system, another machine's file may be incomplete or not visible yet.
        if (size := (new / name).stat().st_size) != entry.bytes:
            raise OSError(f"{new / name} has {size} bytes, {entry.bytes} were written")
    chunks = [StoredChunk(**chunk) for each in all_written for chunk in each["chunks"]]
    metadata = pickle.dumps(metadata_of({key: entry.shape for key, entry in entries.items()}, chunks))
    small = {f"{STATE_NAME}/{METADATA_NAME}": metadata, RECORD_NAME: content.record.text().encode(), **content.files}
    for name, data in small.items():
        _write(new / name, data)
        files[name] = FileEntry(len(data), hashlib.sha256(data).hexdigest())
    manifest = Manifest(content.record.step, dict(sorted(files.items())), entries)
    _write(new / MANIFEST_NAME, manifest.text().encode())
    return folder.publish(new, checkpoints, content.record.step)


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
