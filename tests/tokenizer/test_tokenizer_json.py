"""A written `tokenizer.json` gives every text the ids that ours gives; the reference is the tokenizers library."""

import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tinygpt.data import embedded_corpus
from tinygpt.errors import DataError
from tinygpt.interop.huggingface import export
from tinygpt.model import GPT, GPTConfig
from tinygpt.tokenizer import (
    CHAT_TOKENS,
    TIKTOKEN_PATTERNS,
    BPETokenizer,
    ByteTokenizer,
    load_tokenizer_json,
    save_tokenizer_json,
    train_bpe,
)

# Any character, and often those that patterns treat apart: contractions in odd letters, digits, marks, kinds of space.
TEXT = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("ab'sSſKLl12３ \n\r\t\u00a0\u2028é\u0301中🐋"))
)


def read(path: Path) -> Any:
    """Read as a text tokenizer: special tokens spelled out in text stay plain characters, as ours leaves them."""
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True
    return tokenizer


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    """Return ours and theirs by name: trained with our pattern, the same ranks with tiktoken's patterns, and bytes."""
    texts = [text for text, _ in embedded_corpus("validation").read()][:2]
    trained = train_bpe([*texts, "it's IT'S 1234567 née 中文 🐋🐋\r\n\t\tx\u00a0y" * 3], vocab_size=700)
    ours: dict[str, Any] = {"ours": trained, "bytes": ByteTokenizer()}
    ours |= {name: BPETokenizer(trained.ranks, pattern=pattern) for name, pattern in TIKTOKEN_PATTERNS.items()}
    made = {}
    for name, tokenizer in ours.items():
        path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
        save_tokenizer_json(tokenizer, path)
        made[name] = tokenizer, read(path)
    return made


@pytest.mark.parametrize("name", ["ours", "bytes", *TIKTOKEN_PATTERNS])
@given(text=TEXT)
def test_every_text_gets_the_same_ids_and_comes_back(name: str, text: str, pairs: Any) -> None:
    ours, theirs = pairs[name]
    ids = ours.encode(text)
    assert theirs.encode(text).ids == ids
    assert theirs.decode(ids) == ours.decode(ids) == text


@pytest.mark.parametrize("name", ["ours", "bytes", *TIKTOKEN_PATTERNS])
def test_a_book_gets_the_same_ids(name: str, pairs: Any) -> None:
    ours, theirs = pairs[name]
    for text, _ in embedded_corpus("validation").read():
        assert theirs.encode(text).ids == ours.encode(text)


@given(ids=st.lists(st.integers(0, 708), max_size=30))
def test_any_ids_give_the_same_text_halves_of_characters_included(ids: list[int], pairs: Any) -> None:
    ours, theirs = pairs["ours"]
    assert theirs.decode([i % ours.vocab_size for i in ids], skip_special_tokens=False) == ours.decode(
        [i % ours.vocab_size for i in ids]
    )


def test_special_tokens_keep_their_ids(pairs: Any) -> None:
    ours, theirs = pairs["ours"]
    for text, token_id in ours.special_tokens.items():
        assert theirs.token_to_id(text) == token_id
    assert theirs.get_vocab_size() == ours.vocab_size


def test_what_was_written_can_be_read_back(pairs: Any, tmp_path: Path) -> None:
    for name in ("ours", "bytes"):
        ours, _ = pairs[name]
        save_tokenizer_json(ours, tmp_path)  # a folder will do
        back = load_tokenizer_json(tmp_path)
        assert back.encode("the whale's 12345 née") == ours.encode("the whale's 12345 née")
        assert back.special_tokens.items() >= ours.special_tokens.items()


def test_transformers_reads_the_tokenizer_of_an_export(pairs: Any, tmp_path: Path) -> None:
    ours, _ = pairs["ours"]
    off = dict.fromkeys(("value_embeddings", "residual_scales", "x0_scales", "smear", "backout"), False)
    config = GPTConfig(
        num_layers=1, dim=8, num_heads=1, vocab_size=ours.vocab_size, max_seq_len=32, qk_scale=1.0, **off
    )
    export(GPT.from_config(config), tmp_path / "out", tokenizer=ours)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "the whale's 12345 née"
    assert theirs(text).input_ids == ours.encode(text)
    assert theirs(f"<|bos|>{text}").input_ids == [ours.bos_token_id, *ours.encode(text)]
    assert theirs(f"<|bos|>{text}", split_special_tokens=True).input_ids == ours.encode(f"<|bos|>{text}")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos_token_id,) * 3
    assert (theirs.model_max_length, theirs.padding_side) == (32, "left")
    assert theirs.convert_tokens_to_ids(CHAT_TOKENS[0]) == ours.special_tokens[CHAT_TOKENS[0]]
    assert theirs.decode(ours.encode(" a , b .")) == " a , b ."
    theirs.save_pretrained(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again")(text).input_ids == ours.encode(text)


@pytest.mark.parametrize(
    ("pattern", "unknown"),
    [(r"(?:\p{N}{1,2}+|x)y|\s|\S", "+|x"), (r"\d|\s|\S", r"\\d"), (r"$\n|\s|\S", r"$\\n")],
)
def test_a_pattern_that_engines_read_differently_is_refused(pattern: str, unknown: str, tmp_path: Path) -> None:
    tokenizer = BPETokenizer({bytes([byte]): byte for byte in range(256)}, pattern=pattern)
    with pytest.raises(DataError, match=re.escape(f"the split pattern has '{unknown}")):
        save_tokenizer_json(tokenizer, tmp_path / "tokenizer.json")


def test_ranks_that_no_merges_make_are_refused(tmp_path: Path) -> None:
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"abc": 256}
    with pytest.raises(DataError, match=r"the token b'abc' is not made of two others"):
        save_tokenizer_json(BPETokenizer(ranks), tmp_path / "tokenizer.json")
    assert not list(tmp_path.iterdir())


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    class Words(ByteTokenizer):
        pass

    with pytest.raises(DataError, match=r"a Words has no exact tokenizer\.json"):
        save_tokenizer_json(Words(), tmp_path)
