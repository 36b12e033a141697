"""Writing a checkpoint: all ranks in parallel, a piece at a time, published whole or not at all."""

import hashlib
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from gptface_dist.checkpoint import folder
from gptface_dist.checkpoint.fingerprint import fingerprint
from gptface_dist.checkpoint.manifest import MANIFEST_NAME, FileEntry, Manifest, TensorEntry
from gptface_dist.checkpoint.record import RECORD_NAME, RunRecord
from gptface_dist.checkpoint.storage import METADATA_NAME, SavePieces, Writer
from gptface_dist.checkpoint.tensor_shards import TensorShards
from gptface_dist.distributed.collectives import Failed, RankGroup, describe
from gptface_dist.files import sha256

STATE_NAME = "state"


@dataclass(frozen=True)
class Content:
    """What is to be written, on one rank."""

    pieces: Mapping[str, TensorShards]
    """This rank's pieces, by key: over all ranks each element once."""
    record: RunRecord
    """Of the run; rank 0's is written."""
    files: Mapping[str, bytes]
    """Small files beside the tensors, by name; rank 0's are written."""


def save_checkpoint(checkpoints: Path, content: Content, ranks: RankGroup) -> Path:
    """Write and publish a checkpoint; all ranks call it. Returns its folder.

    Beyond ``content``, a rank needs the memory of three pieces. :class:`Failed`, on all ranks, where one could not write
    (full disk, for one): then nothing is published, and what was written is removed.
    """
    step = content.record.step
    try:
        new = ranks.on_rank0(lambda: folder.begin(checkpoints, step))
        # Before any file: a mistake in here is no reason to write gigabytes.
        prints = ranks.all_gather(lambda: fingerprints(content.pieces))
        writer = Writer(new / STATE_NAME)
        _write_state(content.pieces, writer, ranks)
        written = ranks.all_gather(lambda: writer.written)
        return ranks.on_rank0(lambda: _publish(new, checkpoints, content, prints, written))
    except Failed:
        # No rank goes on before it is gone: whoever tries again, or looks, finds a clean folder.
        ranks.on_rank0(lambda: folder.abandon(checkpoints, step))
        raise


def fingerprints(pieces: Mapping[str, TensorShards]) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape, and this rank's part of the fingerprint, of each tensor."""
    return {
        key: (one.shape, fingerprint(((piece.box, piece.memory) for piece in one.pieces), one.shape))
        for key, one in pieces.items()
    }


def together(prints: list[dict[str, tuple[tuple[int, ...], int]]]) -> dict[str, TensorEntry]:
    """All ranks' parts of the fingerprints -> the tensors' entries, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    totals: dict[str, int] = {}
    for found in prints:
        for key, (shape, part) in found.items():
            shapes[key] = shape
            totals[key] = (totals.get(key, 0) + part) % 2**64
    return {key: TensorEntry(shapes[key], f"{totals[key]:016x}") for key in sorted(shapes)}


def _write_state(pieces: Mapping[str, TensorShards], writer: Writer, ranks: RankGroup) -> None:
    try:
        with warnings.catch_warnings():
            # Alone, without process groups, DCP says so each time.
            warnings.simplefilter("ignore")
            state_dict_saver.save(
                dict(pieces),
                storage_writer=writer,
                planner=SavePieces(),
                process_group=ranks.group,
                no_dist=ranks.group is None,
            )
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        raise Failed((f"rank {rank}: " if ranks.size > 1 else "") + describe(reason)) from None


def _publish(
    new: Path,
    checkpoints: Path,
    content: Content,
    prints: list[dict[str, tuple[tuple[int, ...], int]]],
    written: list[dict[str, tuple[int, str]]],
) -> Path:
    files = {f"{STATE_NAME}/{name}": FileEntry(*entry) for one in written for name, entry in one.items()}
    for name, entry in files.items():
        # Another machine's file may not be what it wrote, or not be here at all.
        if (size := (new / name).stat().st_size) != entry.bytes:
            raise OSError(f"{new / name} has {size} bytes, {entry.bytes} were written")
    metadata = new / STATE_NAME / METADATA_NAME
    files[f"{STATE_NAME}/{METADATA_NAME}"] = FileEntry(metadata.stat().st_size, sha256(metadata))
    for name, data in {RECORD_NAME: content.record.text().encode(), **content.files}.items():
        _write(new / name, data)
        files[name] = FileEntry(len(data), hashlib.sha256(data).hexdigest())
    manifest = Manifest(content.record.step, dict(sorted(files.items())), together(prints))
    _write(new / MANIFEST_NAME, manifest.text().encode())
    return folder.publish(new, checkpoints, content.record.step)


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
