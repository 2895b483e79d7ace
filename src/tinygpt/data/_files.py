"""Document sources that are files: what they share, plain text and JSON lines."""

import hashlib
import json
import os
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from io import BufferedReader
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, TypeAlias

from tinygpt.data._documents import Cursor, cursor_number
from tinygpt.data._faults import WHOLE_FILE, Faults, OnError, Skipped
from tinygpt.data._formats import MAX_DOCUMENT_BYTES, Format, JsonFormat, TextFormat
from tinygpt.errors import DataError

Paths: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

# Sources up to 256 MiB are hashed whole; of larger ones 1 MiB a file, so that 1,000 shards take seconds.
_HASHED_WHOLE_BYTES = 256 << 20
_SAMPLES = 16
_SAMPLE_BYTES = 64 << 10


class ListedFile(NamedTuple):
    """A file as it was when the source was made; `version` changes when its contents do."""

    name: str
    size: int
    version: int | str


class FileSource:
    """Files in sorted order, read one after the other; a subclass says where they are."""

    def __init__(self, files: Sequence[ListedFile], form: Format, faults: Faults) -> None:
        self._files = list(files)
        self._format = form
        self._faults = faults

    @property
    def _settings(self) -> str:
        """What decides, besides the files, which documents there are."""
        return self._format.settings + (f" skip {self._format.limit}" if self._faults.on_error == "skip" else "")

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """What was passed over since this source was made, by file and reason; empty unless `on_error="skip"`."""
        return self._faults.skipped()

    def read(self, cursor: Cursor | None = None) -> Iterator[tuple[str, Cursor]]:
        """Yield the documents from the cursor on, opening one file at a time.

        Raises:
            DataError: If the cursor is not one of this source or there is no document at all; and, unless faults
                are skipped, if a file has gone or changed, was cut off or is damaged, or a document is not valid
                UTF-8, broken or too long. File and place are named.
        """
        first, place = (0, Cursor()) if cursor is None else self._start(cursor)
        found = cursor is not None
        with closing(self._open_from(first)) as opened:
            for index, file in enumerate(opened, start=first):
                name, size, _ = self._files[index]
                for text, end in self._documents(file, name, place):
                    found = True
                    yield text, {"file": index, "name": name, "size": size, **end}
                place = {}
        if not found:
            names = ", ".join(file.name for file in self._files[:5]) + (", ..." if len(self._files) > 5 else "")
            reasons = "".join(f" Skipped: {skipped.first}" for skipped in self.skipped[:5])
            raise DataError(f"there are no documents in {names}.{reasons}")

    def _open_from(self, first: int) -> Generator[BufferedReader | None, None, None]:
        """Yield every file from `first` on, opened, or None for one that a fault was noted of."""
        raise NotImplementedError

    def _documents(self, file: BufferedReader | None, name: str, place: Cursor) -> Iterator[tuple[str, Cursor]]:
        """Yield the documents of one file, turning what can go wrong with a file into a noted fault."""
        if file is None:
            return
        try:
            with file:
                yield from self._format.documents(file, name, place, self._faults)
        except EOFError:
            message = f"{name} ends in the middle of its compressed data: it was cut off; fetch or write it again."
            self._faults.note(name, WHOLE_FILE, "cut off", message)
        except OSError as error:
            message = f"{name} cannot be read: {error.strerror or error}; fetch or write it again."
            self._faults.note(name, WHOLE_FILE, "cannot be read", message)

    def _start(self, cursor: Cursor) -> tuple[int, Cursor]:
        """Return the file to go on with and the place in it, {} for its beginning."""
        index = cursor_number(cursor, "file", len(self._files))
        name, size = cursor.get("name"), cursor.get("size")
        if not isinstance(name, str) or not isinstance(size, int):
            raise DataError(f"cursor {cursor} does not belong to this source: name and size are missing.")
        if index == len(self._files) or self._files[index].name != name:
            names = [file.name for file in self._files]
            there = name in names
            change = f"file {index + 1} then, {names.index(name) + 1} now" if there else "not among the files any more"
            message = f"the position was saved in {name}, which is {change}; restore the files as they were."
            self._faults.note(name, WHOLE_FILE, "moved or deleted since the position was saved", message)
            index = names.index(name) if there else bisect_left(names, name)
            if not there:
                return index, {}
        if (now := self._files[index].size) != size:
            message = f"{name} had {size:,} bytes when the position was saved and has {now:,} now; restore it."
            self._faults.note(name, WHOLE_FILE, "changed since the position was saved", message)
            return index + 1, {}
        return index, cursor


