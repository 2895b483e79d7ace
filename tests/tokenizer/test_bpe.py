from itertools import pairwise

import pytest

from tinygpt.errors import DataError
from tinygpt.tokenizer import BOS_TOKEN, CHAT_TOKENS, BPETokenizer

BYTES = {bytes([byte]): byte for byte in range(256)}


def _merge_by_hand(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Byte-pair encoding as its papers put it: join the neighbours of lowest rank until none can be joined."""
    parts = [bytes([byte]) for byte in word]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_merges_follow_the_ranks() -> None:
    ranks = {**BYTES, b"ab": 256, b"bc": 257, b"abc": 258, b"cab": 259, b"aa": 260}
    tokenizer = BPETokenizer(ranks)
    for word in ["abc", "bcab", "aabcabc", "cabcab", "aaaa", "xyz"]:
        assert tokenizer.encode(word) == _merge_by_hand(word.encode(), ranks)


def test_trained_words_are_encoded_as_merging_by_hand(bpe: BPETokenizer) -> None:
    ranks = {bpe.decode_bytes([i]): i for i in range(bpe.bos_token_id)}
    for word in ["the", "ships", "whale", "sailing", "Größe"]:
        assert bpe.encode(word) == _merge_by_hand(word.encode(), ranks)


def test_special_tokens_take_the_last_ids_in_order() -> None:
    tokenizer = BPETokenizer(BYTES)
    assert list(tokenizer.special_tokens) == [BOS_TOKEN, *CHAT_TOKENS]
    assert list(tokenizer.special_tokens.values()) == list(range(256, 265))
    assert tokenizer.vocab_size == 265


def test_the_default_pattern_cuts_digits_in_groups_of_at_most_two() -> None:
    ranks = {**BYTES, b"12": 256, b"123": 257, b"34": 258, b"345": 259}
    assert BPETokenizer(ranks).encode("12345") == [256, 258, ord("5")]


def test_long_runs_of_one_character_are_encoded() -> None:
    tokenizer = BPETokenizer(BYTES)
    for character in "a ^\n1":
        assert tokenizer.decode(tokenizer.encode(character * 100_000)) == character * 100_000


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({**BYTES, b"ab": 300}, "the 257 ranks must be 0 to 256, each once"),
        ({**{k: v for k, v in BYTES.items() if v != 7}, b"ab": 7}, "lack 1 of the 256 single bytes, the first is 7"),
    ],
)
def test_ranks_with_gaps_or_without_a_byte_are_refused(ranks: dict[bytes, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        BPETokenizer(ranks)


@pytest.mark.parametrize("special", [["<|user_start|>"], [BOS_TOKEN, BOS_TOKEN], []])
def test_special_tokens_without_bos_or_repeated_are_refused(special: list[str]) -> None:
    with pytest.raises(DataError, match=r"special tokens must include <\|bos\|> and not repeat"):
        BPETokenizer(BYTES, special_tokens=special)


def test_a_broken_pattern_is_refused() -> None:
    with pytest.raises(DataError, match="the split pattern is not a valid regular expression: "):
        BPETokenizer(BYTES, pattern="(")


@pytest.mark.parametrize("pattern", [r"[a-z]+", r"\S+", r"\p{L}+|\s+"])
def test_a_pattern_that_would_lose_text_is_refused(pattern: str) -> None:
    with pytest.raises(DataError, match="does not match every character"):
        BPETokenizer(BYTES, pattern=pattern)
