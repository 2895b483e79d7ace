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

# A file larger than this is hashed block by block as well, so that a load can use all cores.
_BLOCK_BYTES = 64 * 2**20
_READ_BYTES = 2**20

_Part = tuple[Path, int, int | None]  # a file, an offset, and a length; None for all of the file


def write_manifest(folder: Path) -> Path:
    """Write size and sha256 of every file in the folder, and of the blocks of large ones, into its `manifest.json`.

    Returns:
        That file.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST_FILE)
    parts = {path: _blocks(path.stat().st_size) for path in files}
    found = iter(_sha256_of([part for path in files for part in ((path, 0, None), *((path, *b) for b in parts[path]))]))
    entries: dict[str, Any] = {}
    for path in files:
        entry: dict[str, Any] = {"size": path.stat().st_size, "sha256": next(found)}
        if parts[path]:
            entry["blocks"] = [next(found) for _ in parts[path]]
        entries[path.relative_to(folder).as_posix()] = entry
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
    expected = [part for name in names for part in _parts(folder, name, files[name])] if hashes else []
    try:
        found = _sha256_of([part for part, _ in expected])
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder} cannot be read: {error.strerror or error}.") from None
    for ((path, _, _), wanted), sha256 in zip(expected, found, strict=True):
        if sha256 != wanted:
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


def _blocks(size: int) -> list[tuple[int, int]]:
    """Return offset and length of the blocks of a large file, which several threads can hash; none of a small one."""
    if size <= _BLOCK_BYTES:
        return []
    return [(offset, min(_BLOCK_BYTES, size - offset)) for offset in range(0, size, _BLOCK_BYTES)]


def _parts(folder: Path, name: str, entry: dict[str, Any]) -> list[tuple[_Part, str]]:
    """Return what of a file to hash and what should come out: its blocks if the manifest has them, else all of it.

    Raises:
        CheckpointError: If the manifest has another number of blocks.
    """
    if "blocks" not in entry:
        return [((folder / name, 0, None), entry["sha256"])]
    blocks, wanted = _blocks(entry["size"]), entry["blocks"]
    if not blocks or not isinstance(wanted, list) or len(wanted) != len(blocks):
        raise CheckpointError(f"{folder / MANIFEST_FILE} is damaged: the blocks of {name} do not fit its size.")
    return [((folder / name, *block), sha256) for block, sha256 in zip(blocks, wanted, strict=True)]


def _sha256_of(parts: Iterable[_Part]) -> list[str]:
    """Hash files and blocks at the same time; hashlib lets other threads run meanwhile."""
    parts = list(parts)
    try:
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            return list(pool.map(_sha256, parts))
    except RuntimeError:  # the program is ending and starts no more threads
        return [_sha256(part) for part in parts]


def _sha256(part: _Part) -> str:
    path, offset, length = part
    with path.open("rb", buffering=0) as file:
        if length is None:
            return hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(offset)
        digest, buffer = hashlib.sha256(), memoryview(bytearray(_READ_BYTES))
        while length > 0 and (count := file.readinto(buffer[: min(length, _READ_BYTES)])):
            digest.update(buffer[:count])
            length -= count
        return digest.hexdigest()
