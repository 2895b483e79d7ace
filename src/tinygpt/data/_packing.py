"""Best-fit packing of documents into rows, with every row starting at a document's start."""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from tinygpt.data._batch import IGNORE_INDEX
from tinygpt.errors import ConfigError

Overflow: TypeAlias = Literal["crop", "carry"]
"""What happens to the rest of a document that was cut to fill a row: dropped, or starting a later row."""

TokenArray: TypeAlias = npt.NDArray[np.int32]


@dataclass
class Utilization:
    """Where the tokens went. `<|bos|>` is counted apart from the tokens of documents.

    At any time `tokens_read = tokens_used + tokens_cropped + (tokens still in the buffer)`, and
    `rows * row_tokens = tokens_used + bos_used + padding` once the last row is complete.

    Attributes:
        documents: Documents read, empty ones included.
        empty_documents: Documents without a token, skipped.
        tokens_read: Tokens of all documents read.
        tokens_used: Tokens placed in rows.
        tokens_cropped: Tokens dropped by `overflow="crop"`.
        bos_used: `<|bos|>` tokens placed in rows.
        padding: Places of a last row that nothing was left for.
        rows: Rows completed.
    """

    documents: int = 0
    empty_documents: int = 0
    tokens_read: int = 0
    tokens_used: int = 0
    tokens_cropped: int = 0
    bos_used: int = 0
    padding: int = 0
    rows: int = 0

    @property
    def cropped_fraction(self) -> float:
        """Share of the tokens that left the buffer which were dropped, 0 to 1."""
        gone = self.tokens_used + self.tokens_cropped
        return self.tokens_cropped / gone if gone else 0.0


