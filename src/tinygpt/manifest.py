"""Sizes and hashes of the files in a folder, so that damage is found before anything is used."""

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tinygpt.errors import CheckpointError

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1


def write_manifest(folder: Path) -> Path:
    """Write the size and sha256 of every file in the folder into its `manifest.json`; return that file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {p.relative_to(folder).as_posix(): {"size": p.stat().st_size, "sha256": _sha256(p)} for p in files}
    manifest = folder / MANIFEST_FILE
    manifest.write_text(json.dumps({"format_version": FORMAT_VERSION, "files": entries}, indent=1), encoding="utf-8")
    return manifest


def check_manifest(folder: Path, *, only: Collection[str] | None = None) -> set[str]:
    """Check size and sha256 of the files that a folder's manifest names.

    Args:
        folder: A folder with a `manifest.json`.
        only: Check these alone; a name that the manifest does not list is an error.

    Returns:
        The names of all files in the manifest.

    Raises:
        CheckpointError: If a file is missing, differs, is a link or lies outside, or the manifest cannot be read.
    """
    manifest = read_json(folder / MANIFEST_FILE)
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{folder} has format version {version}; this tinygpt reads version {FORMAT_VERSION}.")
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{folder / MANIFEST_FILE} is damaged: it lists no files.")
    for name in files if only is None else only:
        path = folder / name
        if name not in files:
            raise CheckpointError(f"{folder / MANIFEST_FILE} does not list {name}, so nothing can vouch for it.")
        try:
            if ".." in Path(name).parts or Path(name).is_absolute() or path.is_symlink():
                raise CheckpointError(f"{folder}: {name} is a link or lies outside the checkpoint.")
            size = path.stat().st_size
            if size != files[name]["size"]:
                raise CheckpointError(f"{path} is damaged: {size} bytes instead of {files[name]['size']}.")
            if _sha256(path) != files[name]["sha256"]:
                raise CheckpointError(f"{path} is damaged: its sha256 is not the one in {MANIFEST_FILE}.")
        except (OSError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is missing or cannot be read: {error}.") from None
    return set(files)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: If there is none.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is damaged: it is not a JSON object.")
    return document


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
