import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

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


def test_every_batch_has_one_shape_and_only_the_end_of_the_set_is_padded() -> None:
    validation = _make()
    assert len(validation.token_rows) % 3
    assert [tuple(batch.inputs.shape) for batch in validation] == [(3, 8)] * len(validation)
    assert not (validation.token_rows[:-1] == IGNORE_INDEX).any()
    assert all((batch.inputs != IGNORE_INDEX).all() for batch in validation)
    assert all((batch.inputs[:, 0] == TOKENIZER.bos_token_id).all() for batch in validation)
    *_, last = validation
    filled = len(validation.token_rows) % 3
    assert (last.targets[filled:] == IGNORE_INDEX).all()
    assert (last.targets[:filled] != IGNORE_INDEX).any(dim=1).all()


def test_the_hash_depends_on_the_rows_and_not_on_the_batch_size() -> None:
    assert _make().hash == _make(rows=1).hash
    assert len({_make().hash, _make(seq_len=9).hash, _make(max_tokens=16).hash}) == 3


@pytest.mark.parametrize("max_tokens", [1, 8, 15, 16, 33, 10_000])
def test_max_tokens_takes_the_first_documents_whatever_their_length(max_tokens: int) -> None:
    validation = _make(max_tokens=max_tokens)
    targets = torch.cat([batch.targets.flatten() for batch in validation])
    found = targets[(targets != IGNORE_INDEX) & (targets != TOKENIZER.bos_token_id)]
    assert sorted(found.tolist()) == sorted("".join(TEXTS).encode()[:max_tokens])
    assert validation.num_bytes == min(max_tokens, len("".join(TEXTS).encode()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 0}, "rows=0 is not positive"),
        ({"seq_len": 0}, "seq_len=0 is not positive"),
        ({"max_tokens": 0}, "max_tokens=0 is not positive"),
    ],
)
def test_numbers_out_of_range_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _make(**changes)


def test_a_source_without_tokens_is_refused() -> None:
    with pytest.raises(DataError, match="no document with a token in it"):
        ValidationSet.from_source(TextDocuments(["", ""]), TOKENIZER, rows=1, seq_len=4)


def test_a_saved_set_comes_back_the_same(tmp_path: Path) -> None:
    validation = _make()
    validation.save(tmp_path / "new" / "validation.safetensors")
    loaded = ValidationSet.load(tmp_path / "new" / "validation.safetensors")
    assert loaded.hash == validation.hash
    for name in ("batch_rows", "bos_token_id", "num_bytes", "num_tokens"):
        assert getattr(loaded, name) == getattr(validation, name)
    assert torch.equal(loaded.token_bytes, validation.token_bytes)
    for one, other in zip(validation, loaded, strict=True):
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.targets, other.targets)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["validation.safetensors"]


def test_a_saved_set_may_be_read_in_other_batches(tmp_path: Path) -> None:
    _make().save(tmp_path / "v")
    loaded = ValidationSet.load(tmp_path / "v", rows=1)
    assert len(loaded) == len(loaded.token_rows)
    assert loaded.hash == _make().hash
    with pytest.raises(ConfigError, match="rows=0 is not positive"):
        ValidationSet.load(tmp_path / "v", rows=0)


def test_a_saved_set_outlives_its_source(tmp_path: Path) -> None:
    _make().save(tmp_path / "v")
    other = ValidationSet.from_source(TextDocuments([*TEXTS, "added"]), TOKENIZER, rows=3, seq_len=8)
    assert ValidationSet.load(tmp_path / "v").hash == _make().hash != other.hash


@pytest.mark.parametrize("tensor", ["token_rows", "token_bytes"])
def test_a_changed_byte_in_a_saved_set_is_found(tmp_path: Path, tensor: str) -> None:
    path = tmp_path / "v"
    _make().save(path)
    content = bytearray(path.read_bytes())
    (header,) = struct.unpack("<Q", content[:8])
    start, _ = json.loads(content[8 : 8 + header])[tensor]["data_offsets"]
    content[8 + header + start + 4] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="is damaged: its tokens have the hash"):
        ValidationSet.load(path)


def test_what_is_no_saved_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no validation set can be read from .*absent"):
        ValidationSet.load(tmp_path / "absent")
    path = tmp_path / "v"
    _make().save(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="is damaged or no validation set"):
        ValidationSet.load(path)
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(DataError, match="is no validation set of this version"):
        ValidationSet.load(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [("batch_rows", "0"), ("batch_rows", "r"), ("batch_rows", None), ("bos_token_id", "\0"), ("bos_token_id", "257")],
)
def test_a_saved_set_whose_numbers_are_damaged_is_refused(tmp_path: Path, name: str, text: str | None) -> None:
    path = tmp_path / "v"
    _make().save(path)
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), name: text}
        tensors = {key: file.get_tensor(key) for key in ("token_rows", "token_bytes")}
    save_file(tensors, path, {key: value for key, value in metadata.items() if value is not None})
    with pytest.raises(DataError, match=f"is damaged: its {name} is"):
        ValidationSet.load(path)
