"""The baseline of the packing benchmarks: best fit by looking at every document of the buffer for every choice."""

from collections.abc import Iterable, Iterator


def scan_rows(
    documents: Iterable[list[int]], *, row_tokens: int, bos: int, buffer_documents: int
) -> Iterator[list[int]]:
    """Yield full rows as `pack_rows(..., overflow="crop")` does, until documents and buffer are used up."""
    waiting = iter(documents)
    buffer: list[list[int]] = []
    while True:
        row: list[int] = []
        while len(row) < row_tokens:
            while len(buffer) < buffer_documents and (document := next(waiting, None)) is not None:
                buffer.append([bos, *document])
            if not buffer:
                return
            space, best, best_length, shortest = row_tokens - len(row), -1, 0, 0
            for index, document in enumerate(buffer):
                length = len(document)
                if best_length < length <= space:
                    best, best_length = index, length
                if length < len(buffer[shortest]):
                    shortest = index
            row += buffer.pop(best if best >= 0 else shortest)[:space]
        yield row
