"""The stream of packed rows that all ranks and all batch sizes share, and places in it."""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple, Self

import numpy as np

from tinygpt.data._documents import NO_TOKENS, Cursor, DocumentSource
from tinygpt.data._packing import Packer, PackerState, TokenArray
from tinygpt.data._prefetch import Ahead, map_ahead
from tinygpt.data._shards import TokenShards
from tinygpt.data._shuffle import Place, Window, collect_windows, in_order, shuffled
from tinygpt.errors import DataError
from tinygpt.tokenizer import Tokenizer, encode_array

# What one thread tokenizes at a time: enough to be worth handing over, little enough to keep memory small.
_CHUNK_DOCUMENTS = 64
_CHUNK_CHARACTERS = 1 << 18

_Chunk = list[tuple[str, Cursor]]


class Mark(NamedTuple):
    """A place between two rows. It shares the buffer's arrays, so one can be taken at every batch."""

    epoch: int
    place: Place
    packer: PackerState


class RowStream:
    """Reads a source again and again and packs it; an epoch is packed to its end before the next one starts.

    Args:
        source: Text, or token shards.
        tokenizer: What turns text into token ids.
        packer: What turns documents into rows; used by this stream alone.
        seed: Shuffles documents; None keeps the source's order.
        window_documents: Documents shuffled at a time.
        workers: Threads that tokenize.
    """

    def __init__(
        self,
        source: DocumentSource | TokenShards,
        tokenizer: Tokenizer,
        packer: Packer,
        *,
        seed: int | None,
        window_documents: int,
        workers: int,
    ) -> None:
        self._source = source
        self._tokenizer = tokenizer
        self._packer = packer
        self._seed = seed
        self._window_documents = window_documents
        self._workers = 0 if isinstance(source, TokenShards) else workers
        self._epoch = 0
        self._documents = self._read_epoch(Place())

    def next_row(self) -> TokenArray:
        """Return the next row, starting new epochs as needed.

        Raises:
            DataError: If the source cannot be read or holds no token. The stream must then be restored to a mark.
        """
        while (row := self._packer.next_row(self._documents)) is None:
            self._epoch += 1
            self._documents = self._read_epoch(Place())
        return row

    def mark(self) -> Mark:
        """Return the place behind the last row."""
        return Mark(self._epoch, self._documents.place, self._packer.state())

    def restore(self, mark: Mark) -> None:
        """Go on at a mark."""
        self._documents.close()
        self._epoch = mark.epoch
        self._packer.restore(mark.packer)
        self._documents = self._read_epoch(mark.place)

    def _read_epoch(self, place: Place) -> "_Epoch":
        """Return the documents of this epoch from a place on."""
        read = partial(_encoded, self._source, self._tokenizer, self._workers)
        if self._seed is None:
            return _Epoch(in_order(read(place.cursor)), place, None)
        # Collecting a window takes a while from text, so the next one is collected while one is used.
        windows = Ahead(collect_windows(read, place, self._window_documents), depth=int(self._workers > 0))
        return _Epoch(shuffled(windows, place, seed=self._seed, epoch=self._epoch), place, windows)


class _Epoch:
    """The token ids of an epoch's documents, and the place behind those that were taken.

    An object and not a generator of the stream, which would keep itself and its threads alive in a cycle.
    """

    def __init__(self, placed: Iterator[tuple[TokenArray, Place]], place: Place, windows: Ahead[Window] | None) -> None:
        self.place = place
        self._placed = placed
        self._windows = windows
        # Behind a place lies at least one document with tokens, or there would have been no mark to go on from.
        self._found = place != Place()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> TokenArray:
        item = next(self._placed, None)
        if item is not None:
            tokens, self.place = item
            self._found = self._found or len(tokens) > 0
            return tokens
        if not self._found:
            raise DataError(NO_TOKENS)
        raise StopIteration

    def close(self) -> None:
        """Wait until the source is left alone."""
        if self._windows is not None:
            self._windows.close()


def _encoded(
    source: DocumentSource | TokenShards, tokenizer: Tokenizer, workers: int, cursor: Cursor | None
) -> Iterator[tuple[TokenArray, Cursor]]:
    if isinstance(source, TokenShards):
        yield from source.read(cursor)
        return
    for chunk in map_ahead(partial(_encode, tokenizer), _chunks(source.read(cursor)), workers=workers):
        yield from chunk


def _encode(tokenizer: Tokenizer, chunk: _Chunk) -> list[tuple[TokenArray, Cursor]]:
    return [(encode_array(tokenizer, text).view(np.int32), cursor) for text, cursor in chunk]


def _chunks(documents: Iterator[tuple[str, Cursor]]) -> Iterator[_Chunk]:
    """Yield the documents in groups to tokenize together; an error of the source comes behind what was read."""
    chunk: _Chunk = []
    characters = 0
    try:
        for text, cursor in documents:
            chunk.append((text, cursor))
            characters += len(text)
            if len(chunk) == _CHUNK_DOCUMENTS or characters >= _CHUNK_CHARACTERS:
                yield chunk
                chunk, characters = [], 0
    except Exception:
        if chunk:
            yield chunk
        raise
    if chunk:
        yield chunk
