"""The checkpoints of a run: their names, which is the newest whole one, which may go."""

import contextlib
import re
import warnings
from collections.abc import Collection
from pathlib import Path

from tinygpt._disk import remove, write_text
from tinygpt.checkpoint._read import verify
from tinygpt.errors import CheckpointError, ConfigError

LATEST_FILE = "latest"
_STEP_FOLDER = re.compile(r"step-(\d{6,15})", re.ASCII)


def checkpoint_folder(parent: str | Path, step: int) -> Path:
    """Return the folder of the checkpoint taken when `step` steps were done, such as `step-000500`."""
    return Path(parent) / f"step-{step:06d}"


def checkpoint_step(folder: str | Path) -> int:
    """Return the number of steps done in a checkpoint, from the name of its folder.

    Raises:
        CheckpointError: If the name is not that of a checkpoint.
    """
    match = _STEP_FOLDER.fullmatch(Path(folder).name)
    if match is None:
        raise CheckpointError(f"{folder} is not named like a checkpoint, step-000500 for example.")
    return int(match[1])


def list_checkpoints(parent: str | Path) -> list[Path]:
    """Return the checkpoint folders in a folder, oldest step first, not verified; links are none."""
    return [path for path in _named_like_one(Path(parent)) if path.is_dir() and not path.is_symlink()]


def latest_checkpoint(parent: str | Path) -> Path | None:
    """Return the newest whole checkpoint in a folder, or `None`; a damaged one is passed over with a warning.

    Every file of it is hashed. What the file `latest` says is not believed, but it is said if the checkpoint that it
    names is gone. If a process died while it replaced a checkpoint, the replaced one is put back first.
    """
    parent = Path(parent)
    with contextlib.suppress(OSError):  # a folder that can only be read is read as it is
        _put_back(parent)
    newest = None
    passed_over = set()
    for folder in reversed(_named_like_one(parent)):
        try:
            if folder.is_symlink():
                raise CheckpointError(f"{folder} is a link; move the checkpoint itself here")
            verify(folder)
        except CheckpointError as error:
            passed_over.add(folder.name)
            warnings.warn(f"passing over a damaged checkpoint: {error}", stacklevel=2)
        else:
            newest = folder
            break
    named = _read_latest(parent)
    if named is not None and named.name not in passed_over:
        reached = -1 if newest is None else checkpoint_step(newest)
        if checkpoint_step(named) > reached:
            found = "and there is no other" if newest is None else f"and the newest whole one is {newest.name}"
            warnings.warn(f"{parent / LATEST_FILE} names {named.name}, which is gone, {found}", stacklevel=2)
    return newest


def mark_latest(folder: str | Path) -> None:
    """Write the name of a checkpoint, which must be complete, into the file `latest` beside it.

    Raises:
        CheckpointError: If the file cannot be written.
    """
    folder = Path(folder)
    try:
        write_text(folder.parent / LATEST_FILE, folder.name + "\n")
    except OSError as error:
        path, why = folder.parent / LATEST_FILE, error.strerror or error
        raise CheckpointError(f"{path} could not be written: {why}.") from error


def set_aside(folder: str | Path) -> Path:
    """Rename a damaged checkpoint to `damaged-step-000500`, so that it is kept and no longer in the way.

    Returns:
        The new path.

    Raises:
        CheckpointError: If it cannot be renamed.
    """
    folder = Path(folder)
    names = (f"damaged-{folder.name}{suffix}" for suffix in ("", *(f"-{number}" for number in range(2, 1_000))))
    free = next(path for name in names if not (path := folder.with_name(name)).exists())
    try:
        return folder.rename(free)
    except OSError as error:
        why = error.strerror or error
        raise CheckpointError(f"the damaged checkpoint {folder} could not be renamed: {why}.") from error


def remove_old_checkpoints(
    parent: str | Path, *, keep_last: int, keep_every: int | None = None, protect: Collection[int] = ()
) -> None:
    """Delete checkpoints but for those to keep, and what an interrupted save or deletion left behind.

    Args:
        parent: Folder of the checkpoints.
        keep_last: How many to keep, the newest; at least 1.
        keep_every: Those whose step is a multiple of this stay as well.
        protect: Steps that stay as well.

    Raises:
        ConfigError: If `keep_last` or `keep_every` is not positive.
        CheckpointError: If one cannot be deleted.
    """
    if keep_last < 1:
        raise ConfigError(f"keep_last={keep_last} must be at least 1; None keeps all checkpoints of a run.")
    if keep_every is not None and keep_every < 1:
        raise ConfigError(f"keep_every={keep_every} must be at least 1, or None.")
    parent = Path(parent)
    try:
        _put_back(parent)
        for leftover in [*parent.glob(".step-*.deleted"), *parent.glob(".step-*.tmp")]:
            remove(leftover)
        for folder in list_checkpoints(parent)[:-keep_last]:
            step = checkpoint_step(folder)
            if step not in protect and (keep_every is None or step % keep_every):
                # Out of sight first: a deletion cut short must not leave something that looks like a checkpoint.
                remove(folder.rename(folder.with_name(f".{folder.name}.deleted")))
    except OSError as error:
        why = error.strerror or error
        raise CheckpointError(f"an old checkpoint in {parent} could not be deleted: {why}.") from error


def _named_like_one(parent: Path) -> list[Path]:
    if not parent.is_dir():
        return []
    return sorted((path for path in parent.iterdir() if _STEP_FOLDER.fullmatch(path.name)), key=checkpoint_step)


def _read_latest(parent: Path) -> Path | None:
    """Return the checkpoint that `latest` names, there or not; anything but such a name counts as nothing."""
    path = parent / LATEST_FILE
    try:
        if path.is_symlink() or not path.is_file():
            return None
        with path.open("rb") as file:
            name = file.read(64).decode("ascii").removesuffix("\n")
    except (OSError, UnicodeDecodeError):
        return None
    return parent / name if _STEP_FOLDER.fullmatch(name) else None


def _put_back(parent: Path) -> None:
    """Finish what a process that died between the renames of `save_state` began: keep the one that is whole."""
    for replaced in parent.glob(".step-*.old"):
        original = replaced.with_name(replaced.name.removeprefix(".").removesuffix(".old"))
        if original.exists() or replaced.is_symlink():
            remove(replaced)
        else:
            replaced.rename(original)