class Packer:
    """Fills rows of a fixed length with documents, each behind its own `<|bos|>`.

    Into the space left in a row goes the longest document of the buffer that fits whole, again and again. When
    none fits, `crop` fills the row with the head of the shortest document and drops the rest; `carry` takes the
    head of the longest one and returns the rest to the buffer, behind a new `<|bos|>`, so that no token is lost
    and what is cut is mostly what had to be cut anyway. Among equally long documents the oldest is taken.

    Args:
        row_tokens: Tokens in a row: the sequence length and one more, for the last target.
        bos_token_id: Id put before every document and every carried rest.
        buffer_documents: How many documents to choose from; more waste less and take more memory.
        overflow: `"crop"` or `"carry"`.

    Raises:
        ConfigError: If `row_tokens` is below 2, `buffer_documents` below 1, or `overflow` is neither.

    References:
        Ding et al., [Fewer Truncations Improve Language Modeling](https://arxiv.org/abs/2404.10830), 2024: best-fit
        packing of a whole corpus. Here, as in [nanochat](https://github.com/karpathy/nanochat), it runs over a
        buffer and fills rows completely; the choice is by bisection in sorted lengths, not a scan.
    """

    def __init__(
        self,
        *,
        row_tokens: int,
        bos_token_id: int,
        buffer_documents: int = 1000,
        overflow: Overflow = "crop",
    ) -> None:
        if row_tokens < 2:
            raise ConfigError(f"row_tokens={row_tokens} has no room for <|bos|> and a token; choose 2 or more.")
        if buffer_documents < 1:
            raise ConfigError(f"buffer_documents={buffer_documents} is not positive; choose 1 or more.")
        if overflow not in ("crop", "carry"):
            raise ConfigError(f"overflow={overflow!r} is not known; choose 'crop' or 'carry'.")
        self._row_tokens = row_tokens
        self._bos = bos_token_id
        self._buffer_documents = buffer_documents
        self._overflow = overflow
        # (length with <|bos|>, minus arrival number): sorted by length, and the oldest last among equals.
        self._order: list[tuple[int, int]] = []
        self._buffer: dict[int, TokenArray] = {}
        self._arrivals = 0
        self._row = np.empty(row_tokens, dtype=np.int32)
        self._filled = 0
        self._counts = Utilization()

    def __len__(self) -> int:
        """Number of documents and carried rests in the buffer."""
        return len(self._order)

    @property
    def utilization(self) -> Utilization:
        """A copy of the counts so far."""
        return replace(self._counts)

    def add(self, token_ids: Sequence[int] | TokenArray) -> None:
        """Put a document, without `<|bos|>`, into the buffer; an empty one is counted and skipped."""
        self._counts.documents += 1
        self._counts.tokens_read += len(token_ids)
        if len(token_ids) == 0:
            self._counts.empty_documents += 1
        else:
            self._insert(np.asarray(token_ids, dtype=np.int32))

    def next_row(self, documents: Iterator[Sequence[int] | TokenArray]) -> TokenArray | None:
        """Return the next full row, refilling the buffer from `documents` before every choice.

        Returns:
            `(row_tokens,)` int32, or None when `documents` and the buffer ended before the row was full. The part
            of the row that exists is kept: call again with more documents, or `finish_row`.
        """
        while self._filled < self._row_tokens:
            while len(self._order) < self._buffer_documents and (document := next(documents, None)) is not None:
                self.add(document)
            if not self._order:
                return None
            self._place()
        return self._take_row()

    def finish_row(self) -> TokenArray | None:
        """Return the row that `next_row` could not fill, padded with `IGNORE_INDEX`; None if nothing is in it."""
        if self._filled == 0:
            return None
        self._row[self._filled :] = IGNORE_INDEX
        self._counts.padding += self._row_tokens - self._filled
        return self._take_row()

    def buffered_documents(self) -> list[TokenArray]:
        """Return the buffer's documents and carried rests without `<|bos|>`, oldest first."""
        return [self._buffer[arrival] for arrival in sorted(self._buffer)]

    def restore(self, documents: Iterable[TokenArray], counts: Utilization) -> None:
        """Replace buffer and counts by `buffered_documents` and `utilization` of another packer, between two rows."""
        self._order, self._buffer, self._arrivals, self._filled = [], {}, 0, 0
        for document in documents:
            self._insert(document)
        self._counts = replace(counts)

    def _insert(self, tokens: TokenArray) -> None:
        insort(self._order, (len(tokens) + 1, -self._arrivals))
        self._buffer[self._arrivals] = tokens
        self._arrivals += 1

    def _place(self) -> None:
        """Put one document, or the head of one, into the row."""
        space = self._row_tokens - self._filled
        index = bisect_right(self._order, (space, 0)) - 1
        if index < 0 and self._overflow == "carry":
            index = len(self._order) - 1
        elif index < 0:
            index = bisect_left(self._order, (self._order[0][0] + 1, -self._arrivals)) - 1
        _, minus_arrival = self._order.pop(index)
        tokens = self._buffer.pop(-minus_arrival)
        head = tokens[: space - 1]
        self._row[self._filled] = self._bos
        self._row[self._filled + 1 : self._filled + 1 + len(head)] = head
        self._filled += 1 + len(head)
        self._counts.bos_used += 1
        self._counts.tokens_used += len(head)
        if len(head) < len(tokens):
            if self._overflow == "carry":
                self._insert(tokens[len(head) :])
            else:
                self._counts.tokens_cropped += len(tokens) - len(head)

    def _take_row(self) -> TokenArray:
        row = self._row.copy()
        self._filled = 0
        self._counts.rows += 1
        return row


def pack_rows(
    documents: Iterable[Sequence[int] | TokenArray],
    *,
    row_tokens: int,
    bos_token_id: int,
    buffer_documents: int = 1000,
    overflow: Overflow = "crop",
) -> Iterator[TokenArray]:
    """Pack tokenized documents into rows until both documents and buffer are used up.

    Args:
        documents: Token ids of each document, without `<|bos|>`; empty ones are skipped.
        row_tokens: Tokens in a row: the sequence length and one more, for the last target.
        bos_token_id: Id put before every document and every carried rest.
        buffer_documents: How many documents to choose from.
        overflow: What happens to the rest of a cut document: `"crop"` drops it, `"carry"` packs it later.

    Returns:
        An iterator of rows, `(row_tokens,)` int32. Only the last may be padded, with `IGNORE_INDEX`.

    Raises:
        ConfigError: If an argument is out of range.

    Example:
        ```python
        from tinygpt.data import pack_rows

        rows = list(pack_rows([[1, 2, 3], [4, 5], [6]], row_tokens=4, bos_token_id=0, overflow="carry"))
        # [0 1 2 3], [0 4 5 0], [0 6 -1 -1]
        ```
    """
    packer = Packer(
        row_tokens=row_tokens, bos_token_id=bos_token_id, buffer_documents=buffer_documents, overflow=overflow
    )
    return _rows(packer, iter(documents))


def _rows(packer: Packer, documents: Iterator[Sequence[int] | TokenArray]) -> Iterator[TokenArray]:
    while (row := packer.next_row(documents)) is not None:
        yield row
    if (last := packer.finish_row()) is not None:
        yield last
