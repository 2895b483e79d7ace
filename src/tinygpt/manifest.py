"""Sizes and hashes of the files in a folder, so that damage is found before anything is used.

What is read here may come from strangers: every size that a file declares is compared with what is there before memory
is asked for.
"""

import hashlib
import json
import os
import stat
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import tinygpt
from tinygpt.errors import CheckpointError

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1
MAX_JSON_BYTES = 32 * 2**20
"""Largest JSON file that is written or read; a thousand layers need a tenth of it."""
MAX_HEADER_BYTES = 32 * 2**20
"""Largest list of tensors in a safetensors file; the format itself allows 100 MB."""


def write_manifest(folder: Path) -> Path:
    """Write the size and sha256 of every file in the folder into its `manifest.json`; return that file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = zip(files, _sha256_of(files), strict=True)
    entries = {p.relative_to(folder).as_posix(): {"size": p.stat().st_size, "sha256": sha256} for p, sha256 in hashes}
    document = {
        "format_version": FORMAT_VERSION,
        "tinygpt_version": tinygpt.__version__,
        "torch_version": torch.__version__,
        "files": entries,
    }
    manifest = folder / MANIFEST_FILE
    manifest.write_text(json.dumps(document, indent=1), encoding="utf-8")
    return manifest


def check_manifest(folder: Path, *, only: Collection[str] | None = None, hashes: bool = True) -> set[str]:
    """Check size and sha256 of the files that a folder's manifest names; large files are hashed at the same time.

    Args:
        folder: A folder with a `manifest.json`.
        only: Check these alone; a name that the manifest does not list is an error.
        hashes: Whether to hash the files; without, a file that is missing or of another size is still found.

    Returns:
        The names of all files in the manifest.

    Raises:
        CheckpointError: If a file is missing, differs, is a link or lies outside, or the manifest cannot be read.
    """
    manifest = read_json(folder / MANIFEST_FILE)
    check_format(folder / MANIFEST_FILE, manifest)
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{folder / MANIFEST_FILE} is damaged: it lists no files.")
    names = list(files if only is None else only)
    for name in names:
        if name not in files:
            raise CheckpointError(f"{folder / MANIFEST_FILE} does not list {name}, so nothing can vouch for it.")
        _check_size(folder, name, files[name])
    paths = [folder / name for name in names] if hashes else []
    try:
        found = _sha256_of(paths)
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder} cannot be read: {error}.") from None
    for path, name, sha256 in zip(paths, names, found, strict=False):
        if sha256 != files[name].get("sha256"):
            raise CheckpointError(f"{path} is damaged: its sha256 is not the one in {MANIFEST_FILE}.")
    return set(files)


def check_format(path: Path, document: dict[str, Any]) -> None:
    """Refuse a document of another format version.

    Raises:
        CheckpointError: If `format_version` is not the one that this tinygpt reads.
    """
    version = document.get("format_version")
    if version != FORMAT_VERSION:
        writer = document.get("tinygpt_version")
        origin = f" It was written by tinygpt {writer}, this is {tinygpt.__version__}." if writer else ""
        raise CheckpointError(f"{path} has format version {version}; this tinygpt reads {FORMAT_VERSION}.{origin}")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of bounded size.

    Raises:
        CheckpointError: If there is none.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is not a file.")
        if status.st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {status.st_size:,} bytes; more than {MAX_JSON_BYTES:,} are not read.")
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is damaged: it is not a JSON object.")
    return document


def check_tensor_file(path: Path) -> None:
    """Refuse a safetensors file whose header is larger than the file or than any real one, before it is parsed.

    What the header declares of names, shapes and places is compared with the size of the file by safetensors itself.

    Raises:
        CheckpointError: If so, or the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            declared = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise CheckpointError(f"{path} is missing or damaged: {error}.") from None
    if not 2 <= declared <= min(size - 8, MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{path} is missing or damaged: it has {size:,} bytes and declares a header of {declared:,}; "
            f"more than {MAX_HEADER_BYTES:,} are not read."
        )


def _check_size(folder: Path, name: str, entry: Any) -> None:
    path = folder / name
    try:
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise CheckpointError(f"{folder}: {name} lies outside the checkpoint.")
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or not path.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{folder}: {name} is a link or no file, or lies outside the checkpoint.")
        if status.st_size != entry["size"]:
            raise CheckpointError(f"{path} is damaged: {status.st_size} bytes instead of {entry['size']}.")
        if not isinstance(entry["sha256"], str):
            raise CheckpointError(f"{folder / MANIFEST_FILE} is damaged: it has no sha256 of {name}.")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is missing or cannot be read: {error}.") from None


def _sha256_of(paths: Iterable[Path]) -> list[str]:
    """Hash files at the same time; hashlib lets other threads run meanwhile."""
    paths = list(paths)
    try:
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            return list(pool.map(_sha256, paths))
    except RuntimeError:  # the program is ending and starts no more threads
        return [_sha256(path) for path in paths]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
