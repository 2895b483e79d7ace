"""Packing of documents into rows: best fit, every row at a document's start, or one stream cut into rows."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from tinygpt._numbers import check_whole
from tinygpt.data._batch import IGNORE_INDEX
from tinygpt.errors import ConfigError

Overflow: TypeAlias = Literal["crop", "carry", "concat"]
"""What happens to the rest of a document that was cut to fill a row.

`"crop"` drops it, `"carry"` lets it start a later row, `"concat"` goes on with it at once: documents in their order
are one stream, and rows are cut from it wherever they end.
"""

TokenArray: TypeAlias = npt.NDArray[np.int32]

# A document's place in the sorted buffer is one integer, length above arrival: integers compare faster than tuples.
_ARRIVAL_BITS = 44
_LAST_ARRIVAL = (1 << _ARRIVAL_BITS) - 1


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

    def __str__(self) -> str:
        """One line for a log, such as `1,200 documents (3 empty), 840,000 tokens read: ...`."""
        waiting = self.tokens_read - self.tokens_used - self.tokens_cropped
        return (
            f"{self.documents:,} documents ({self.empty_documents:,} empty), {self.tokens_read:,} tokens read: "
            f"{self.tokens_used:,} used in {self.rows:,} rows, {self.tokens_cropped:,} cropped "
            f"({self.cropped_fraction:.1%}), {waiting:,} waiting"
        )


class PackerState(NamedTuple):
    """What a `Packer` holds between two rows; it shares the documents' arrays, which nobody writes to.

    Attributes:
        documents: The buffer's documents and rests without `<|bos|>`, oldest first, `(tokens,)` int32 each.
        counts: Where the tokens went so far.
        continued: Whether the oldest is the rest of a document whose start, `<|bos|>` and all, was in the last row;
            only with `overflow="concat"`.
    """

    documents: list[TokenArray]
    counts: Utilization
    continued: bool = False


class Packer:
    """Fills rows of a fixed length with documents, each behind its own `<|bos|>`.

    With `crop` and `carry`, the longest document of the buffer that fits whole goes into the space left in a row,
    again and again. When none fits, `crop` fills the row with the head of the shortest document and drops the rest;
    `carry` takes the head of the longest one and returns the rest to the buffer, behind a new `<|bos|>`, so that no
    token is lost and what is cut is mostly what had to be cut anyway. Among equally long documents the oldest is
    taken. With `concat` documents follow each other in the order they came, without a buffer to choose from.

    Args:
        row_tokens: Tokens in a row: the sequence length and one more, for the last target.
        bos_token_id: Id put before every document and every carried rest.
        buffer_documents: How many documents to choose from; more waste less and take more memory. No matter to
            `"concat"`.
        overflow: `"crop"`, `"carry"` or `"concat"`.

    Raises:
        ConfigError: If `row_tokens` is below 2, `buffer_documents` below 1, or `overflow` is none of the three.

    References:
        Ding et al., [Fewer Truncations Improve Language Modeling](https://arxiv.org/abs/2404.10830), 2024: best-fit
        packing of a whole corpus. Here, as in [nanochat](https://github.com/karpathy/nanochat), it runs over a
        buffer and fills rows completely; the choice is by bisection in sorted lengths, not a scan. `concat` is what
        GPT-2 and GPT-3 were trained on.
    """

    def __init__(
        self,
        *,
        row_tokens: int,
        bos_token_id: int,
        buffer_documents: int = 1000,
        overflow: Overflow = "crop",
    ) -> None:
        check_whole(row_tokens=row_tokens, bos_token_id=bos_token_id, buffer_documents=buffer_documents)
        if row_tokens < 2:
            raise ConfigError(f"row_tokens={row_tokens} has no room for <|bos|> and a token; choose 2 or more.")
        if buffer_documents < 1:
            raise ConfigError(f"buffer_documents={buffer_documents} is not positive; choose 1 or more.")
        if overflow not in ("crop", "carry", "concat"):
            raise ConfigError(f"overflow={overflow!r} is not known; choose 'crop', 'carry' or 'concat'.")
        self._row_tokens = row_tokens
        self._bos = bos_token_id
        self._overflow = overflow
        self._buffer_documents = 1 if overflow == "concat" else buffer_documents
        # Sorted by length with <|bos|>, and the oldest last among equals; `_buffer` is in order of arrival.
        self._order: list[int] = []
        self._buffer: dict[int, TokenArray] = {}
        self._arrivals = 0
        self._row = np.empty(row_tokens, dtype=np.int32)
        self._filled = 0
        self._continued = False
        self._counts = Utilization()

    def __len__(self) -> int:
        """Number of documents and rests in the buffer."""
        return len(self._order)

    @property
    def utilization(self) -> Utilization:
        """A copy of the counts so far."""
        return replace(self._counts)

    def add(self, token_ids: Sequence[int] | TokenArray) -> None:
        """Put a document, without `<|bos|>`, into the buffer; an empty one is counted and skipped."""
        length = len(token_ids)
        self._counts.documents += 1
        self._counts.tokens_read += length
        if length == 0:
            self._counts.empty_documents += 1
        else:
            self._insert(np.asarray(token_ids, dtype=np.int32), length)

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

    def state(self) -> PackerState:
        """Return what `restore` needs, between two rows; cheap enough to be taken at every one."""
        return PackerState(list(self._buffer.values()), replace(self._counts), self._continued)

    def restore(self, state: PackerState) -> None:
        """Go on where another packer with the same arguments was, at the start of a row."""
        self._order, self._buffer, self._arrivals, self._filled = [], {}, 0, 0
        for document in state.documents:
            self._insert(document, len(document))
        self._counts = replace(state.counts)
        self._continued = state.continued

    def _insert(self, tokens: TokenArray, length: int) -> None:
        insort(self._order, (length + 1 << _ARRIVAL_BITS) + _LAST_ARRIVAL - self._arrivals)
        self._buffer[self._arrivals] = tokens
        self._arrivals += 1

    def _place(self) -> None:
        """Put one document, or the head of one, into the row."""
        order, overflow, filled = self._order, self._overflow, self._filled
        space = self._row_tokens - filled
        index = bisect_left(order, space + 1 << _ARRIVAL_BITS) - 1
        if index < 0 and overflow == "crop":
            # The oldest of the shortest: the last one before the next length.
            index = bisect_left(order, (order[0] >> _ARRIVAL_BITS) + 1 << _ARRIVAL_BITS) - 1
        tokens = self._buffer.pop(_LAST_ARRIVAL - (order.pop(index) & _LAST_ARRIVAL))
        if not self._continued:
            self._row[filled] = self._bos
            self._counts.bos_used += 1
            filled += 1
            space -= 1
        length = len(tokens)
        head = length if length < space else space
        self._row[filled : filled + head] = tokens[:head]
        self._filled = filled + head
        self._counts.tokens_used += head
        self._continued = overflow == "concat" and (head < length)
        if head < length:
            if overflow == "crop":
                self._counts.tokens_cropped += length - head
            else:
                self._insert(tokens[head:], length - head)

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
        overflow: What happens to the rest of a cut document: `"crop"` drops it, `"carry"` packs it later, `"concat"`
            starts the next row with it.

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
