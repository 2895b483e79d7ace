import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinygpt.data import IGNORE_INDEX, TextDocuments, ValidationSet
from tinygpt.errors import ConfigError, DataError
from tinygpt.tokenizer import ByteTokenizer, train_bpe

TOKENIZER = ByteTokenizer()
TEXTS = ["the first document", "", "größer 🐋", "a", "one that is much longer than a row of it could ever be"]


def _make(**changes) -> ValidationSet:
    return ValidationSet.from_source(TextDocuments(TEXTS), TOKENIZER, **{"rows": 3, "seq_len": 8, **changes})


@given(texts=st.lists(st.text("abcdé", max_size=40), max_size=12), seq_len=st.integers(1, 20), rows=st.integers(1, 4))
def test_every_byte_of_every_document_is_a_target_once(texts: list[str], seq_len: int, rows: int) -> None:
    texts = [*texts, "x"]
    validation = ValidationSet.from_source(TextDocuments(texts), TOKENIZER, rows=rows, seq_len=seq_len)
    targets = torch.cat([batch.targets.flatten() for batch in validation])
    trained = targets[(targets != IGNORE_INDEX) & (targets != TOKENIZER.bos_token_id)]
    assert sorted(trained.tolist()) == sorted("".join(texts).encode())
    assert validation.num_bytes == len("".join(texts).encode())
    assert validation.num_tokens == int((targets != IGNORE_INDEX).sum())


def test_bytes_are_counted_as_utf8_whatever_the_tokenizer() -> None:
    bpe = train_bpe(TEXTS * 2, vocab_size=290)
    validation = ValidationSet.from_source(TextDocuments(TEXTS), bpe, rows=2, seq_len=5)
    assert validation.num_bytes == sum(len(text.encode()) for text in TEXTS)


def test_it_can_be_read_again_and_again() -> None:
    validation = _make()
    first, second = list(validation), list(validation)
    assert len(first) == len(validation)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.targets, other.targets)


def test_batches_are_full_but_the_last_and_only_the_last_row_is_padded() -> None:
    validation = _make()
    assert [len(batch.inputs) for batch in validation] == [3] * (len(validation) - 1) + [
        (len(validation.token_rows) - 1) % 3 + 1
    ]
    assert not (validation.token_rows[:-1] == IGNORE_INDEX).any()
    assert all((batch.inputs != IGNORE_INDEX).all() for batch in validation)
    assert all((batch.inputs[:, 0] == TOKENIZER.bos_token_id).all() for batch in validation)


def test_the_hash_depends_on_the_rows_and_not_on_the_batch_size() -> None:
    assert _make().hash == _make(rows=1).hash
    assert len({_make().hash, _make(seq_len=9).hash, _make(max_tokens=16).hash}) == 3


@pytest.mark.parametrize("max_tokens", [8, 15, 16, 33])
def test_max_tokens_keeps_the_first_whole_rows(max_tokens: int) -> None:
    kept = _make(max_tokens=max_tokens).token_rows
    assert torch.equal(kept, _make().token_rows[: max_tokens // 8])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 0}, "rows=0 is not positive"),
        ({"seq_len": 0}, "seq_len=0 is not positive"),
        ({"max_tokens": 7}, "max_tokens=7 is less than one row of seq_len=8"),
    ],
)
def test_numbers_out_of_range_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _make(**changes)


def test_a_source_without_tokens_is_refused() -> None:
    with pytest.raises(DataError, match="no document with a token in it"):
        ValidationSet.from_source(TextDocuments(["", ""]), TOKENIZER, rows=1, seq_len=4)
