"""A file from an address the user gave, kept for the next time."""

import hashlib
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

from tinygpt._disk import replacing
from tinygpt.errors import DataError
from tinygpt.evals._progress import progress_bar

# The public bundle is 25 MB; a server must not be able to fill the disk.
_MAX_DOWNLOAD_BYTES = 1 << 30
_TIMEOUT_SECONDS = 60
_CHUNK_BYTES = 1 << 20


def download(address: str, cache_dir: str | Path | None, *, progress: bool) -> Path:
    """Return the local copy of a file, fetched whole or not at all, and only once.

    Raises:
        DataError: If the address cannot be read, or the file is too large or cut off.
    """
    if cache_dir is None:
        from huggingface_hub import constants

        cache_dir = Path(constants.HF_HOME) / "tinygpt"
    target = Path(cache_dir) / f"bundle-{hashlib.sha256(address.encode()).hexdigest()[:16]}.zip"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(target) as temporary, temporary.open("wb") as file:
            _copy(address, file.write, progress)
    except (OSError, HTTPException) as error:  # urllib's own errors are OSErrors
        raise DataError(f"{address} cannot be fetched: {error}.") from None
    return target


def _copy(address: str, write: Callable[[bytes], object], progress: bool) -> None:
    with urllib.request.urlopen(address, timeout=_TIMEOUT_SECONDS) as response:
        size = response.length
        received = 0
        with progress_bar("fetching the bundle", total=size, unit="B", enabled=progress) as advance:
            while chunk := response.read(_CHUNK_BYTES):
                received += len(chunk)
                if received > _MAX_DOWNLOAD_BYTES:
                    raise DataError(f"{address} is larger than {_MAX_DOWNLOAD_BYTES:,} bytes and no evaluation bundle.")
                write(chunk)
                advance(len(chunk))
    if size is not None and received != size:
        raise DataError(f"{address} was cut off: {received:,} of {size:,} bytes arrived; try again.")
