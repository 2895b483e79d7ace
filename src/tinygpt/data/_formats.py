"""How documents lie in a file: plain text and JSON lines, as they are or compressed."""

import json
import sys
from collections.abc import Iterator
from io import SEEK_END, BufferedReader
from typing import Protocol

from tinygpt._numbers import check_whole
from tinygpt.data._compressed import COMPRESSED, open_content
from tinygpt.data._documents import Cursor, cursor_number
from tinygpt.data._faults import Faults
from tinygpt.errors import ConfigError, DataError

MAX_DOCUMENT_BYTES = 32 << 20
"""Larger documents are refused unless asked for: tokenizing needs about ten times a document's size in memory."""

_BLOCK_BYTES = 1 << 20


class Format(Protocol):
    """Reads the documents of one open file.

    Attributes:
        suffixes: Names of files in this format end in one of these.
        settings: What decides, besides the files, which documents there are.
        limit: Longest document in bytes.
    """

    suffixes: tuple[str, ...]
    settings: str
    limit: int

    def documents(self, file: BufferedReader, name: str, place: Cursor, faults: Faults) -> Iterator[tuple[str, Cursor]]:
        """Yield the documents behind `place`, or all if it is empty, each with the place behind it.

        Raises:
            DataError: If a document cannot be used and faults are not skipped.
        """


class TextFormat:
    """UTF-8 text; a file is a document, or holds several between separators."""

    def __init__(self, separator: str | None, max_document_bytes: int) -> None:
        if separator == "":
            raise DataError("separator is empty; give the text between two documents, or None for one a file.")
        self.separator = separator
        self._separator = None if separator is None else separator.encode("utf-8")
        # What a file of Windows has where a separator of line ends was meant: it would be one document, unnoticed.
        windows = separator.replace("\n", "\r\n") if separator and "\r" not in separator else separator
        self._windows_separator = windows.encode("utf-8") if windows and windows != separator else None
        self.limit = checked_limit(max_document_bytes)
        self.suffixes = with_compression(".txt")
        self.settings = f"text {separator!r}"

    def documents(self, file: BufferedReader, name: str, place: Cursor, faults: Faults) -> Iterator[tuple[str, Cursor]]:
        """Yield documents with the offset behind each, in the uncompressed text."""
        with open_content(file, name) as content:
            start = _skip_to_offset(content, name, place)
            for raw, end in _pieces(content, start, self._separator, self.limit):
                if raw is None:
                    hint = "give the separator between its documents, or raise"
                    if self.separator is not None:
                        hint = f"the separator {self.separator!r} is not in it: give one that is, or raise"
                    too_long(faults, name, start, f"at byte {start}", self.limit, hint)
                elif self._windows_separator and self._windows_separator in raw:
                    separator = self._windows_separator.decode("utf-8")
                    message = (
                        f"{name}: the document at byte {start} holds {separator!r}, the separator with the "
                        f"line ends of Windows; give separator={separator!r}, or convert the file."
                    )
                    faults.note(name, start, "line ends of Windows", message)
                elif (text := decode(raw, name, start, faults)) is not None:
                    yield text, {"offset": end}
                start = end


class JsonFormat:
    """One JSON object a line, the document under one key."""

    def __init__(self, text_key: str, max_document_bytes: int) -> None:
        self._text_key = text_key
        self.limit = checked_limit(max_document_bytes)
        self.suffixes = with_compression(".jsonl")
        self.settings = f"jsonl {text_key!r}"

    def documents(self, file: BufferedReader, name: str, place: Cursor, faults: Faults) -> Iterator[tuple[str, Cursor]]:
        """Yield documents with the offset behind each, in the uncompressed text, and the line number."""
        with open_content(file, name) as content:
            offset = _skip_to_offset(content, name, place)
            line = cursor_number(place, "line", offset) if place else 0
            for raw, size in _lines(content, self.limit):
                line += 1
                start, offset = offset, offset + size
                if raw is None:
                    too_long(faults, name, start, f"in line {line}", self.limit, "raise")
                elif raw.strip() and (record := decode(raw, name, start, faults)) is not None:
                    text = self._text(record)
                    if isinstance(text, str):
                        yield text, {"offset": offset, "line": line}
                    else:
                        reason, message = text
                        faults.note(name, start, reason, f"{name} line {line}{message}")

    def _text(self, record: str) -> str | tuple[str, str]:
        """Return the document in one line, or kind and message of what is wrong with it."""
        try:
            fields = json.loads(record)
        except (ValueError, RecursionError) as error:
            hint = "if it is the last line, the file was cut off in a record."
            return "not valid JSON", f" is not valid JSON ({error}); {hint}"
        if not isinstance(fields, dict):
            return "not a JSON object", f" is a JSON {type(fields).__name__}; each line must be an object."
        if self._text_key not in fields:
            keys = f"its keys are {list(fields)}; choose a text_key."
            return f"no key {self._text_key!r}", f" has no key {self._text_key!r}; {keys}"
        text = fields[self._text_key]
        if not isinstance(text, str):
            kind = type(text).__name__
            return "not a string", f": {self._text_key!r} is {kind}; the document must be a string."
        if "\\u" in record:  # only an escape can smuggle in what UTF-8 cannot hold
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                return "half a character", f" escapes half a character (a lone surrogate): {error}."
        return text


