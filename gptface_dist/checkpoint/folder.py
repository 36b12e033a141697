"""The folder of a run's checkpoints: names, the pointer to the latest, publication, and what is kept.

    RUN/checkpoints/step-00000200/        a published checkpoint: complete, flushed to disk, never changed
    RUN/checkpoints/latest                the name of the latest, and the SHA-256 of its manifest
    RUN/checkpoints/.step-00000300.new    being written, or left by a run that was killed
    RUN/checkpoints/.step-00000200.old    a checkpoint whose step was reached again, until the new one stands in its place
    RUN/checkpoints/.step-00000100.gone   being deleted
    RUN/checkpoints/damaged-step-00000400 found damaged by a run that went on from the one before; for a person to look at

One process works on these at a time: rank 0. Each step of it leaves a state from which the latest checkpoint is found.
"""

import re
import shutil
from pathlib import Path

from gptface_dist.checkpoint.manifest import MANIFEST_NAME
from gptface_dist.errors import Damaged, UserError
from gptface_dist.files import fsync, sha256, write_atomically

FOLDER_NAME = "checkpoints"
LATEST_NAME = "latest"
_PUBLISHED = re.compile(r"step-(\d{8,})")
_POINTER = re.compile(r"(step-\d{8,}) ([0-9a-f]{64})\n")
_NEW, _OLD, _GONE = "new", "old", "gone"


def name_of(step: int) -> str:
    """The checkpoint of a step."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """The step that a folder's name tells; None where it is no published checkpoint's."""
    found = _PUBLISHED.fullmatch(path.name)
    return int(found.group(1)) if found else None


def published(checkpoints: Path) -> list[Path]:
    """The published checkpoints, the highest step first."""
    found = [(step, path) for path in checkpoints.glob("step-*") if (step := step_of(path)) is not None and path.is_dir()]
    return [path for _, path in sorted(found, reverse=True)]


def latest(checkpoints: Path) -> Path | None:
    """The checkpoint that was published last; None where there has been none.

    :class:`Damaged` where the pointer is unreadable, or what it points to is not there or is another checkpoint.
    """
    pointer = checkpoints / LATEST_NAME
    if not pointer.exists():
        # The first checkpoint is published a moment before the pointer.
        return next(iter(published(checkpoints)), None)
    try:
        text = pointer.read_bytes().decode(errors="replace")
    except OSError as error:
        raise Damaged(f"{pointer} cannot be read: {error.strerror}") from None
    found = _POINTER.fullmatch(text)
    if not found:
        raise Damaged(f"{pointer} holds {text!r}, not a checkpoint's name and hash")
    name, digest = found.groups()
    folder, old = checkpoints / name, _aside(checkpoints / name, _OLD)
    if _is(folder, digest):
        return folder
    if _is(old, digest):
        # Its step was reached again. The new one is complete, or it would not have the name.
        return folder if folder.is_dir() else old
    if not folder.is_dir():
        raise Damaged(f"{folder} is missing, but {pointer} names it")
    raise Damaged(f"{folder / MANIFEST_NAME} is not the one that {pointer} names")


def resolve(path: Path) -> Path:
    """The checkpoint that a path means: its own folder, a run's (then the latest of the run), or ``RUN/checkpoints``.

    :class:`UserError` where there is none, or the latest is damaged.
    """
    if (path / MANIFEST_NAME).is_file() or step_of(path) is not None:
        return path
    inside = path / FOLDER_NAME if (path / FOLDER_NAME).is_dir() else path
    try:
        found = latest(inside) if inside.is_dir() else None
    except Damaged as damage:
        raise UserError(f"{damage}: name another checkpoint of {inside}") from None
    if found is None:
        raise UserError(f"{path} holds no checkpoint: give the folder of a checkpoint or of a run")
    return found


def begin(checkpoints: Path, step: int) -> Path:
    """An empty folder to write the checkpoint of a step into. Clears what earlier, killed runs left."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    tidy(checkpoints)
    new = _aside(checkpoints / name_of(step), _NEW)
    new.mkdir()
    return new


def publish(new: Path, checkpoints: Path, step: int) -> Path:
    """Give a complete folder its name, then move the pointer. The folder's files are flushed to disk already."""
    final = checkpoints / name_of(step)
    for path in [folder for folder in new.rglob("*") if folder.is_dir()] + [new]:
        fsync(path)
    old = _aside(final, _OLD)
    if final.exists():
        final.rename(old)
    new.rename(final)
    fsync(checkpoints)
    _point(final)
    _delete(old)
    return final


def abandon(checkpoints: Path, step: int) -> None:
    """Remove what was written of a checkpoint that failed; says nothing if that fails too."""
    shutil.rmtree(_aside(checkpoints / name_of(step), _NEW), ignore_errors=True)


def tidy(checkpoints: Path) -> None:
    """Clear what killed runs left; bring back a checkpoint that was put aside for one that never came."""
    for path in checkpoints.glob(f".{LATEST_NAME}.*"):
        path.unlink()
    for path in checkpoints.glob(".step-*.*"):
        name, _, state = path.name[1:].rpartition(".")
        if state == _OLD and not (checkpoints / name).exists():
            path.rename(checkpoints / name)
            fsync(checkpoints)
            continue
        if state == _OLD:
            # The pointer may still mean the old one, or nothing yet.
            pointer = checkpoints / LATEST_NAME
            if not pointer.exists() or pointer.read_text(encoding="utf-8").startswith(f"{name} "):
                _point(checkpoints / name)
        if state in (_NEW, _OLD, _GONE):
            _delete(path)


def prune(checkpoints: Path, step: int, keep_last: int, keep_interval: int) -> list[Path]:
    """Delete checkpoints up to ``step``, the latest, but for the last ``keep_last`` and multiples of ``keep_interval``.

    0 keeps all, or none for their step. Later ones, which a run that began again from an earlier step has yet to reach,
    stay. Returns what was deleted.
    """
    if keep_last == 0:
        return []
    past = [path for path in published(checkpoints) if (step_of(path) or 0) <= step]
    deleted = [path for path in past[keep_last:] if not keep_interval or (step_of(path) or 0) % keep_interval]
    for path in deleted:
        _delete(path)
    return deleted


def set_aside(damaged: list[Path]) -> None:
    """Damaged checkpoints count no longer as such; each is kept under another name, in place of an earlier one of it."""
    for path in damaged:
        if path.is_dir():
            aside = path.with_name(f"damaged-{path.name.lstrip('.')}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def _is(folder: Path, digest: str) -> bool:
    return (folder / MANIFEST_NAME).is_file() and sha256(folder / MANIFEST_NAME) == digest


def _point(folder: Path) -> None:
    """Move the pointer to a published checkpoint."""
    digest = sha256(folder / MANIFEST_NAME)
    write_atomically(folder.parent / LATEST_NAME, f"{folder.name} {digest}\n")
    fsync(folder.parent)


def _aside(path: Path, state: str) -> Path:
    return path.with_name(f".{path.name}.{state}")


def _delete(path: Path) -> None:
    if not path.exists():
        return
    gone = path
    if not path.name.endswith(f".{_GONE}"):
        # First the name: a folder that is half deleted must not look like a checkpoint.
        gone = _aside(path.with_name(path.name.lstrip(".").partition(".")[0]), _GONE)
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
    shutil.rmtree(gone)
