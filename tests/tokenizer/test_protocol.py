"""What every tokenizer promises, for each of ours."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygpt.errors import DataError
from tinygpt.tokenizer import BOS_TOKEN, BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer, train_bpe

TOKENIZERS: list[Tokenizer] = [ByteTokenizer(), train_bpe(["whales sail, ships swim: 1851"] * 3, vocab_size=275)]
each = pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda tokenizer: type(tokenizer).__name__)
unicode_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


@each
@settings(max_examples=200)
@given(text=unicode_text)
def test_any_unicode_text_survives_the_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert all(0 <= token_id < tokenizer.vocab_size for token_id in ids)


@each
@settings(max_examples=50)
@given(text=unicode_text)
def test_token_bytes_add_up_to_the_bytes_of_the_text(tokenizer: Tokenizer, text: str) -> None:
    sizes = tokenizer.token_bytes()
    assert sum(sizes[token_id] for token_id in tokenizer.encode(text)) == len(text.encode())


@each
def test_token_bytes_cover_the_vocabulary_and_are_zero_for_bos(tokenizer: Tokenizer) -> None:
    sizes = tokenizer.token_bytes()
    assert len(sizes) == tokenizer.vocab_size
    assert sizes[tokenizer.bos_token_id] == 0


@each
@settings(max_examples=30)
@given(texts=st.lists(unicode_text, max_size=5))
def test_a_batch_is_encoded_as_its_texts_one_by_one(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


@each
def test_special_tokens_in_plain_text_are_plain_characters(tokenizer: Tokenizer) -> None:
    text = f"a {BOS_TOKEN}<|user_start|> b"
    ids = tokenizer.encode(text)
    assert tokenizer.bos_token_id not in ids
    assert max(ids) < tokenizer.bos_token_id  # special ids come last, so no other special token either
    assert tokenizer.decode(ids) == text


@each
def test_decoding_shows_special_tokens_as_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([tokenizer.bos_token_id, *tokenizer.encode("hi")]) == f"{BOS_TOKEN}hi"


@each
def test_a_character_cut_in_two_decodes_as_replacement_but_its_bytes_are_exact(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🐋")
    assert tokenizer.decode(ids[:-1]).strip("\ufffd") == ""
    assert tokenizer.decode_bytes(ids[:-1]) + tokenizer.decode_bytes(ids[-1:]) == "🐋".encode()


@each
@pytest.mark.parametrize("text", ["ab\ud800c", "\ud83d\udc0b"])
def test_a_surrogate_is_refused_with_its_place(tokenizer: Tokenizer, text: str) -> None:
    place = text.index(min(text[-2:], text[2:3], key=lambda c: not "\ud800" <= c <= "\udfff"))
    with pytest.raises(DataError, match=rf"surrogate U\+D8.. at character {place}, which has no UTF-8 form"):
        tokenizer.encode(text)
    with pytest.raises(DataError, match="surrogate"):
        tokenizer.encode_batch(["fine", text])


@each
def test_bytes_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="encodes str, got bytes"):
        tokenizer.encode(b"abc")  # type: ignore[arg-type]


@each
@pytest.mark.parametrize("bad", [-1, 100_000, 1 << 40])
def test_an_id_outside_the_vocabulary_is_refused(tokenizer: Tokenizer, bad: int) -> None:
    message = re.escape(f"token id {bad} is outside the vocabulary; ids are 0 to {tokenizer.vocab_size - 1}.")
    with pytest.raises(DataError, match=message):
        tokenizer.decode([1, bad])
    with pytest.raises(DataError, match=message):
        tokenizer.decode_bytes([bad, tokenizer.bos_token_id])


@each
def test_a_saved_tokenizer_comes_back_the_same(tokenizer: Tokenizer, tmp_path) -> None:
    tokenizer.save(tmp_path / "new" / "folder")
    loaded = load_tokenizer(tmp_path / "new" / "folder")
    text = "Whales 1851, <|bos|>  ünïcode"
    assert type(loaded) is type(tokenizer)
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert loaded.encode(text) == tokenizer.encode(text)
    assert (loaded.vocab_size, loaded.bos_token_id) == (tokenizer.vocab_size, tokenizer.bos_token_id)


def test_fingerprints_tell_tokenizers_apart() -> None:
    ranks = {bytes([byte]): byte for byte in range(256)}
    prints = {
        ByteTokenizer().fingerprint(),
        BPETokenizer(ranks).fingerprint(),
        BPETokenizer({**ranks, b"ab": 256}).fingerprint(),
        BPETokenizer(ranks, pattern=r"\S+|\s").fingerprint(),
        BPETokenizer(ranks, special_tokens=[BOS_TOKEN]).fingerprint(),
    }
    assert len(prints) == 5
    assert ByteTokenizer().fingerprint() == ByteTokenizer().fingerprint()