class LocalFiles(FileSource):
    """Files on disk."""

    def __init__(self, paths: Paths, form: Format, on_error: OnError) -> None:
        faults = Faults(on_error)
        self._paths: list[Path] = []
        files = []
        for name, path in _find(paths, form.suffixes):
            status = path.stat()
            if status.st_size == 0:
                faults.note(name, WHOLE_FILE, "empty", f"{path} is empty; remove it or leave it out.")
                continue
            files.append(ListedFile(name, status.st_size, status.st_mtime_ns))
            self._paths.append(path)
        if not files:
            raise DataError(f"every file of {paths} is empty; give files with text.")
        super().__init__(files, form, faults)

    def fingerprint(self) -> str:
        """Return a SHA-256 hex digest of names, sizes and contents.

        If all files together have more than 256 MiB, a file over 1 MiB is represented by 16 samples of 64 KiB spread
        from its first to its last byte.

        Raises:
            DataError: If a file has gone.
        """
        digest = hashlib.sha256(self._settings.encode())
        whole = sum(file.size for file in self._files) <= _HASHED_WHOLE_BYTES
        for (name, _, _), path in zip(self._files, self._paths, strict=True):
            try:
                with path.open("rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    digest.update(json.dumps([name, size]).encode())
                    _hash_content(digest.update, file, size, whole)
            except OSError as error:
                # Not a fault to skip: without the file there is no telling what was read.
                raise DataError(f"{path} cannot be read: {error.strerror}; it was there when it was listed.") from None
        return digest.hexdigest()

    def _open_from(self, first: int) -> Generator[BufferedReader | None, None, None]:
        for (name, size, modified), path in zip(self._files[first:], self._paths[first:], strict=True):
            try:
                file = path.open("rb")
            except OSError as error:
                message = f"{path} cannot be read: {error.strerror}; it was there when it was listed."
                self._faults.note(name, WHOLE_FILE, "deleted or unreadable", message)
                yield None
                continue
            status = os.fstat(file.fileno())
            if (status.st_size, status.st_mtime_ns) != (size, modified):
                file.close()
                message = f"{path} changed since it was listed; make the source again, and leave its files alone."
                self._faults.note(name, WHOLE_FILE, "changed while in use", message)
                yield None
                continue
            yield file


class TextFiles(LocalFiles):
    r"""Plain UTF-8 text: a file is a document, or holds several between separators.

    Files are read in sorted order, their bytes kept as they are (line ends are not converted). Names that end in
    `.gz` or `.zst` are uncompressed on the way; going on in the middle of such a file first unpacks it up to there.

    Args:
        paths: A file, a list of files, or a folder, of which every `.txt`, `.txt.gz` and `.txt.zst` file below it
            is taken.
        separator: What stands between two documents of a file, such as a blank line, `"\n\n"`; None makes each
            file one document. Nothing between two separators is an empty document, which loaders skip and count.
        max_document_bytes: A longer document is a fault: tokenizing one takes about ten times its size in memory.
        on_error: `"raise"` stops at a file or document that cannot be used; `"skip"` passes over it, counts it in
            `skipped`, and warns once for each kind of fault.

    Raises:
        ConfigError: If `max_document_bytes` is not positive or `on_error` is not known.
        DataError: If a path is empty, does not exist or is listed twice, there is no file, or `separator` is empty;
            and, unless skipped, if a file is empty.

    Example:
        ```python
        from pathlib import Path
        from tinygpt.data import TextFiles

        Path("notes.txt").write_text("first document\n\nsecond document", newline="\n")
        source = TextFiles("notes.txt", separator="\n\n")
        ```
    """

    def __init__(
        self,
        paths: Paths,
        *,
        separator: str | None = None,
        max_document_bytes: int = MAX_DOCUMENT_BYTES,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(paths, TextFormat(separator, max_document_bytes), on_error)


class JsonLines(LocalFiles):
    r"""JSON lines: each line an object with the document under one key. Blank lines are passed over.

    Names that end in `.gz` or `.zst` are uncompressed on the way; going on in the middle of such a file first unpacks
    it up to there.

    Args:
        paths: A file, a list of files, or a folder, of which every `.jsonl`, `.jsonl.gz` and `.jsonl.zst` file below
            it is taken.
        text_key: Key of the document's text.
        max_document_bytes: A longer line is a fault: tokenizing takes about ten times a document's size in memory.
        on_error: `"raise"` stops at a file or document that cannot be used; `"skip"` passes over it, counts it in
            `skipped`, and warns once for each kind of fault.

    Raises:
        ConfigError: If `max_document_bytes` is not positive or `on_error` is not known.
        DataError: If a path is empty, does not exist or is listed twice, or there is no file; and, unless skipped,
            if a file is empty.

    Example:
        ```python
        from pathlib import Path
        from tinygpt.data import JsonLines

        Path("notes.jsonl").write_text('{"text": "first document"}\n{"text": "second document"}\n')
        source = JsonLines("notes.jsonl")
        ```
    """

    def __init__(
        self,
        paths: Paths,
        *,
        text_key: str = "text",
        max_document_bytes: int = MAX_DOCUMENT_BYTES,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(paths, JsonFormat(text_key, max_document_bytes), on_error)


def _find(paths: Paths, suffixes: tuple[str, ...]) -> list[tuple[str, Path]]:
    """Return name and path of every file, sorted; names in a folder are relative to it, so the folder may move."""
    if isinstance(paths, (str, os.PathLike)):
        root = given_path(paths)
        require_path(root)
        if root.is_dir():
            below = [file for file in root.rglob("*") if file.name.lower().endswith(suffixes) and file.is_file()]
            found = [(file.relative_to(root).as_posix(), file) for file in below]
        else:
            found = [(root.name, root)]
        if not found:
            raise DataError(f"there is no {suffixes[0]} file in {root}.")
    else:
        found = [(path.name, path) for path in map(given_path, paths)]
        if not found:
            raise DataError("there are no files: the list of paths is empty.")
    found.sort(key=lambda item: (item[0], item[1].as_posix()))
    for (_, path), (_, following) in pairwise(found):
        if path == following:
            raise DataError(f"{path} is listed twice.")
    for _, path in found:
        require_path(path)
        if path.is_dir():
            raise DataError(f"{path} is a folder; give it alone, or a list of files.")
    return found


def given_path(path: str | os.PathLike[str]) -> Path:
    """Return what was given as a `Path`, which would read an empty string as the current folder."""
    if path == "":
        raise DataError("the path is empty; give a file or a folder, '.' for the current one.")
    return Path(path)


def require_path(path: Path) -> None:
    """Raise `DataError` if there is nothing at a path."""
    try:
        there = path.exists()
    except OSError as error:  # a text given for a path, most likely
        shown = str(path)[:60] + ("…" if len(str(path)) > 60 else "")
        raise DataError(f"{shown!r} is no path: {error.strerror}; wrap texts in TextDocuments([text]).") from None
    if not there:
        raise DataError(f"{path} does not exist.")


def _hash_content(update: Callable[[bytes], None], file: BufferedReader, size: int, whole: bool) -> None:
    """Hash all of a file, or samples of a large one."""
    if whole or size <= _SAMPLES * _SAMPLE_BYTES:
        while block := file.read(1 << 20):
            update(block)
        return
    for sample in range(_SAMPLES):
        file.seek((size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
        update(file.read(_SAMPLE_BYTES))
