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

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tinygpt.errors import CheckpointError

FORMAT_VERSION = 1
STATE_FILE = "state.json"
TENSOR_FILE = "state.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
MANIFEST_FILE = "manifest.json"
_STEP_FOLDER = re.compile(r"step-(\d{6,})")


def checkpoint_folder(parent: str | Path, step: int) -> Path:
    """Return the folder of the checkpoint taken when `step` steps were done, such as `step-000500`."""
    return Path(parent) / f"step-{step:06d}"


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
        _write_json(temporary / STATE_FILE, {"format_version": FORMAT_VERSION, "state": plain})
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        entries = {p.relative_to(temporary).as_posix(): {"size": p.stat().st_size, "sha256": _sha256(p)} for p in files}
        _write_json(temporary / MANIFEST_FILE, {"format_version": FORMAT_VERSION, "files": entries})
        for path in [*files, temporary / MANIFEST_FILE, temporary]:
            _sync(path)
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            folder.rename(replaced)
        temporary.rename(folder)
        _sync(folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        raise CheckpointError(f"the checkpoint {folder} could not be written: {error}.") from error
    return folder


def load_state(folder: str | Path) -> dict[str, Any]:
    """Verify a checkpoint folder and return the state that `save_state` was given, tensors on the CPU.

    Raises:
        CheckpointError: If a file is missing, damaged, or of another format version.
    """
    folder = Path(folder)
    verify(folder)
    document = _read_json(folder / STATE_FILE)
    try:
        tensors = load_file(folder / TENSOR_FILE) | load_file(folder / OPTIMIZER_FILE)
        state = _with_tensors(document["state"], tensors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder} does not hold a readable state: {error}.") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{folder / STATE_FILE} does not hold a state.")
    return state


def verify(folder: str | Path) -> None:
    """Check size and sha256 of every file that the manifest names.

    Raises:
        CheckpointError: If one is missing or differs, or the manifest itself is missing or of another version.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint folder {folder}.")
    manifest = _read_json(folder / MANIFEST_FILE)
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{folder} has format version {version}; this tinygpt reads version {FORMAT_VERSION}.")
    files = manifest.get("files")
    if not isinstance(files, dict) or not {STATE_FILE, TENSOR_FILE, OPTIMIZER_FILE} <= files.keys():
        raise CheckpointError(f"{folder / MANIFEST_FILE} is damaged: it does not list the state files.")
    for name, entry in files.items():
        path = folder / name
        try:
            if ".." in Path(name).parts or Path(name).is_absolute() or path.is_symlink():
                raise CheckpointError(f"{folder}: {name} is a link or lies outside the checkpoint.")
            size = path.stat().st_size
            if size != entry["size"]:
                raise CheckpointError(f"{path} is damaged: {size} bytes instead of {entry['size']}.")
            if _sha256(path) != entry["sha256"]:
                raise CheckpointError(f"{path} is damaged: its sha256 is not the one in {MANIFEST_FILE}.")
        except (OSError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is missing or cannot be read: {error}.") from None


def list_checkpoints(parent: str | Path) -> list[Path]:
    """Return the checkpoint folders in a folder, oldest step first, not verified."""
    parent = Path(parent)
    if not parent.is_dir():
        return []
    found = [(int(match[1]), path) for path in parent.iterdir() if (match := _STEP_FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found) if path.is_dir()]


def latest_checkpoint(parent: str | Path) -> Path | None:
    """Return the newest whole checkpoint in a folder, or `None`; a damaged one is passed over with a warning."""
    for replaced in Path(parent).glob(".step-*.old"):
        # A process died between the two renames of save_state: the new one is lost, the old one is whole.
        original = replaced.with_name(replaced.name.removeprefix(".").removesuffix(".old"))
        if not original.exists():
            replaced.rename(original)
    for folder in reversed(list_checkpoints(parent)):
        try:
            verify(folder)
        except CheckpointError as error:
            warnings.warn(f"passing over a damaged checkpoint: {error}", stacklevel=2)
        else:
            return folder
    return None


def remove_old_checkpoints(parent: str | Path, *, keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints, and what an interrupted save left behind."""
    parent = Path(parent)
    for folder in list_checkpoints(parent)[:-keep_last]:
        # Out of sight first: a deletion cut short must not leave something that looks like a checkpoint.
        folder.rename(folder.with_name(f".{folder.name}.deleted"))
    for leftover in [*parent.glob(".step-*.deleted"), *parent.glob(".step-*.tmp")]:
        shutil.rmtree(leftover, ignore_errors=True)


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


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=1), encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is missing or damaged: {error}.") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is damaged: it is not a JSON object.")
    return document


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Force a file or a folder's entries to the disk; Windows has no such call for folders."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
