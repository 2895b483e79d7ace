"""Verifying and reading a checkpoint folder."""

import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tinygpt.checkpoint._plain import StateSnapshot, put_together
from tinygpt.errors import CheckpointError
from tinygpt.manifest import MANIFEST_FILE, check_format, check_manifest, check_tensor_file, read_json

STATE_FILE = "state.json"
"""Everything of a checkpoint that is no tensor."""
TENSOR_FILE = "state.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"


def load_state(folder: str | Path, *, verified: bool = False) -> dict[str, Any]:
    """Verify a checkpoint folder and return the state that `save_state` was given.

    Args:
        folder: The checkpoint's folder.
        verified: Whether `verify` or `latest_checkpoint` has just found it whole: hashing takes longer than reading.

    Returns:
        The state. Tensors are on the CPU; where the system allows they stay mapped from the files until they are used,
        and writing to them changes no file.

    Raises:
        CheckpointError: If a file is missing, damaged, too large, or of another format version.
    """
    folder = Path(folder)
    if not verified:
        verify(folder)
    document = read_json(folder / STATE_FILE)
    check_format(folder / STATE_FILE, document)
    try:
        tensors = load_tensors(folder / TENSOR_FILE) | load_tensors(folder / OPTIMIZER_FILE)
        state = put_together(StateSnapshot(document["state"], tensors))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder} does not hold a readable state: {type(error).__name__} {error}.") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{folder / STATE_FILE} does not hold a state.")
    return state


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file of bounded header, mapped into memory where the system allows.

    Raises:
        CheckpointError: If it is missing or damaged.
    """
    path = Path(path)
    check_tensor_file(path)
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from None
    # Windows could not remove or replace a file that is still mapped.
    return {name: tensor.clone() for name, tensor in tensors.items()} if os.name == "nt" else tensors


def verify(folder: str | Path, *, hashes: bool = True) -> set[str]:
    """Check size and sha256 of every file that the manifest names; return their names.

    Args:
        folder: The checkpoint's folder.
        hashes: Whether to hash the files, which takes as long as reading them.

    Raises:
        CheckpointError: If one is missing or differs, or the manifest itself is missing or of another version.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint folder {folder}.")
    if (folder / "checkpoints").is_dir():
        raise CheckpointError(f"{folder} is a run; its checkpoints are the folders in {folder / 'checkpoints'}.")
    if [(folder / name).exists() for name in ("config.json", MANIFEST_FILE, STATE_FILE)] == [True, False, False]:
        raise CheckpointError(
            f"{folder} is a saved model, weights without the state of a training; give a checkpoint of a run, or load "
            "the weights alone with GPT.from_pretrained."
        )
    names = check_manifest(folder, hashes=hashes)
    if missing := {STATE_FILE, TENSOR_FILE, OPTIMIZER_FILE} - names:
        raise CheckpointError(f"{folder} is not a whole checkpoint: its manifest lacks {', '.join(sorted(missing))}.")
    return names
