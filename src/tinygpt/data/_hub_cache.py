"""Files of a Hub dataset in a folder of limited size, fetched and checked a little ahead of use."""

import contextlib
import hashlib
import threading
from collections.abc import Callable, Generator, Sequence
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from tinygpt.errors import HubError
from tinygpt.hub._retry import with_retries

_BLOCK_BYTES = 1 << 20


class RemoteFile(NamedTuple):
    """One file of a repository at a commit; `digest` is a SHA-256, or git's SHA-1 where the file lies in git itself."""

    path: str
    size: int
    digest: str


class DamagedDownloadError(Exception):
    """A file that arrives with other contents than the repository lists, again and again."""


class FileCache:
    """A folder with some of a list of files; the rest is fetched when asked for, and what is not needed makes room.

    Several readers, threads and processes may share a folder: a file is opened before another reader can remove it,
    and one that another process removed is fetched again.

    Args:
        folder: Where files are kept, under their path in the repository.
        files: Every file there is, in reading order.
        limit: Bytes that the files in the folder may take. What is being read stays, even if that is more.
        download: Downloads a path of the repository into the folder, going on with what is there of it.
        retries: How often a failed or damaged download is tried again.
    """

    def __init__(
        self, folder: Path, files: Sequence[RemoteFile], limit: int, download: Callable[[str], object], retries: int
    ) -> None:
        self._folder = folder
        self._files = files
        self._limit = limit
        self._download = download
        self._retries = retries
        self._fetching = threading.Lock()  # held for minutes; the other only for a look
        self._looking = threading.Lock()
        self._checked: set[int] = set()
        self._wanted: dict[object, range] = {}

    def read_from(self, first: int, ahead: int) -> Generator[BufferedReader | DamagedDownloadError, None, None]:
        """Yield every file from `first` on, opened, or why it cannot be, fetching those `ahead` in the background.

        Raises:
            HubError: If the Hub keeps failing.
        """
        reader = object()
        try:
            for index in range(first, len(self._files)):
                with self._looking:
                    self._wanted[reader] = range(index, min(index + 1 + ahead, len(self._files)))
                try:
                    file = self._open(index)
                except DamagedDownloadError as error:
                    yield error
                    continue
                # A daemon, so that a download does not keep the program from ending.
                threading.Thread(target=self._fetch_ahead, args=(reader, index), daemon=True).start()
                with file:
                    yield file
        finally:
            # Without the lock: a forgotten reader is collected at any place, also where this thread holds it.
            self._wanted.pop(reader, None)

    def _open(self, index: int) -> BufferedReader:
        for _ in range(self._retries + 2):
            # One that is there is opened without waiting for a download of another.
            with self._looking, contextlib.suppress(FileNotFoundError):
                if index in self._checked:
                    return self._path(index).open("rb")
            self._fetch(index, required=True)
        raise HubError(f"{self._path(index)} is removed as fast as it is fetched; give each run its own cache_dir.")

    def _fetch_ahead(self, reader: object, current: int) -> None:
        """Fetch what a reader will want next, for as long as it is still at the same file."""
        for index in self._wanted.get(reader, range(0))[1:]:
            still = self._wanted.get(reader)
            if still is None or still.start != current:
                return
            try:
                if not self._fetch(index, required=False):
                    return
            except (HubError, DamagedDownloadError, OSError):
                return  # the reader will try again when it gets there, and raise

    def _fetch(self, index: int, *, required: bool) -> bool:
        """Make sure that a file is there as the repository lists it; return False if there is no room for it yet."""
        file, path = self._files[index], self._path(index)
        with self._fetching:
            for _ in range(self._retries + 1):
                if not path.exists():
                    if not self._make_room(index, required):
                        return False
                    task = f"Downloading {file.path!r} from the Hub failed"
                    with_retries(lambda: self._download(file.path), task, self._retries)
                elif index in self._checked:
                    return True
                if _matches(path, file):
                    self._checked.add(index)
                    return True
                path.unlink(missing_ok=True)
        raise DamagedDownloadError(
            f"{file.path} arrived damaged {self._retries + 1} times: size or hash are not those that the repository "
            "lists; try again later."
        )

    def _path(self, index: int) -> Path:
        return self._folder / self._files[index].path

    def _make_room(self, index: int, required: bool) -> bool:
        """Remove files until another fits, and say whether it does.

        What is being read stays, and for a file that is only fetched ahead also what others are to read next. Of the
        rest goes first what will be read last: files of other commits, then the one just read.
        """
        with self._looking:
            readers = list(self._wanted.values())
            keep = {self._path(n) for wanted in readers for n in (wanted[:1] if required else wanted)}
            turns = {self._path(n): (n - index) % len(self._files) for n in range(len(self._files))}
            sizes = _sizes(self._folder.parent)
            used = sum(sizes.values()) + self._files[index].size
            for path in sorted(sizes, key=lambda path: -turns.get(path, len(turns))):
                if used <= self._limit:
                    break
                if path not in keep:
                    with contextlib.suppress(OSError):  # Windows keeps a file that is open; it goes another time
                        path.unlink()
                        used -= sizes[path]
            return required or used <= self._limit


def _sizes(folder: Path) -> dict[Path, int]:
    """Return the size of every fetched file, of all commits, without the client's own notes."""
    sizes = {}
    for path in folder.rglob("*"):
        # Another process may remove a file while we look.
        with contextlib.suppress(FileNotFoundError):
            if ".cache" not in path.relative_to(folder).parts and path.is_file():
                sizes[path] = path.stat().st_size
    return sizes


def _matches(path: Path, file: RemoteFile) -> bool:
    """Return whether a file is there and has the size and hash that the repository lists."""
    git = len(file.digest) == 40
    digest = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False) if git else hashlib.sha256()
    try:
        with path.open("rb") as content:
            while block := content.read(_BLOCK_BYTES):
                digest.update(block)
    except FileNotFoundError:
        return False
    return digest.hexdigest() == file.digest
