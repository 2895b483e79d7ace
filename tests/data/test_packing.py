from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygpt.data import IGNORE_INDEX, Overflow, Packer, Utilization, pack_rows
from tinygpt.errors import ConfigError

BOS = 0
BOTH = pytest.mark.parametrize("overflow", ["crop", "carry"])
# Every token is different, so that a lost, repeated or moved one is seen.
document_lengths = st.lists(st.integers(0, 30), max_size=40)
settings_of_a_packer = {"row_tokens": st.integers(2, 16), "buffer_documents": st.integers(1, 12)}


def _documents(lengths: list[int]) -> list[list[int]]:
    numbers = iter(range(1, sum(lengths) + 1))
    return [[next(numbers) for _ in range(length)] for length in lengths]


def _pack_by_scanning(
    documents: list[list[int]], row_tokens: int, buffer_documents: int, overflow: Overflow
) -> list[list[int]]:
    """The rules of packing with plain lists: look through the whole buffer at every choice."""
    waiting = [[BOS, *document] for document in documents if document]
    buffer: list[list[int]] = []
    rows: list[list[int]] = []
    row: list[int] = []
    while waiting or buffer:
        while waiting and len(buffer) < buffer_documents:
            buffer.append(waiting.pop(0))
        space = row_tokens - len(row)
        chosen = None
        for i, document in enumerate(buffer):
            if len(document) <= space and (chosen is None or len(document) > len(buffer[chosen])):
                chosen = i
        if chosen is not None:
            row += buffer.pop(chosen)
        else:
            chosen = 0
            for i, document in enumerate(buffer):
                size, best = len(document), len(buffer[chosen])
                if size < best if overflow == "crop" else size > best:
                    chosen = i
            document = buffer.pop(chosen)
            row += document[:space]
            if overflow == "carry":
                buffer.append([BOS, *document[space:]])
        if len(row) == row_tokens:
            rows.append(row)
            row = []
    if row:
        rows.append(row + [IGNORE_INDEX] * (row_tokens - len(row)))
    return rows


def _pack(documents: list[list[int]], row_tokens: int, buffer_documents: int, overflow: Overflow) -> list[list[int]]:
    rows = pack_rows(
        documents, row_tokens=row_tokens, bos_token_id=BOS, buffer_documents=buffer_documents, overflow=overflow
    )
    return [row.tolist() for row in rows]


@BOTH
@settings(max_examples=300)
@given(lengths=document_lengths, **settings_of_a_packer)
def test_rows_are_those_of_a_scan_over_the_buffer(
    overflow: Overflow, lengths: list[int], row_tokens: int, buffer_documents: int
) -> None:
    documents = _documents(lengths)
    expected = _pack_by_scanning(documents, row_tokens, buffer_documents, overflow)
    assert _pack(documents, row_tokens, buffer_documents, overflow) == expected


@BOTH
@given(lengths=document_lengths, **settings_of_a_packer)
def test_every_row_starts_with_bos_and_only_the_last_is_padded(
    overflow: Overflow, lengths: list[int], row_tokens: int, buffer_documents: int
) -> None:
    rows = _pack(_documents(lengths), row_tokens, buffer_documents, overflow)
    assert all(len(row) == row_tokens and row[0] == BOS for row in rows)
    assert not any(IGNORE_INDEX in row for row in rows[:-1])
    if rows:
        padding = [token == IGNORE_INDEX for token in rows[-1]]
        assert padding == sorted(padding)


@given(lengths=document_lengths, **settings_of_a_packer)
def test_carry_keeps_every_token_once_and_in_order(lengths: list[int], row_tokens: int, buffer_documents: int) -> None:
    documents = _documents(lengths)
    rows = _pack(documents, row_tokens, buffer_documents, "carry")
    packed = [token for row in rows for token in row if token not in (BOS, IGNORE_INDEX)]
    assert Counter(packed) == Counter(token for document in documents for token in document)
    for document in documents:
        own = set(document)
        assert [token for token in packed if token in own] == document


@given(lengths=document_lengths, **settings_of_a_packer)
def test_crop_keeps_heads_of_documents_whole_and_invents_nothing(
    lengths: list[int], row_tokens: int, buffer_documents: int
) -> None:
    documents = _documents(lengths)
    starts = {document[0]: document for document in documents if document}
    for row in _pack(documents, row_tokens, buffer_documents, "crop"):
        pieces: list[list[int]] = []
        for token in row:
            if token == BOS:
                pieces.append([])
            elif token != IGNORE_INDEX:
                pieces[-1].append(token)
        for piece in pieces[:-1]:
            assert piece == starts[piece[0]]
        if pieces[-1]:
            assert pieces[-1] == starts[pieces[-1][0]][: len(pieces[-1])]


