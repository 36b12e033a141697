"""Loading a checkpoint: find it, check it against its manifest, read it for the present layout, and check the result."""

import logging
from collections.abc import Iterable
from pathlib import Path

from gptface_dist.checkpoint import folder
from gptface_dist.checkpoint.local_shard import EMA, OptimizerStateView
from gptface_dist.checkpoint.manifest import Manifest
from gptface_dist.checkpoint.record import RunRecord
from gptface_dist.checkpoint.save import STATE_NAME, fingerprints, together
from gptface_dist.checkpoint.storage import read_chunks
from gptface_dist.checkpoint.tensor_shards import collect_shards
from gptface_dist.distributed.collectives import Failed, RankGroup
from gptface_dist.errors import Damaged, UserError

log = logging.getLogger(__name__)


def find(checkpoints: Path, ranks: RankGroup, previous: bool) -> tuple[Path | None, list[Path]]:
    """The latest undamaged checkpoint, None if there is none at all, and the damaged ones after it. Collective.

    With ``previous``, it logs damaged ones and tries the one before; otherwise, or if all are damaged, :class:`UserError`
    names them.
    """
    problems: list[str] = []
    damaged: list[Path] = []
    unknown, candidates = ranks.on_rank0(lambda: _candidates(checkpoints))
    for candidate in [None] * bool(unknown) + [Path(each) for each in candidates]:
        reason = unknown if candidate is None else damage(candidate, ranks)
        if candidate is not None:
            if not reason:
                return candidate, damaged
            damaged.append(candidate)
        problems.append(reason)
        if not previous:
            raise UserError(f"{reason}; checkpoint.damaged=previous would go on from the one before")
        if ranks.rank == 0:
            log.warning("damaged checkpoint passed over: %s", reason)
    if problems:
        raise UserError(f"no checkpoint of {checkpoints} is undamaged: {'; '.join(problems)}")
    return None, []


def _candidates(checkpoints: Path) -> tuple[str, list[str]]:
    """Why the latest checkpoint is unknown (empty if it is known), and the checkpoints to try, in order."""
    if not checkpoints.is_dir():
        return "", []
    try:
        newest = folder.latest(checkpoints)
    except Damaged as error:
        return str(error), [str(path) for path in folder.published(checkpoints)]
    if newest is None:
        return "", []
    below = folder.published(checkpoints)
    if (step := folder.step_of(newest)) is not None:
        below = [path for path in below if (folder.step_of(path) or 0) < step]
    return "", [str(path) for path in (newest, *below)]


def damage(path: Path, ranks: RankGroup) -> str:
    """How a checkpoint differs from its manifest, byte by byte; empty if it does not. Each rank checks a share of the files.

    Collective.
    """
    try:
        manifest = Manifest.parse(ranks.on_rank0(lambda: Manifest.read(path).text()), path)
    except Failed as error:
        return str(error)
    local_problems = ranks.all_gather(lambda: list(manifest.problems(path, manifest.share(ranks.rank, ranks.size))))
    problems = [problem for local in local_problems for problem in local]
    return f"checkpoint {path} is damaged: {'; '.join(problems)}" if problems else ""


def load_checkpoint(path: Path, state: OptimizerStateView, ranks: RankGroup) -> RunRecord:
    """Load an undamaged checkpoint (:func:`damage`), of any layout, into the state. Collective.

    Beyond the state, a rank needs the memory of three chunks. If only the state has an EMA, it starts from the loaded weights;
    if only the checkpoint has one, it is skipped. The loaded state must have the manifest's fingerprints.

    :class:`UserError` if names or shapes of the checkpoint's tensors are not the model's.
    """
    record = RunRecord.parse(ranks.on_rank0(lambda: RunRecord.read(path).text()), path)
    manifest = Manifest.parse(ranks.on_rank0(lambda: Manifest.read(path).text()), path)
    shards = collect_shards(state.local_shards(), written=False)
    missing_ema = {key for key in shards if _is_ema(key)} - manifest.tensors.keys()
    for key in missing_ema:
        del shards[key]
    _check(path, manifest, ranks.all_gather(lambda: {key: tensor.shape for key, tensor in shards.items()}))
    try:
        ranks.all_gather(lambda: read_chunks(path / STATE_NAME, shards))
    except Failed as error:
        raise UserError(f"{path} could not be read: {error}") from None
    state.updates = record.updates
    state.refresh()
    if missing_ema:
        state.begin_ema()
    owned = collect_shards(state.local_shards(), written=True)
    written = {key: tensor for key, tensor in owned.items() if key in manifest.tensors}
    for key, entry in together(ranks.all_gather(lambda: fingerprints(written))).items():
        if entry != manifest.tensors[key]:
            raise RuntimeError(f"{key} was read as {entry}, but {path} was written with {manifest.tensors[key]}")
    return record


def _is_ema(key: str) -> bool:
    return key.startswith(f"{EMA}/")


def _check(path: Path, manifest: Manifest, local_shapes: Iterable[dict[str, tuple[int, ...]]]) -> None:
    """Refuse a checkpoint whose tensors differ from the model's, in names or shapes; its EMA is optional."""
    model = {key: tuple(shape) for shapes in local_shapes for key, shape in shapes.items()}
    saved = {key: entry.shape for key, entry in manifest.tensors.items() if key in model or not _is_ema(key)}
    problems = [f"{key} is missing" for key in sorted(model.keys() - saved.keys())]
    problems += [f"{key} is not of this model" for key in sorted(saved.keys() - model.keys())]
    problems += [
        f"{key} has the shape {list(saved[key])}, the model's is {list(model[key])}"
        for key in sorted(model.keys() & saved.keys())
        if model[key] != saved[key]
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise UserError(f"{path} is of another model: {'; '.join(problems[:3])}{more}")
