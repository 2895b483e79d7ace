"""Writing and removing so that a crash leaves the old or the new, and no link leads out of the folder."""

import os
import shutil
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Replace a file at once: written beside, forced to the disk, renamed. A link there is replaced, not followed."""
    temporary = path.with_name(f".{path.name}.tmp")
    remove(temporary)
    with temporary.open("x", encoding="utf-8") as file:  # x: never through a link that somebody put there meanwhile
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def remove(path: Path) -> None:
    """Remove a file, a folder with all in it, or a link but not what it leads to; nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Force a file or a folder's entries to the disk; Windows has no such call for folders."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
