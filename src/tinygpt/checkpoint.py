"""The whole state of a run on disk: written beside and renamed, hashed, verified before anything is used.

A checkpoint is a folder:

```
step-000500/
  model.safetensors, config.json    loadable on their own by GPT.from_pretrained
  tokenizer files                   if the run has a tokenizer
  optimizer.safetensors             optimizer moments
  state.safetensors                 packing buffer, random states
  state.json                        everything else: step, schedules, rates, fingerprints, versions
  manifest.json                     size and sha256 of each file; without it the folder is not a checkpoint
```

No file holds code: JSON and safetensors only.
"""

import contextlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tinygpt.errors import CheckpointError, ConfigError
from tinygpt.manifest import FORMAT_VERSION, check_manifest, read_json, write_manifest

STATE_FILE = "state.json"
TENSOR_FILE = "state.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
RUN_FILE = "run.json"
_STEP_FOLDER = re.compile(r"step-(\d{6,})")


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


def save_state(folder: str | Path, state: dict[str, Any], *, write_files: Callable[[Path], None] | None = None) -> Path:
    """Write a checkpoint folder so that it is there whole or not at all.

    Everything goes into a temporary folder beside it, is forced to the disk, and is renamed. A checkpoint that was
    there under the same name stays until the new one is complete.

    Args:
        folder: The checkpoint's folder.
        state: Nested dicts, lists and tuples of numbers, strings, booleans, `None` and tensors.
        write_files: Writes further files, such as the model's, into the folder it is given.

    Returns:
        The folder.

    Raises:
        CheckpointError: If the state holds something else or the folder cannot be written.
    """
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.tmp")
    replaced = folder.with_name(f".{folder.name}.old")
    tensors: dict[str, Tensor] = {}
    plain = _without_tensors(state, tensors, ())
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        if write_files is not None:
            write_files(temporary)
        for name in (OPTIMIZER_FILE, TENSOR_FILE):
            save_file({k: v for k, v in tensors.items() if _tensor_file(k) == name}, temporary / name)
        document = json.dumps({"format_version": FORMAT_VERSION, "state": plain}, indent=1)
        (temporary / STATE_FILE).write_text(document, encoding="utf-8")
        write_manifest(temporary)
        for path in [*temporary.rglob("*"), temporary]:
            _sync(path)
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            folder.rename(replaced)
        temporary.rename(folder)
        _sync(folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        if isinstance(error, OSError | SafetensorError):
            raise CheckpointError(f"the checkpoint {folder} could not be written: {error}.") from error
        raise
    return folder


def load_state(folder: str | Path) -> dict[str, Any]:
    """Verify a checkpoint folder and return the state that `save_state` was given, tensors on the CPU.

    Raises:
        CheckpointError: If a file is missing, damaged, or of another format version.
    """
    folder = Path(folder)
    verify(folder)
    document = read_json(folder / STATE_FILE)
    version = document.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{folder} has a state of version {version}; this tinygpt reads {FORMAT_VERSION}.")
    try:
        tensors = load_file(folder / TENSOR_FILE) | load_file(folder / OPTIMIZER_FILE)
        state = _with_tensors(document["state"], tensors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder} does not hold a readable state: {error}.") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{folder / STATE_FILE} does not hold a state.")
    return state


