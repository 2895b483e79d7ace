import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygpt.data import TextDocuments, TokenShards, tokenize_documents
from tinygpt.errors import DataError
from tinygpt.tokenizer import ByteTokenizer, train_bpe

TEXTS = ["first", "", "the second document", "é", "five", "the last one"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenize_documents(TextDocuments(TEXTS), ByteTokenizer(), tmp_path / "tokens", processes=1, shard_tokens=20)
    return tmp_path / "tokens"


def test_shards_hold_what_the_tokenizer_gives(folder: Path) -> None:
    shards = TokenShards(folder)
    tokenizer = ByteTokenizer()
    assert shards.num_shards == 2
    assert len(shards) == 6
    assert shards.num_tokens == shards.num_bytes == sum(len(text.encode()) for text in TEXTS)
    assert shards.dtype == np.uint16
    assert shards.tokenizer.fingerprint() == shards.tokenizer_fingerprint == tokenizer.fingerprint()
    assert shards.source_fingerprint == TextDocuments(TEXTS).fingerprint()
    assert [shards.document(index).tolist() for index in range(6)] == [tokenizer.encode(text) for text in TEXTS]


@given(start=st.integers(0, 6))
def test_reading_goes_on_at_any_cursor(start: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("tokens")
    shards = tokenize_documents(TextDocuments(TEXTS), ByteTokenizer(), folder, processes=1, shard_tokens=9)
    whole = [(tokens.tolist(), cursor) for tokens, cursor in shards.read()]
    cursor = whole[start - 1][1] if start else None
    assert [(tokens.tolist(), cursor) for tokens, cursor in shards.read(cursor)] == whole[start:]


def test_documents_outlive_the_map(folder: Path) -> None:
    tokens = TokenShards(folder).document(2)
    shutil.rmtree(folder)
    assert tokens.dtype == np.int32
    assert bytes(tokens.tolist()) == b"the second document"


def test_a_large_vocabulary_is_stored_in_four_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ByteTokenizer, "vocab_size", 65_537)
    shards = tokenize_documents(TextDocuments(TEXTS), ByteTokenizer(), tmp_path / "tokens", processes=1)
    assert shards.dtype == np.uint32
    assert bytes(shards.document(0).tolist()) == b"first"


def test_the_fingerprint_is_of_the_content_and_not_of_the_place(folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    assert TokenShards(moved).fingerprint() == TokenShards(folder).fingerprint()
    other = tokenize_documents(TextDocuments(TEXTS[1:]), ByteTokenizer(), tmp_path / "other", processes=1)
    assert other.fingerprint() != TokenShards(folder).fingerprint()


@pytest.mark.parametrize("name", ["tokens-00001.bin", "offsets-00000.bin"])
def test_a_missing_or_truncated_file_is_found_on_opening(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-2])
    with pytest.raises(DataError, match=rf"{name} has {len(content) - 2} bytes and the manifest says {len(content)}"):
        TokenShards(folder)
    (folder / name).unlink()
    with pytest.raises(DataError, match=rf"{name} is missing or cannot be read \(No such file or directory\)"):
        TokenShards(folder)


@pytest.mark.parametrize("name", ["tokens-00001.bin", "offsets-00001.bin"])
def test_a_changed_byte_is_found_on_first_use_and_by_verify(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[10] ^= 1
    (folder / name).write_bytes(content)
    shards = TokenShards(folder)
    assert bytes(shards.document(0).tolist()) == b"first"  # the other shard is sound
    for check in (shards.verify, lambda: shards.document(5)):
        with pytest.raises(DataError, match=rf"{name} was changed since it was written: its sha256 is \w+"):
            check()
    if name.startswith("tokens"):
        assert len(TokenShards(folder, verify=False).document(5)) == len("the last one")


def test_offsets_that_cannot_be_are_refused_even_without_hashes(folder: Path) -> None:
    offsets = np.fromfile(folder / "offsets-00000.bin", dtype="<i8")
    offsets[1] = 1 << 40
    offsets.tofile(folder / "offsets-00000.bin")
    with pytest.raises(DataError, match=r"offsets-00000.bin is damaged: offsets must rise from 0 to 24"):
        TokenShards(folder, verify=False).document(0)


def test_a_shard_deleted_while_reading_is_an_error(folder: Path) -> None:
    documents = TokenShards(folder).read()
    next(documents)
    (folder / "tokens-00001.bin").unlink()
    with pytest.raises(DataError, match=r"tokens-00001.bin is missing or cannot be read"):
        list(documents)


def test_a_damaged_manifest_is_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    text = path.read_text()
    fields = json.loads(text)
    for damaged, message in [
        (text[:-40], "manifest.json is damaged or from another version of tinygpt: .*not valid JSON"),
        (text.replace('"version": 1', '"version": 2'), "manifest.json is damaged or from another version of tinygpt"),
        (json.dumps({**fields, "vocab_size": 300}), "manifest.json is damaged: it does not have the sha256 it names"),
    ]:
        path.write_text(damaged)
        with pytest.raises(DataError, match=message):
            TokenShards(folder)
    path.unlink()
    with pytest.raises(DataError, match=r"holds no finished token shards: .*No such file.*run `tinygpt tokenize`"):
        TokenShards(folder)


def test_a_changed_tokenizer_is_refused(folder: Path) -> None:
    train_bpe(TEXTS * 3, vocab_size=280).save(folder / "tokenizer")
    with pytest.raises(DataError, match=r"tokenizer_config.json was changed since it was written"):
        TokenShards(folder)


@pytest.mark.parametrize("index", [-1, 6])
def test_there_are_no_documents_outside(folder: Path, index: int) -> None:
    with pytest.raises(DataError, match=rf"there is no document {index}; .* has documents 0 to 5"):
        TokenShards(folder).document(index)


def test_a_cursor_of_something_else_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="does not belong to this source: document must be 0 to 6"):
        next(TokenShards(folder).read({"document": 7}))