def with_compression(*suffixes: str) -> tuple[str, ...]:
    """Return the suffixes plain and compressed."""
    return tuple(suffix + ending for suffix in suffixes for ending in ("", *COMPRESSED))


def checked_limit(max_document_bytes: int) -> int:
    """Return the limit.

    Raises:
        ConfigError: If it is not positive.
    """
    check_whole(max_document_bytes=max_document_bytes)
    if max_document_bytes < 1:
        raise ConfigError(f"max_document_bytes={max_document_bytes} is not positive; choose 1 or more.")
    return max_document_bytes


def too_long(faults: Faults, name: str, position: int, where: str, limit: int, hint: str) -> None:
    """Deal with a document over the limit."""
    message = f"{name}: the document {where} has more than max_document_bytes={limit:,} bytes; {hint} the limit."
    faults.note(name, position, "too long", message)


def decode(raw: bytes, name: str, offset: int, faults: Faults) -> str | None:
    """Return bytes that start at `offset` of a file as text, or None if they are to be passed over.

    A byte order mark at the beginning of a file, as some programs on Windows write it, is no part of the text.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        place = offset + error.start
        message = f"{name} is not valid UTF-8 at byte {place} ({error.reason}); convert the file to UTF-8."
        faults.note(name, offset, "not valid UTF-8", message)
        return None
    return text if offset else text.removeprefix("\ufeff")


def _skip_to_offset(content: BufferedReader, name: str, place: Cursor) -> int:
    """Move to the offset of a place, 0 if there is none, and return it."""
    if not place:
        return 0
    if not name.lower().endswith(COMPRESSED):
        return content.seek(cursor_number(place, "offset", content.seek(0, SEEK_END)))
    left = offset = cursor_number(place, "offset", sys.maxsize)
    while left:  # a compressed stream can only be read up to there
        block = content.read(min(left, _BLOCK_BYTES))
        if not block:
            raise DataError(f"cursor {place} does not belong to this source: offset must be 0 to {offset - left}.")
        left -= len(block)
    return offset


def _lines(content: BufferedReader, limit: int) -> Iterator[tuple[bytes | None, int]]:
    """Yield each line and its size in bytes; None in place of a line over the limit, which is not kept in memory."""
    while raw := content.readline(limit + 1):
        if len(raw) <= limit:
            yield raw, len(raw)
            continue
        size = len(raw)
        while raw and not raw.endswith(b"\n"):
            raw = content.readline(_BLOCK_BYTES)
            size += len(raw)
        yield None, size


def _pieces(
    content: BufferedReader, offset: int, separator: bytes | None, limit: int
) -> Iterator[tuple[bytes | None, int]]:
    """Yield what stands between separators from `offset` on, with the offset behind it and its separator.

    None stands for a piece over the limit, of which no more than the limit and a block is in memory.
    """
    pending = bytearray()
    dropped = searched = 0
    while block := content.read1(_BLOCK_BYTES):  # not `read`, which loses what comes before damage
        pending += block
        if separator is None:
            if len(pending) > limit:
                yield None, offset + len(pending)
                return
            continue
        while (end := pending.find(separator, searched)) >= 0:
            searched = 0
            offset += dropped + end + len(separator)
            yield (bytes(pending[:end]) if dropped + end <= limit else None), offset
            del pending[: end + len(separator)]
            dropped = 0
        tail = min(len(pending), len(separator) - 1)  # may be the head of a separator
        if dropped or len(pending) - tail > limit:
            dropped += len(pending) - tail
            del pending[: len(pending) - tail]
        searched = len(pending) - tail
    if pending or dropped:
        size = dropped + len(pending)
        yield (bytes(pending) if size <= limit else None), offset + size