@BOTH
@given(lengths=document_lengths, rows_taken=st.integers(0, 20), **settings_of_a_packer)
def test_the_counts_add_up_at_any_time(
    overflow: Overflow, lengths: list[int], rows_taken: int, row_tokens: int, buffer_documents: int
) -> None:
    packer = Packer(row_tokens=row_tokens, bos_token_id=BOS, buffer_documents=buffer_documents, overflow=overflow)
    documents = iter(_documents(lengths))
    rows = []
    for _ in range(rows_taken):
        row = packer.next_row(documents)
        row = packer.finish_row() if row is None else row
        if row is None:
            break
        rows.append(row)
    counts = packer.utilization
    tokens = np.concatenate([np.empty(0, np.int32), *rows])
    buffered = sum(len(document) for document in packer.buffered_documents())
    assert counts.rows == len(rows)
    assert counts.tokens_read == counts.tokens_used + counts.tokens_cropped + buffered
    assert counts.tokens_used == (tokens > 0).sum()
    assert counts.bos_used == (tokens == BOS).sum()
    assert counts.padding == (tokens == IGNORE_INDEX).sum()
    assert counts.tokens_read == sum(lengths[: counts.documents])
    assert counts.empty_documents == lengths[: counts.documents].count(0)
    if overflow == "carry":
        assert counts.tokens_cropped == 0


def test_the_largest_document_that_fits_is_taken_and_the_oldest_of_equals() -> None:
    documents = [[1], [2, 3, 4], [5, 6, 7], [8, 9, 10, 11, 12]]
    assert _pack(documents, 6, 10, "crop")[0] == [BOS, 8, 9, 10, 11, 12]
    assert _pack(documents, 5, 10, "crop")[0] == [BOS, 2, 3, 4, BOS]


def test_what_is_cut_is_the_shortest_when_cropping_and_the_longest_when_carrying() -> None:
    documents = [[1, 2, 3, 4], [5, 6, 7, 8, 9, 10]]
    assert _pack(documents, 4, 10, "crop") == [[BOS, 1, 2, 3], [BOS, 5, 6, 7]]
    assert _pack(documents, 4, 10, "carry") == [[BOS, 5, 6, 7], [BOS, 8, 9, 10], [BOS, 1, 2, 3], [BOS, 4, -1, -1]]


def test_no_more_documents_are_read_than_the_buffer_needs() -> None:
    documents = iter([[number] * 3 for number in range(1, 101)])
    rows = pack_rows(documents, row_tokens=4, bos_token_id=BOS, buffer_documents=5)
    next(rows)
    assert len(list(documents)) == 95


def test_a_restored_packer_goes_on_as_the_first() -> None:
    documents = _documents([3, 9, 1, 12, 5, 5, 2, 7, 20, 4])
    first = Packer(row_tokens=6, bos_token_id=BOS, buffer_documents=4, overflow="carry")
    rest = iter(documents)
    first.next_row(rest)
    second = Packer(row_tokens=6, bos_token_id=BOS, buffer_documents=4, overflow="carry")
    second.restore(first.buffered_documents(), first.utilization)
    later = list(rest)
    for _ in range(5):
        np.testing.assert_array_equal(first.next_row(iter(())), second.next_row(iter(())))
    assert later
    assert first.utilization == second.utilization


def test_the_cropped_share_is_of_what_left_the_buffer() -> None:
    assert Utilization().cropped_fraction == 0.0
    assert Utilization(tokens_read=100, tokens_used=30, tokens_cropped=10).cropped_fraction == 0.25


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row_tokens": 1}, r"row_tokens=1 has no room for <\|bos\|> and a token; choose 2 or more"),
        ({"buffer_documents": 0}, "buffer_documents=0 is not positive"),
        ({"overflow": "drop"}, "overflow='drop' is not known; choose 'crop' or 'carry'"),
    ],
)
def test_arguments_out_of_range_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pack_rows([], **{"row_tokens": 4, "bos_token_id": BOS, **changes})
    with pytest.raises(ConfigError, match=message):
        Packer(**{"row_tokens": 4, "bos_token_id": BOS, **changes})