def verify(folder: str | Path) -> set[str]:
    """Check size and sha256 of every file that the manifest names; return their names.

    Raises:
        CheckpointError: If one is missing or differs, or the manifest itself is missing or of another version.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint folder {folder}.")
    if (folder / "checkpoints").is_dir():
        raise CheckpointError(f"{folder} is a run; its checkpoints are the folders in {folder / 'checkpoints'}.")
    names = check_manifest(folder)
    if missing := {STATE_FILE, TENSOR_FILE, OPTIMIZER_FILE} - names:
        raise CheckpointError(f"{folder} is not a whole checkpoint: its manifest lacks {', '.join(sorted(missing))}.")
    return names


def list_checkpoints(parent: str | Path) -> list[Path]:
    """Return the checkpoint folders in a folder, oldest step first, not verified."""
    parent = Path(parent)
    if not parent.is_dir():
        return []
    found = [path for path in parent.iterdir() if _STEP_FOLDER.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=checkpoint_step)


def latest_checkpoint(parent: str | Path) -> Path | None:
    """Return the newest whole checkpoint in a folder, or `None`; a damaged one is passed over with a warning.

    If a process died while it replaced a checkpoint, the replaced one is put back first.
    """
    with contextlib.suppress(OSError):  # a folder that can only be read is read as it is
        _put_back(Path(parent))
    for folder in reversed(list_checkpoints(parent)):
        try:
            verify(folder)
        except CheckpointError as error:
            warnings.warn(f"passing over a damaged checkpoint: {error}", stacklevel=2)
        else:
            return folder
    return None


def remove_old_checkpoints(
    parent: str | Path, *, keep_last: int, keep: Path | None = None, protect: Collection[int] = ()
) -> None:
    """Delete all but the newest `keep_last` checkpoints, and what an interrupted save left behind.

    Args:
        parent: Folder of the checkpoints.
        keep_last: How many to keep, at least 1.
        keep: One more that stays whatever its step.
        protect: Steps whose checkpoints stay.

    Raises:
        ConfigError: If `keep_last` is not positive.
    """
    if keep_last < 1:
        raise ConfigError(f"keep_last={keep_last} must be at least 1; None keeps all checkpoints of a run.")
    parent = Path(parent)
    _put_back(parent)
    for leftover in [*parent.glob(".step-*.deleted"), *parent.glob(".step-*.tmp")]:
        shutil.rmtree(leftover, ignore_errors=True)
    for folder in list_checkpoints(parent)[:-keep_last]:
        if folder != keep and checkpoint_step(folder) not in protect:
            # Out of sight first: a deletion cut short must not leave something that looks like a checkpoint.
            doomed = folder.rename(folder.with_name(f".{folder.name}.deleted"))
            shutil.rmtree(doomed, ignore_errors=True)


def claim_run_folder(folder: str | Path, identity: Mapping[str, Any]) -> None:
    """Write what makes this run the run it is into the folder's `run.json`, or compare with what is there.

    A program that is run again with other settings then stops, instead of going on with or showing another run's
    results as its own.

    Args:
        folder: The run's folder.
        identity: JSON values by name, such as recipe, seed and data fingerprint.

    Raises:
        CheckpointError: If the folder belongs to a run with another identity, or cannot be written.
    """
    path = Path(folder) / RUN_FILE
    if path.exists():
        there = read_json(path)
        different = [
            f"{name} was {there.get(name)!r} and is {identity.get(name)!r}"
            for name in [*there, *(name for name in identity if name not in there)]
            if there.get(name) != identity.get(name)
        ]
        if different:
            raise CheckpointError(f"{folder} belongs to another run: {'; '.join(different)}. Choose another folder.")
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(dict(identity), indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise CheckpointError(f"the run's folder {folder} cannot be written: {error}.") from None


def _put_back(parent: Path) -> None:
    """Finish what a process that died between the renames of `save_state` began: keep the one that is whole."""
    for replaced in parent.glob(".step-*.old"):
        original = replaced.with_name(replaced.name.removeprefix(".").removesuffix(".old"))
        if original.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(original)


def _tensor_file(name: str) -> str:
    return OPTIMIZER_FILE if name.startswith("optimizer/") else TENSOR_FILE


def _without_tensors(value: Any, tensors: dict[str, Tensor], path: tuple[str, ...]) -> Any:
    """Move tensors into `tensors` under their path, and mark what JSON would lose: tuples, keys that are no strings."""
    if isinstance(value, Tensor):
        name = "/".join(path)
        while name in tensors:
            name += "'"
        # Cloned: views into one buffer, as the optimizer keeps them, must not be written as shared storage.
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"$tensor": name}
    if isinstance(value, dict):
        items = [(key, _without_tensors(item, tensors, (*path, str(key)))) for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in items):
            return dict(items)
        return {"$items": [[_without_tensors(key, tensors, path), item] for key, item in items]}
    if isinstance(value, tuple | list):
        parts = [_without_tensors(item, tensors, (*path, str(index))) for index, item in enumerate(value)]
        return {"$tuple": parts} if isinstance(value, tuple) else parts
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(f"a checkpoint holds numbers, strings and tensors; {type(value).__name__} is none of them.")


def _with_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_with_tensors(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$tuple" in value:
        return tuple(_with_tensors(item, tensors) for item in value["$tuple"])
    if "$items" in value:
        return {_with_tensors(k, tensors): _with_tensors(v, tensors) for k, v in value["$items"]}
    return {key: _with_tensors(item, tensors) for key, item in value.items()}


def _sync(path: Path) -> None:
    """Force a file or a folder's entries to the disk; Windows has no such call for folders."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
