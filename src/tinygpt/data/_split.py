"""Documents for training and for validation, told apart by their text."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from tinygpt._numbers import check_real, check_whole
from tinygpt.data._documents import Cursor, DocumentSource
from tinygpt.data._faults import Skipped, skipped_of
from tinygpt.errors import ConfigError, DataError

_HASH_VALUES = 1 << 64


def hash_split(
    source: DocumentSource, *, validation_fraction: float, seed: int = 0
) -> tuple[DocumentSource, DocumentSource]:
    """Divide a source into training and validation by a hash of each document's text.

    A document's side depends on its text and the seed alone: every copy of it falls to the same side, and no document
    changes sides when shards are added, moved or removed, or when sources are mixed. Copies with any difference, such
    as one more space, are other documents. A larger fraction with the same seed keeps all that was validation before.

    Both sides read the whole source and leave out what is not theirs, so freeze the validation side once, as a
    `ValidationSet`, and save that.

    Args:
        source: All documents.
        validation_fraction: Share of the documents that becomes validation, above 0 and below 1.
        seed: Another seed makes another division.

    Returns:
        The training source and the validation source. Their cursors are those of `source`.

    Raises:
        ConfigError: If `validation_fraction` is not between 0 and 1.
        DataError: From reading, if no document falls to a side, or the source cannot be read.

    Example:
        ```python
        from tinygpt.data import TextDocuments, hash_split

        source = TextDocuments([f"document {number}" for number in range(1000)])
        training, validation = hash_split(source, validation_fraction=0.05)
        ```
    """
    check_real(validation_fraction=validation_fraction)
    check_whole(seed=seed)
    if not 0 < validation_fraction < 1:
        raise ConfigError(f"validation_fraction={validation_fraction} is not a share; choose above 0 and below 1.")
    training, validation = (
        _Selection(
            source,
            partial(_falls_to, side, validation_fraction, seed),
            ["hash split", 1, side, validation_fraction, seed],
            partial(_nothing_falls_to, side, validation_fraction, _separators(source)),
        )
        for side in ("training", "validation")
    )
    return training, validation


def hold_out(source: DocumentSource, validation: DocumentSource) -> DocumentSource:
    """Return a source without the documents that another one holds.

    For a validation set that is a set of files of its own: whatever of it is also in the training files does not
    reach training. Texts are compared by hash, so copies with any difference are other documents.

    Args:
        source: Documents to train on.
        validation: Documents to keep out. Read once, here; 8 bytes of each are kept, in about 100 bytes of memory.

    Raises:
        DataError: If the validation source cannot be read; from reading, if no document is left.

    Example:
        ```python
        from tinygpt.data import TextDocuments, hold_out

        training = hold_out(TextDocuments(["one", "two", "three"]), TextDocuments(["two"]))
        ```
    """
    held_out = frozenset(_hash(text, 0) for text, _ in validation.read())
    digest = hashlib.sha256(b"".join(number.to_bytes(8, "little") for number in sorted(held_out)))
    return _Selection(
        source,
        partial(_is_not_in, held_out),
        ["hold out", 1, digest.hexdigest()],
        _nothing_is_left,
    )


class _Selection:
    """Some documents of a source. Picklable if the source is, for worker processes."""

    def __init__(
        self,
        source: DocumentSource,
        takes: Callable[[str], bool],
        identity: Sequence[str | int | float],
        if_empty: Callable[[int], str],
    ) -> None:
        self._source = source
        self._takes = takes
        self._identity = identity
        self._if_empty = if_empty

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """What the source passed over because it could not be used."""
        return skipped_of(self._source)

    def read(self, cursor: Cursor | None = None) -> Iterator[tuple[str, Cursor]]:
        """Yield the selected documents from the cursor on.

        Raises:
            DataError: If there is none, or the source cannot be read.
        """
        found, count = cursor is not None, 0
        for count, (text, place) in enumerate(self._source.read(cursor), start=1):  # noqa: B007
            if self._takes(text):
                found = True
                yield text, place
        if not found:
            raise DataError(self._if_empty(count))

    def fingerprint(self) -> str:
        """Return a SHA-256 hex digest of the source and of what decides the selection."""
        return hashlib.sha256(json.dumps([self._source.fingerprint(), *self._identity]).encode()).hexdigest()


def _falls_to(side: str, validation_fraction: float, seed: int, text: str) -> bool:
    return (_hash(text, seed) < validation_fraction * _HASH_VALUES) == (side == "validation")


def _nothing_falls_to(side: str, validation_fraction: float, separators: Sequence[str], count: int) -> str:
    hint = "A text file is one document unless a separator parts it."
    if separators:
        given = " or ".join(map(repr, separators))
        hint = f"Parted by {given} the text has {count:,} document{'s' if count != 1 else ''}."
    return (
        f"no document falls to {side} at validation_fraction={validation_fraction}; "
        f"give more documents or another fraction. {hint}"
    )


def _nothing_is_left(count: int) -> str:
    return "every document of the source is also in the validation source; give other text to train on."


def _separators(source: object) -> list[str]:
    """Return what parts the documents of the text files of a source; nothing if each is a document."""
    parts = list(getattr(source, "_sources", {"": source}).values())  # of a mixture
    found = [getattr(getattr(part, "_format", None), "separator", None) for part in parts]
    return sorted({separator for separator in found if separator is not None})


def _is_not_in(hashes: frozenset[int], text: str) -> bool:
    return _hash(text, 0) not in hashes


def _hash(text: str, seed: int) -> int:
    """Return a 64-bit hash that is the same on every machine."""
    encoded = text.encode("utf-8", errors="surrogatepass")
    salt = seed.to_bytes(16, "little", signed=True)
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8, salt=salt).digest(), "little")
