"""Where documents come from: the protocol, and the source that is a list in memory."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeAlias

from tinygpt.errors import DataError

Cursor: TypeAlias = dict[str, Any]
"""A place between two documents of a source, as JSON values; only the source that made it can read it."""


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


def cursor_number(cursor: Cursor, key: str, largest: int) -> int:
    """Return one number of a cursor.

    Raises:
        DataError: If it is absent or not from 0 to `largest`.
    """
    value = cursor.get(key)
    if not isinstance(value, int) or not 0 <= value <= largest:
        raise DataError(f"cursor {cursor} does not belong to this source: {key} must be 0 to {largest}.")
    return value
