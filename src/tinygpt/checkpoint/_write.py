"""Writing a checkpoint folder, whole or not at all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from tinygpt._disk import remove, sync
from tinygpt.checkpoint._plain import StateSnapshot, take_apart
from tinygpt.checkpoint._read import OPTIMIZER_FILE, STATE_FILE, TENSOR_FILE
from tinygpt.errors import CheckpointError
from tinygpt.manifest import FORMAT_VERSION, MAX_JSON_BYTES, write_manifest
from tinygpt.model import independent_tensors


def save_state(
    folder: str | Path,
    state: dict[str, Any] | StateSnapshot,
    *,
    write_files: Callable[[Path], None] | None = None,
) -> Path:
    """Write a checkpoint folder so that it is there whole or not at all.

    Everything goes into a temporary folder beside it, is forced to the disk, and is renamed. A checkpoint that was
    there under the same name stays until the new one is complete.

    Args:
        folder: The checkpoint's folder.
        state: Nested dicts, lists and tuples of numbers, strings, booleans, `None` and tensors; or a snapshot of them.
        write_files: Writes further files, such as the model's, into the folder it is given.

    Returns:
        The folder.

    Raises:
        CheckpointError: If the state holds something else, or the folder is a link or cannot be written.
    """
    folder = Path(folder)
    if folder.is_symlink():
        raise CheckpointError(f"{folder} is a link, and a checkpoint is not written through one; remove the link.")
    temporary = folder.with_name(f".{folder.name}.tmp")
    replaced = folder.with_name(f".{folder.name}.old")
    try:
        document, tensors = state if isinstance(state, StateSnapshot) else take_apart(state)
        text = json.dumps({"format_version": FORMAT_VERSION, "state": document}, indent=1)
        if len(text) > MAX_JSON_BYTES:
            raise CheckpointError(f"{STATE_FILE} would have {len(text):,} bytes; put long lists into tensors.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)
        temporary.mkdir()
        if write_files is not None:
            write_files(temporary)
        for name, is_optimizer in ((OPTIMIZER_FILE, True), (TENSOR_FILE, False)):
            part = {key: tensor for key, tensor in tensors.items() if key.startswith("optimizer/") == is_optimizer}
            save_file(independent_tensors(part), temporary / name)
        (temporary / STATE_FILE).write_text(text, encoding="utf-8")
        write_manifest(temporary)
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        if folder.exists():
            remove(replaced)
            folder.rename(replaced)
        temporary.rename(folder)
        sync(folder.parent)
        remove(replaced)
    except BaseException as error:
        remove(temporary)
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        if isinstance(error, OSError | SafetensorError):
            why = getattr(error, "strerror", None) or error
            raise CheckpointError(f"the checkpoint {folder} could not be written: {why}.") from error
        raise
    return folder
