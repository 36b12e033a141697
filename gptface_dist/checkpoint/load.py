"""Reading a checkpoint: found, checked against its manifest, read by every rank for the layout it has, and checked again."""

import logging
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException

from gptface_dist.checkpoint import folder
from gptface_dist.checkpoint.local_shard import EMA, OptimizerStateView
from gptface_dist.checkpoint.manifest import Manifest
from gptface_dist.checkpoint.record import RunRecord
from gptface_dist.checkpoint.save import STATE_NAME, fingerprints, together
from gptface_dist.checkpoint.storage import LoadPieces, Reader
from gptface_dist.checkpoint.tensor_shards import collect_shards
from gptface_dist.distributed.collectives import Failed, RankGroup, describe
from gptface_dist.errors import Damaged, UserError

log = logging.getLogger(__name__)


def find(checkpoints: Path, ranks: RankGroup, previous: bool) -> Path | None:
    """The latest checkpoint that is undamaged; None where there has been none. All ranks call it.

    With ``previous``, damaged ones are named in the log, set aside under another name, and passed over, from the latest
    down; otherwise, or where all are damaged, :class:`UserError` names them.
    """
    found: list[str] = []
    damaged: list[Path] = []
    for candidate in ranks.on_rank0(lambda: _candidates(checkpoints)):
        reason = candidate if isinstance(candidate, str) else damage(candidate, ranks)
        if isinstance(candidate, Path):
            if not reason:
                ranks.on_rank0(lambda: folder.set_aside(damaged))
                return candidate
            damaged.append(candidate)
        found.append(reason)
        if not previous:
            raise UserError(f"{reason}; checkpoint.damaged=previous would go on from the one before")
        if ranks.rank == 0:
            log.warning("damaged checkpoint passed over: %s", reason)
    if found:
        raise UserError(f"no checkpoint of {checkpoints} is undamaged: {'; '.join(found)}")
    return None


def _candidates(checkpoints: Path) -> list[Path | str]:
    """Checkpoints to try, in order; in place of a latest one that cannot be told, why."""
    if not checkpoints.is_dir():
        return []
    try:
        newest = folder.latest(checkpoints)
    except Damaged as error:
        return [str(error), *folder.published(checkpoints)]
    if newest is None:
        return []
    below = folder.published(checkpoints)
    if (step := folder.step_of(newest)) is not None:
        below = [path for path in below if (folder.step_of(path) or 0) < step]
    return [newest, *below]


def damage(path: Path, ranks: RankGroup) -> str:
    """Why a checkpoint is not, to the byte, what was published; empty where it is. The ranks share the files out.

    All ranks call it.
    """
    try:
        manifest = ranks.on_rank0(lambda: Manifest.read(path))
    except Failed as error:
        return str(error)
    found = ranks.all_gather(lambda: list(manifest.problems(path, manifest.share(ranks.rank, ranks.size))))
    problems = [problem for one in found for problem in one]
    return f"checkpoint {path} is damaged: {'; '.join(problems)}" if problems else ""


def load_checkpoint(path: Path, state: OptimizerStateView, ranks: RankGroup) -> RunRecord:
    """Read a checkpoint that was found undamaged into the state. All ranks call it.

    Any layout reads what any other wrote. Beyond the state, a rank needs the memory of three pieces. Where the state keeps
    a running average and the checkpoint has none, the average begins as the weights; the other way round, it is left out.
    What was read is checked against the manifest's fingerprints.

    :class:`UserError` where the checkpoint has other tensors than the model.
    """
    record = ranks.on_rank0(lambda: RunRecord.read(path))
    manifest = ranks.on_rank0(lambda: Manifest.read(path))
    pieces = collect_shards(state.local_shards(), written=False)
    averages = {key for key in pieces if _is_average(key)}
    fresh = averages - manifest.tensors.keys()
    for key in fresh:
        del pieces[key]
    _check(path, manifest, ranks.all_gather(lambda: {key: one.shape for key, one in pieces.items()}))
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            state_dict_loader.load(
                pieces,
                storage_reader=Reader(path / STATE_NAME),
                planner=LoadPieces(),
                process_group=ranks.group,
                no_dist=ranks.group is None,
            )
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        raise UserError(f"{path} could not be read: rank {rank}: {describe(reason)}") from None
    state.updates = record.updates
    state.refresh()
    if fresh:
        state.begin_ema()
    written = {key: one for key, one in collect_shards(state.local_shards(), written=True).items() if key in manifest.tensors}
    for key, entry in together(ranks.all_gather(lambda: fingerprints(written))).items():
        if entry != manifest.tensors[key]:
            raise RuntimeError(f"{key} was read as {entry}, but {path} was written with {manifest.tensors[key]}")
    return record


def _is_average(key: str) -> bool:
    return key.startswith(f"{EMA}/")


def _check(path: Path, manifest: Manifest, found: Iterable[dict[str, tuple[int, ...]]]) -> None:
    """Exactly the model's tensors must be there, of the model's shapes."""
    model = {key: shape for one in found for key, shape in one.items()}
    saved = {key: entry.shape for key, entry in manifest.tensors.items() if key in model or not _is_average(key)}
    wrong = [f"{key} is missing" for key in sorted(model.keys() - saved.keys())]
    wrong += [f"{key} is not of this model" for key in sorted(saved.keys() - model.keys())]
    wrong += [
        f"{key} has the shape {list(saved[key])}, the model's is {list(model[key])}"
        for key in sorted(model.keys() & saved.keys())
        if model[key] != saved[key]
    ]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise UserError(f"{path} is of another model: {'; '.join(wrong[:3])}{more}")
