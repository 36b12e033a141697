"""The folder of a run's checkpoints: names, the pointer to the latest, publication, and pruning.

    RUN/checkpoints/step-00000200/        a published checkpoint: complete, flushed to disk, never changed
    RUN/checkpoints/latest                the name of the latest, and the SHA-256 of its manifest
    RUN/checkpoints/.step-00000300.new    being written, or left over from a killed run
    RUN/checkpoints/.step-00000200.old    a checkpoint of a step that the run reached again, until the new one replaces it
    RUN/checkpoints/.step-00000100.gone   being deleted
    RUN/checkpoints/damaged-step-00000400 damaged: a run resumed from the one before and kept this for inspection

Only rank 0 changes these. After each of its steps, :func:`latest` finds the latest checkpoint, even if the process dies.
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
    """Folder name of the checkpoint of a step."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """Step in a folder's name; None unless it is the name of a published checkpoint."""
    name = _PUBLISHED.fullmatch(path.name)
    return int(name.group(1)) if name else None


def published(checkpoints: Path) -> list[Path]:
    """Published checkpoints, the highest step first."""
    steps = [(step, path) for path in checkpoints.glob("step-*") if (step := step_of(path)) is not None and path.is_dir()]
    return [path for _, path in sorted(steps, reverse=True)]


def latest(checkpoints: Path) -> Path | None:
    """The checkpoint published last; None if there is none.

    :class:`Damaged` if the pointer is unreadable, or its target is missing or another checkpoint.
    """
    pointer = checkpoints / LATEST_NAME
    if not pointer.exists():
        # `publish` names the first checkpoint just before it writes the pointer.
        return next(iter(published(checkpoints)), None)
    try:
        text = pointer.read_bytes().decode(errors="replace")
    except OSError as error:
        raise Damaged(f"{pointer} cannot be read: {error.strerror}") from None
    entry = _POINTER.fullmatch(text)
    if not entry:
        raise Damaged(f"{pointer} holds {text!r}, not a checkpoint's name and hash")
    name, digest = entry.groups()
    folder, old = checkpoints / name, _aside(checkpoints / name, _OLD)
    if _is(folder, digest):
        return folder
    if _is(old, digest):
        # The run reached this step again. A new one of this name is complete.
        return folder if folder.is_dir() else old
    if not folder.is_dir():
        raise Damaged(f"{folder} is missing, but {pointer} names it")
    raise Damaged(f"{folder / MANIFEST_NAME} is not the one that {pointer} names")


def resolve(path: Path) -> Path:
    """The checkpoint at a path: a checkpoint's folder, or the latest of a run's folder or of ``RUN/checkpoints``.

    :class:`UserError` if there is none, or the latest is damaged.
    """
    if (path / MANIFEST_NAME).is_file() or step_of(path) is not None:
        return path
    inside = path / FOLDER_NAME if (path / FOLDER_NAME).is_dir() else path
    try:
        checkpoint = latest(inside) if inside.is_dir() else None
    except Damaged as damage:
        raise UserError(f"{damage}: name another checkpoint of {inside}") from None
    if checkpoint is None:
        raise UserError(f"{path} holds no checkpoint: give the folder of a checkpoint or of a run")
    return checkpoint


def begin(checkpoints: Path, step: int) -> Path:
    """Make an empty folder for the checkpoint of a step, and delete leftovers of killed runs."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    tidy(checkpoints)
    new = _aside(checkpoints / name_of(step), _NEW)
    new.mkdir()
    return new


def publish(new: Path, checkpoints: Path, step: int) -> Path:
    """Rename a complete folder to its final name, then move the pointer. Its files must be flushed to disk already."""
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
    """Remove the files of a failed checkpoint, and ignore errors of doing so."""
    shutil.rmtree(_aside(checkpoints / name_of(step), _NEW), ignore_errors=True)


def tidy(checkpoints: Path) -> None:
    """Delete leftovers of killed runs, and restore an old checkpoint whose replacement was never published."""
    for path in checkpoints.glob(f".{LATEST_NAME}.*"):
        path.unlink()
    for path in checkpoints.glob(".step-*.*"):
        name, _, state = path.name[1:].rpartition(".")
        if state == _OLD and not (checkpoints / name).exists():
            path.rename(checkpoints / name)
            fsync(checkpoints)
            continue
        if state == _OLD:
            # The pointer may still name the old one, or be missing.
            pointer = checkpoints / LATEST_NAME
            if not pointer.exists() or pointer.read_text(encoding="utf-8").startswith(f"{name} "):
                _point(checkpoints / name)
        if state in (_NEW, _OLD, _GONE):
            _delete(path)


def prune(checkpoints: Path, step: int, keep_last: int, keep_interval: int) -> list[Path]:
    """Delete checkpoints up to ``step``, the latest, except the last ``keep_last`` and steps divisible by ``keep_interval``.

    ``keep_last`` 0 keeps all; ``keep_interval`` 0 keeps none by step. Checkpoints after ``step``, of a run that resumed from
    an earlier one, stay. Returns the deleted folders.
    """
    if keep_last == 0:
        return []
    past = [path for path in published(checkpoints) if (step_of(path) or 0) <= step]
    deleted = [path for path in past[keep_last:] if not keep_interval or (step_of(path) or 0) % keep_interval]
    for path in deleted:
        _delete(path)
    return deleted


def set_aside(damaged: list[Path]) -> None:
    """Rename damaged checkpoints to ``damaged-NAME``, which is no checkpoint's name; an earlier folder of that name goes."""
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
        # Rename first: a half-deleted folder must not look like a checkpoint.
        gone = _aside(path.with_name(path.name.lstrip(".").partition(".")[0]), _GONE)
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
    shutil.rmtree(gone)
