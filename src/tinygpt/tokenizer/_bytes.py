"""One token a byte: no training, no files, no dependency."""

import hashlib
import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tinygpt.tokenizer._base import BOS_TOKEN, check_texts, refuse_ids, utf8
from tinygpt.tokenizer._files import write_tokenizer

_BOS_ID = 256


class ByteTokenizer:
    """Every UTF-8 byte is a token; id 256 is `<|bos|>`.

    For tests, demonstrations and tiny models: nothing to train, but sequences are 3 to 5 times longer than
    with a trained vocabulary.

    References:
        Xue et al., [ByT5](https://arxiv.org/abs/2105.13626), 2022. ByT5 puts its special tokens before the bytes;
        here a byte's id is its value.

    Example:
        ```python
        from tinygpt.tokenizer import ByteTokenizer

        tokenizer = ByteTokenizer()
        tokenizer.encode("hé")  # [104, 195, 169]
        ```
    """

    @property
    def vocab_size(self) -> int:
        """257: the bytes and `<|bos|>`."""
        return _BOS_ID + 1

    @property
    def bos_token_id(self) -> int:
        """256."""
        return _BOS_ID

    @property
    def special_tokens(self) -> dict[str, int]:
        """Id of each special token by its text."""
        return {BOS_TOKEN: _BOS_ID}

    def encode(self, text: str) -> list[int]:
        """Return the UTF-8 bytes of a text as ids.

        Raises:
            DataError: If the text holds a surrogate, which has no UTF-8 form.
        """
        return list(utf8(text))

    def encode_array(self, text: str) -> npt.NDArray[np.uint32]:
        """Return `encode` as an array, `(tokens,)` uint32.

        Raises:
            DataError: If the text holds a surrogate, which has no UTF-8 form.
        """
        return np.frombuffer(utf8(text), dtype=np.uint8).astype(np.uint32)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return `encode` of every text."""
        check_texts(texts)
        return [self.encode(text) for text in texts]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids; bytes that are not UTF-8 become U+FFFD.

        Raises:
            DataError: If an id is outside the vocabulary.
        """
        return self.decode_bytes(token_ids).decode("utf-8", errors="replace")

    def decode_bytes(self, token_ids: Sequence[int]) -> bytes:
        """Return the exact bytes of token ids.

        Raises:
            DataError: If an id is outside the vocabulary.
        """
        token_ids = list(token_ids)  # bytes() of an array would be its memory
        try:
            if _BOS_ID not in token_ids:
                return bytes(token_ids)
            return b"".join(BOS_TOKEN.encode() if i == _BOS_ID else bytes([i]) for i in token_ids)
        except ValueError:
            raise refuse_ids(token_ids, self.vocab_size) from None

    def token_bytes(self) -> list[int]:
        """Return 1 for every byte and 0 for `<|bos|>`."""
        return [1] * _BOS_ID + [0]

    def fingerprint(self) -> str:
        """Return a SHA-256 hex digest that is the same for every `ByteTokenizer`."""
        return hashlib.sha256(b"tinygpt byte tokenizer, version 1, bos 256").hexdigest()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `tokenizer_config.json` into a folder."""
        write_tokenizer(folder, kind="byte", special_tokens=self.special_tokens)
