"""Saving a checkpoint: all ranks write in parallel, a chunk at a time; it is published whole or not at all."""

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
    full disk, for example): then nothing is published, and the files are removed.
    """
    step = content.record.step
    try:
        new = ranks.on_rank0(lambda: folder.begin(checkpoints, step))
        # Before any file: a bug in the state should fail before gigabytes are written.
        prints = ranks.all_gather(lambda: fingerprints(content.pieces))
        writer = Writer(new / STATE_NAME)
        _write_state(content.pieces, writer, ranks)
        written = ranks.all_gather(lambda: writer.written)
        return ranks.on_rank0(lambda: _publish(new, checkpoints, content, prints, written))
    except Failed:
        # Collective: no rank continues, or tries again, before the folder is clean.
        ranks.on_rank0(lambda: folder.abandon(checkpoints, step))
        raise


def fingerprints(shards: Mapping[str, TensorShards]) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape and this rank's summand of the fingerprint of each tensor, by key."""
    return {
        key: (tensor.shape, fingerprint(((chunk.box, chunk.memory) for chunk in tensor.pieces), tensor.shape))
        for key, tensor in shards.items()
    }


def together(prints: list[dict[str, tuple[tuple[int, ...], int]]]) -> dict[str, TensorEntry]:
    """Sum the :func:`fingerprints` of all ranks to the tensors' entries, by key."""
    shapes: dict[str, tuple[int, ...]] = {}
    totals: dict[str, int] = {}
    for local in prints:
        for key, (shape, summand) in local.items():
            shapes[key] = shape
            totals[key] = (totals.get(key, 0) + summand) % 2**64
    return {key: TensorEntry(shapes[key], f"{totals[key]:016x}") for key in sorted(shapes)}


def _write_state(shards: Mapping[str, TensorShards], writer: Writer, ranks: RankGroup) -> None:
    try:
        with warnings.catch_warnings():
            # Without process groups, DCP warns about it each time.
            warnings.simplefilter("ignore")
            state_dict_saver.save(
                dict(shards),
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
    files = {f"{STATE_NAME}/{name}": FileEntry(*entry) for local in written for name, entry in local.items()}
    for name, entry in files.items():
        # On a shared file system, another machine's file may be incomplete or not visible yet.
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
