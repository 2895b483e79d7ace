"""Where documents come from: the protocol, and the sources that are Python objects.

A source may also have `skipped`, what it passed over and why (`Skipped`); code that reports on a run asks for it with
`skipped_of`, so that a source of the user's needs only the two methods of the protocol.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol, TypeAlias

from tinygpt.errors import DataError

Cursor: TypeAlias = dict[str, Any]
"""A place between two documents of a source, as JSON values; only the source that made it can read it."""


NO_TOKENS = "the source has no document with a token in it; give it text."
_FINGERPRINTED = 1000  # documents


class DocumentSource(Protocol):
    """A sequence of documents that can be read from the middle. Any class with these two methods will do."""

    def read(self, cursor: Cursor | None = None) -> Iterator[tuple[str, Cursor]]:
        """Yield documents in their fixed order, each with the cursor just behind it.

        Args:
            cursor: Where to start: one that an earlier `read` yielded, or None for the beginning.

        Raises:
            DataError: If a document cannot be read.
        """

    def fingerprint(self) -> str:
        """Return a digest that differs when the documents differ; a saved state is refused on another one."""


class TextDocuments:
    """Documents from a list in memory.

    Args:
        documents: One string a document.

    Raises:
        DataError: If there is no document, or one is not a string.

    Example:
        ```python
        from tinygpt.data import TextDocuments

        source = TextDocuments(["first document", "second document"])
        ```
    """

    def __init__(self, documents: Sequence[str]) -> None:
        if isinstance(documents, str):
            raise DataError("documents is one str and would be read letter by letter; give a list: [text].")
        for index, document in enumerate(documents):
            if not isinstance(document, str):
                raise DataError(f"document {index} is {type(document).__name__}; documents are str.")
        if not documents:
            raise DataError("there are no documents: the list is empty.")
        self._documents = tuple(documents)

    def __len__(self) -> int:
        return len(self._documents)

    def read(self, cursor: Cursor | None = None) -> Iterator[tuple[str, Cursor]]:
        """Yield the documents from the cursor on.

        Raises:
            DataError: If the cursor is not one of this source.
        """
        start = 0 if cursor is None else cursor_number(cursor, "document", len(self._documents))
        for index in range(start, len(self._documents)):
            yield self._documents[index], {"document": index + 1}

    def fingerprint(self) -> str:
        """Return a SHA-256 hex digest of all documents."""
        digest = hashlib.sha256(b"documents")
        for document in self._documents:
            encoded = document.encode("utf-8", errors="surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
        return digest.hexdigest()


class IterableDocuments:
    """Documents from anything that can be iterated from the beginning again and again.

    Going on from a cursor makes a new iterator and passes over the documents before it.

    Args:
        documents: An iterable of strings that starts afresh each time, such as a `datasets` column, or a function
            that returns a fresh iterator, such as a generator function. A single iterator is refused: it can be
            read once, and an epoch or a resume needs it again.
        identity: What tells these documents from others, such as `"my-corpus v3"`; a saved state is refused on
            another one. None takes a hash of the first 1,000 documents, which makes them twice.

    Raises:
        DataError: If `documents` is a single iterator, a string, or neither iterable nor a function.

    Example:
        ```python
        from tinygpt.data import IterableDocuments


        def documents():
            for number in range(10_000):
                yield f"document {number}"


        source = IterableDocuments(documents, identity="numbers v1")
        ```
    """

    def __init__(self, documents: Iterable[str] | Callable[[], Iterable[str]], *, identity: str | None = None) -> None:
        if isinstance(documents, str):
            raise DataError("documents is one str and would be read letter by letter; give a list: [text].")
        if isinstance(documents, Iterator):
            raise DataError(
                "documents is a single iterator, which can be read once; give the function that makes it, or a list."
            )
        if not isinstance(documents, Iterable) and not callable(documents):
            raise DataError(f"documents is {type(documents).__name__}; give an iterable of str, or a function.")
        self._documents = documents
        self._identity = identity
        self._last: Iterator[str] | None = None

    def read(self, cursor: Cursor | None = None) -> Iterator[tuple[str, Cursor]]:
        """Yield the documents from the cursor on.

        Raises:
            DataError: If there is no document, one is not a string, fewer come than the cursor has passed, or the
                function returns an iterator that it has returned before.
        """
        start = 0 if cursor is None else cursor_number(cursor, "document", 1 << 62)
        iterator = self._fresh()
        passed = sum(1 for _ in islice(iterator, start))
        if passed < start:
            raise DataError(f"the cursor is behind document {start} and only {passed} came this time; restore them.")
        index = start
        for index, document in enumerate(iterator, start=start + 1):
            if not isinstance(document, str):
                raise DataError(f"document {index - 1} is {type(document).__name__}; documents are str.")
            yield document, {"document": index}
        if index == 0:
            raise DataError("there are no documents: the iterable is empty.")

    def fingerprint(self) -> str:
        """Return a SHA-256 hex digest of the identity, or of the first 1,000 documents.

        Raises:
            DataError: If one of those documents is not a string.
        """
        if self._identity is not None:
            return hashlib.sha256(f"iterable {self._identity}".encode()).hexdigest()
        return TextDocuments(list(islice(self._fresh(), _FINGERPRINTED)) or [""]).fingerprint()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the last iterator behind: generators cannot go to another process."""
        return {**self.__dict__, "_last": None}

    def _fresh(self) -> Iterator[str]:
        """Return a new iterator."""
        made = self._documents() if callable(self._documents) else self._documents
        iterator = iter(made)
        if iterator is self._last:
            raise DataError(
                "the function returned the same iterator again, and what it has given is gone; it must make a new one."
            )
        self._last = iterator
        return iterator


def cursor_number(cursor: Cursor, key: str, largest: int) -> int:
    """Return one number of a cursor.

    Raises:
        DataError: If it is absent or not from 0 to `largest`.
    """
    value = cursor.get(key)
    if not isinstance(value, int) or not 0 <= value <= largest:
        raise DataError(f"cursor {cursor} does not belong to this source: {key} must be 0 to {largest}.")
    return value
