"""What every tokenizer can do, and the special tokens that all of ours share."""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from tinygpt.errors import DataError

BOS_TOKEN = "<|bos|>"
"""Stands before every document, in training and when sampling."""

CHAT_TOKENS = (
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
"""Marks of a conversation with a Python tool, in nanochat's order; reserved so that chat needs no new ids later."""


class Tokenizer(Protocol):
    """What the rest of the library asks of a tokenizer. Any class with these members will do.

    Special tokens exist as ids only: text that spells one out, such as `"<|bos|>"` in a web page, is encoded
    as the plain characters it is.
    """

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special tokens included; ids are `0 .. vocab_size - 1`."""

    @property
    def bos_token_id(self) -> int:
        """Id of the token that starts every document."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens.

        Raises:
            DataError: If the text holds a surrogate, which has no UTF-8 form.
        """

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return `encode` of every text, computed in parallel where the tokenizer can."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids; bytes that are not UTF-8 (a character cut in two) become U+FFFD.

        Raises:
            DataError: If an id is outside the vocabulary.
        """

    def decode_bytes(self, token_ids: Sequence[int]) -> bytes:
        """Return the exact bytes of token ids, for streaming, where a character may span several tokens.

        Raises:
            DataError: If an id is outside the vocabulary.
        """

    def token_bytes(self) -> list[int]:
        """Return how many UTF-8 bytes each token id stands for: `vocab_size` numbers, 0 for special tokens."""

    def fingerprint(self) -> str:
        """Return a SHA-256 hex digest of everything that decides which ids a text gets."""

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the tokenizer's files into a folder, which may already hold other files."""


class TextSource(Protocol):
    """Something to read texts from: every document source of `tinygpt.data` is one."""

    def read(self) -> Iterator[tuple[str, Any]]:
        """Yield each text, and something else that is passed over."""


def read_texts(texts: Iterable[str] | TextSource) -> Iterator[str]:
    """Yield texts of an iterable or a source.

    Raises:
        DataError: If `texts` is a single string.
    """
    if isinstance(texts, str):
        raise DataError("texts is one str and would be read letter by letter; give a list of texts: [text].")
    # A file can be iterated and has a `read` of its own, so iterables come first.
    yield from texts if isinstance(texts, Iterable) else (text for text, _ in texts.read())


def utf8(text: str) -> bytes:
    """Return the UTF-8 bytes of a text, refusing what has none.

    Raises:
        DataError: If `text` is no string or holds a surrogate.
    """
    if not isinstance(text, str):
        raise DataError(f"a tokenizer encodes str, got {type(text).__name__}; decode bytes first.")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text holds the surrogate U+{ord(text[error.start]):04X} at character {error.start}, which has no "
            "UTF-8 form; decode the original bytes as UTF-8, or drop the character."
        ) from None


def check_texts(texts: object) -> None:
    """Refuse a single text where a list of texts is wanted: it would be read letter by letter.

    Raises:
        DataError: If it is a str.
    """
    if isinstance(texts, str):
        raise DataError("texts is one str and would be read letter by letter; give a list: [text].")


def refuse_ids(token_ids: Sequence[int], vocab_size: int) -> DataError:
    """Return the error for ids of which at least one is outside the vocabulary."""
    bad = next((token_id for token_id in token_ids if not 0 <= token_id < vocab_size), None)
    return DataError(f"token id {bad} is outside the vocabulary; ids are 0 to {vocab_size - 1}.")
