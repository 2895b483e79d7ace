"""Document sources that are files: plain text and JSON lines."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, TypeAlias

from tinygpt.data._documents import Cursor, DocumentSource, cursor_number
from tinygpt.errors import DataError

Paths: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

# Files up to 16 MiB are hashed whole; of larger ones 16 blocks, so that large files cost no more.
_HASH_BLOCKS = 16
_BLOCK_BYTES = 1 << 20


class _FileSource:
    """Files in sorted order, read one after the other from a cursor of file number and byte offset."""

    suffix: str

    def __init__(self, paths: Paths, settings: str) -> None:
        self._files = _find(paths, self.suffix)
        self._settings = settings

    def read(self, cursor: Cursor | None = None) -> Iterator[tuple[str, Cursor]]:
        """Yield the documents from the cursor on, opening one file at a time.

        Raises:
            DataError: If a file has gone, is not valid UTF-8 or holds a broken record (file and place are named),
                there is no document at all, or the cursor is not one of this source.
        """
        first = 0 if cursor is None else cursor_number(cursor, "file", len(self._files))
        found = cursor is not None
        for index in range(first, len(self._files)):
            _, path = self._files[index]
            place = cursor if cursor is not None and index == first else {}
            try:
                with path.open("rb") as file:
                    offset = cursor_number(place, "offset", os.path.getsize(path)) if place else 0
                    file.seek(offset)
                    for text, end in self._documents(file, path, offset, place):
                        found = True
                        yield text, {"file": index, **end}
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error.strerror}; it was there when it was listed.") from None
        if not found:
            raise DataError(f"there are no documents in {', '.join(name for name, _ in self._files)}.")

    def fingerprint(self) -> str:
        """Return a SHA-256 hex digest of names, sizes and contents.

        A file over 16 MiB is represented by 16 blocks of 1 MiB spread from its first to its last byte.

        Raises:
            DataError: If a file has gone.
        """
        digest = hashlib.sha256(self._settings.encode())
        for name, path in self._files:
            try:
                with path.open("rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    digest.update(json.dumps([name, size]).encode())
                    _hash_content(digest.update, file, size)
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error.strerror}; it was there when it was listed.") from None
        return digest.hexdigest()

    def _documents(
        self, file: BinaryIO, path: Path, offset: int, place: Cursor
    ) -> Iterator[tuple[str, dict[str, int]]]:
        """Yield the documents of an open file from `offset`, each with the rest of its cursor."""
        raise NotImplementedError


class TextFiles(_FileSource):
    r"""Plain UTF-8 text: a file is a document, or holds several between separators.

    Files are read in sorted order, their bytes kept as they are (line ends are not converted).

    Args:
        paths: A file, a list of files, or a folder, of which every `.txt` file below it is taken.
        separator: What stands between two documents of a file, such as a blank line, `"\n\n"`; None makes each
            file one document. Nothing between two separators is an empty document, which loaders skip and count.

    Raises:
        DataError: If a path does not exist, a file is empty or listed twice, there is no file, or `separator`
            is empty.

    Example:
        ```python
        from pathlib import Path
        from tinygpt.data import TextFiles

        Path("notes.txt").write_text("first document\n\nsecond document", newline="\n")
        source = TextFiles("notes.txt", separator="\n\n")
        ```
    """

    suffix = ".txt"

    def __init__(self, paths: Paths, *, separator: str | None = None) -> None:
        if separator == "":
            raise DataError("separator is empty; give the text between two documents, or None for one a file.")
        super().__init__(paths, f"text {separator!r}")
        self._separator = None if separator is None else separator.encode("utf-8")

    def _documents(
        self, file: BinaryIO, path: Path, offset: int, place: Cursor
    ) -> Iterator[tuple[str, dict[str, int]]]:
        for raw, end in _pieces(file, offset, self._separator):
            yield _decode(raw, path, offset), {"offset": end}
            offset = end


class JsonLines(_FileSource):
    r"""JSON lines: each line an object with the document under one key. Blank lines are passed over.

    Args:
        paths: A file, a list of files, or a folder, of which every `.jsonl` file below it is taken.
        text_key: Key of the document's text.

    Raises:
        DataError: If a path does not exist, a file is empty or listed twice, or there is no file.

    Example:
        ```python
        from pathlib import Path
        from tinygpt.data import JsonLines

        Path("notes.jsonl").write_text('{"text": "first document"}\n{"text": "second document"}\n')
        source = JsonLines("notes.jsonl")
        ```
    """

    suffix = ".jsonl"

    def __init__(self, paths: Paths, *, text_key: str = "text") -> None:
        super().__init__(paths, f"jsonl {text_key!r}")
        self._text_key = text_key

    def _documents(
        self, file: BinaryIO, path: Path, offset: int, place: Cursor
    ) -> Iterator[tuple[str, dict[str, int]]]:
        line = cursor_number(place, "line", offset) if place else 0
        for raw in file:
            line += 1
            start, offset = offset, offset + len(raw)
            if raw.strip():
                text = self._text(_decode(raw, path, start), f"{path} line {line}")
                yield text, {"offset": offset, "line": line}

    def _text(self, record: str, where: str) -> str:
        """Return the document in one line."""
        try:
            fields = json.loads(record)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{where} is not valid JSON ({error}); if it is the last line, the file was cut off in a record."
            ) from None
        if not isinstance(fields, dict):
            raise DataError(f"{where} is a JSON {type(fields).__name__}; each line must be an object.")
        if self._text_key not in fields:
            raise DataError(f"{where} has no key {self._text_key!r}; its keys are {list(fields)}; choose a text_key.")
        text = fields[self._text_key]
        if not isinstance(text, str):
            raise DataError(f"{where}: {self._text_key!r} is {type(text).__name__}; the document must be a string.")
        if "\\u" in record:  # only an escape can smuggle in what UTF-8 cannot hold
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise DataError(f"{where} escapes half a character (a lone surrogate): {error}.") from None
        return text


def open_source(path: str | os.PathLike[str]) -> DocumentSource:
    """Open a file or folder as documents, by its suffix.

    Args:
        path: A `.txt` file (one document), a `.jsonl` file (key `"text"`), or a folder that holds files of one of
            these kinds. For other keys and separators use `JsonLines` and `TextFiles`.

    Raises:
        DataError: If the path does not exist, is of another kind, or is a folder with both kinds or neither.

    Example:
        ```python
        from pathlib import Path
        from tinygpt.data import open_source

        Path("notes.txt").write_text("one document")
        source = open_source("notes.txt")
        ```
    """
    path = Path(path)
    _require_path(path)
    candidates = path.rglob("*") if path.is_dir() else [path]
    suffixes = {file.suffix.lower() for file in candidates if file.is_file()} & {".txt", ".jsonl"}
    if suffixes == {".txt"}:
        return TextFiles(path)
    if suffixes == {".jsonl"}:
        return JsonLines(path)
    if suffixes:
        raise DataError(f"{path} holds both .txt and .jsonl files; open one kind with TextFiles or JsonLines.")
    raise DataError(f"{path} is neither .txt nor .jsonl nor a folder of them; open it with TextFiles or JsonLines.")


def _find(paths: Paths, suffix: str) -> list[tuple[str, Path]]:
    """Return name and path of every file, sorted; names in a folder are relative to it, so the folder may move."""
    if isinstance(paths, (str, os.PathLike)):
        root = Path(paths)
        _require_path(root)
        if root.is_dir():
            below = [file for file in root.rglob("*") if file.is_file() and file.suffix.lower() == suffix]
            found = [(file.relative_to(root).as_posix(), file) for file in below]
        else:
            found = [(root.name, root)]
        if not found:
            raise DataError(f"there is no {suffix} file in {root}.")
    else:
        found = [(Path(path).name, Path(path)) for path in paths]
        if not found:
            raise DataError("there are no files: the list of paths is empty.")
    found.sort(key=lambda item: (item[0], item[1].as_posix()))
    for (_, path), (_, following) in pairwise(found):
        if path == following:
            raise DataError(f"{path} is listed twice.")
    for _, path in found:
        _require_path(path)
        if path.is_dir():
            raise DataError(f"{path} is a folder; give it alone, or a list of files.")
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty; remove it or leave it out.")
    return found


def _require_path(path: Path) -> None:
    if not path.exists():
        raise DataError(f"{path} does not exist.")


def _pieces(file: BinaryIO, offset: int, separator: bytes | None) -> Iterator[tuple[bytes, int]]:
    """Yield what stands between separators from `offset` on, with the offset behind it and its separator."""
    if separator is None:
        content = file.read()
        if content:
            yield content, offset + len(content)
        return
    pending = bytearray()
    searched = 0
    while block := file.read(_BLOCK_BYTES):
        pending += block
        while (end := pending.find(separator, searched)) >= 0:
            searched = 0
            offset += end + len(separator)
            yield bytes(pending[:end]), offset
            del pending[: end + len(separator)]
        searched = max(0, len(pending) - len(separator) + 1)
    if pending:
        yield bytes(pending), offset + len(pending)


def _decode(raw: bytes, path: Path, offset: int) -> str:
    """Return bytes that start at `offset` of a file as text."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not valid UTF-8 at byte {offset + error.start} ({error.reason}); convert the file to UTF-8."
        ) from None


def _hash_content(update: Callable[[bytes], None], file: BinaryIO, size: int) -> None:
    """Hash all of a small file, blocks of a large one."""
    if size <= _HASH_BLOCKS * _BLOCK_BYTES:
        update(file.read())
        return
    for block in range(_HASH_BLOCKS):
        file.seek((size - _BLOCK_BYTES) * block // (_HASH_BLOCKS - 1))
        update(file.read(_BLOCK_BYTES))
