from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygpt.data import IGNORE_INDEX, Overflow, Packer, Utilization, pack_rows
from tinygpt.errors import ConfigError

BOS = 0
BOTH = pytest.mark.parametrize("overflow", ["crop", "carry"])
ALL = pytest.mark.parametrize("overflow", ["crop", "carry", "concat"])
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


@ALL
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
    buffered = sum(len(document) for document in packer.state().documents)
    assert counts.rows == len(rows)
    assert counts.tokens_read == counts.tokens_used + counts.tokens_cropped + buffered
    assert counts.tokens_used == (tokens > 0).sum()
    assert counts.bos_used == (tokens == BOS).sum()
    assert counts.padding == (tokens == IGNORE_INDEX).sum()
    assert counts.tokens_read == sum(lengths[: counts.documents])
    assert counts.empty_documents == lengths[: counts.documents].count(0)
    if overflow != "crop":
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


@ALL
@given(lengths=document_lengths, rows_before=st.integers(0, 8), **settings_of_a_packer)
def test_a_packer_restored_between_any_two_rows_goes_on_as_the_first(
    overflow: Overflow, lengths: list[int], rows_before: int, row_tokens: int, buffer_documents: int
) -> None:
    first, second = (
        Packer(row_tokens=row_tokens, bos_token_id=BOS, buffer_documents=buffer_documents, overflow=overflow)
        for _ in range(2)
    )
    rest = iter(_documents(lengths))
    for _ in range(rows_before):
        if first.next_row(rest) is None:
            return
    second.restore(first.state())
    later = list(rest)
    rows = [_all_rows(packer, later) for packer in (first, second)]
    assert rows[0] == rows[1]
    assert first.utilization == second.utilization


def _all_rows(packer: Packer, documents: list[list[int]]) -> list[list[int]]:
    rows = []
    remaining = iter(documents)
    while (row := packer.next_row(remaining)) is not None:
        rows.append(row.tolist())
    return rows


@given(lengths=document_lengths, row_tokens=st.integers(2, 16))
def test_concat_is_one_stream_cut_into_rows(lengths: list[int], row_tokens: int) -> None:
    documents = _documents(lengths)
    stream = [token for document in documents if document for token in [BOS, *document]]
    rows = _pack(documents, row_tokens, 5, "concat")
    joined = [token for row in rows for token in row]
    assert joined[: len(stream)] == stream
    assert set(joined[len(stream) :]) <= {IGNORE_INDEX}
    assert all(len(row) == row_tokens for row in rows)
    assert len(joined) - len(stream) < row_tokens


def test_concat_reads_no_document_before_it_is_needed() -> None:
    documents = iter([[number] * 3 for number in range(1, 101)])
    next(pack_rows(documents, row_tokens=6, bos_token_id=BOS, overflow="concat"))
    assert len(list(documents)) == 98


def test_a_state_is_a_snapshot() -> None:
    packer = Packer(row_tokens=4, bos_token_id=BOS, overflow="carry")
    documents = iter([[1, 2, 3, 4, 5, 6], [7]])
    packer.next_row(documents)
    state = packer.state()
    before = [document.tolist() for document in state.documents], state.counts.rows
    packer.next_row(documents)
    assert ([document.tolist() for document in state.documents], state.counts.rows) == before


def test_the_counts_in_words() -> None:
    counts = Utilization(
        documents=1200, empty_documents=3, tokens_read=1000, tokens_used=600, tokens_cropped=200, rows=5
    )
    assert str(counts) == (
        "1,200 documents (3 empty), 1,000 tokens read: 600 used in 5 rows, 200 cropped (25.0%), 200 waiting"
    )


def test_the_cropped_share_is_of_what_left_the_buffer() -> None:
    assert Utilization().cropped_fraction == 0.0
    assert Utilization(tokens_read=100, tokens_used=30, tokens_cropped=10).cropped_fraction == 0.25


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row_tokens": 1}, r"row_tokens=1 has no room for <\|bos\|> and a token; choose 2 or more"),
        ({"buffer_documents": 0}, "buffer_documents=0 is not positive"),
        ({"overflow": "drop"}, "overflow='drop' is not known; choose 'crop', 'carry' or 'concat'"),
    ],
)
def test_arguments_out_of_range_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pack_rows([], **{"row_tokens": 4, "bos_token_id": BOS, **changes})
    with pytest.raises(ConfigError, match=message):
        Packer(**{"row_tokens": 4, "bos_token_id": BOS, **changes})
