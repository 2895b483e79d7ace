"""Byte-pair encoding through tiktoken."""

import hashlib
import os
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from tinygpt.errors import ConfigError, DataError
from tinygpt.tokenizer._base import BOS_TOKEN, CHAT_TOKENS, check_texts, refuse_ids, utf8
from tinygpt.tokenizer._files import format_ranks, write_tokenizer

SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,2}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
"""How text is cut before merging: GPT-4's published pattern, but digits in groups of at most 2 instead of 3.

A vocabulary of 32,768 entries has no room to learn a thousand three-digit groups.
"""

# Letters, digits, marks, white space, line ends and a character of each UTF-8 length: what a pattern must not drop.
_PROBE = "".join(map(chr, range(128))) + " it's aé ßЖ 中文 नि 😀\r\n\u00a0\u2028x  y\n\n"


class BPETokenizer:
    """Byte-level byte-pair encoding, run by tiktoken.

    Ids are the ranks of the byte sequences, then the special tokens, in order, at the end of the vocabulary.
    `train_bpe` makes one from text, `load_tokenizer` reads one back.

    Args:
        ranks: Byte sequence to id, ids `0 .. len(ranks) - 1` in merge order, every single byte among them.
        pattern: Regular expression that cuts text before merging. It must match every character of any text:
            tiktoken drops what it does not match.
        special_tokens: Texts of the special tokens, `<|bos|>` among them.

    Raises:
        DataError: If the ranks have gaps or lack a byte, the pattern is not valid or loses text, or the special
            tokens repeat or lack `<|bos|>`.

    References:
        Sennrich et al., [Neural Machine Translation of Rare Words with Subword Units](https://arxiv.org/abs/1508.07909),
        2016; on bytes: Radford et al., GPT-2, 2019. The default pattern is `cl100k_base` of
        [tiktoken](https://github.com/openai/tiktoken) with `{1,2}` for digits.
    """

    def __init__(
        self,
        ranks: Mapping[bytes, int],
        *,
        pattern: str = SPLIT_PATTERN,
        special_tokens: Sequence[str] = (BOS_TOKEN, *CHAT_TOKENS),
    ) -> None:
        import tiktoken  # here, because most of the library needs no tokenizer

        if not isinstance(pattern, str):
            raise ConfigError(f"pattern={pattern!r} is no regular expression; give a str such as SPLIT_PATTERN.")
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise DataError(f"the {len(ranks)} ranks must be 0 to {len(ranks) - 1}, each once.")
        absent = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if absent:
            raise DataError(f"the ranks lack {len(absent)} of the 256 single bytes, the first is {absent[0]}.")
        if BOS_TOKEN not in special_tokens or len(set(special_tokens)) != len(special_tokens):
            raise DataError(f"special tokens must include {BOS_TOKEN} and not repeat, got {list(special_tokens)}.")
        self._ranks = dict(ranks)
        self._pattern = pattern
        self._special_tokens = {token: len(ranks) + index for index, token in enumerate(special_tokens)}
        try:
            self._encoding = tiktoken.Encoding(
                "tinygpt", pat_str=pattern, mergeable_ranks=self._ranks, special_tokens=self._special_tokens
            )
        except ValueError as error:
            raise DataError(f"the split pattern is not a valid regular expression: {error}") from None
        try:
            kept = self._encoding.decode_bytes(self._encoding.encode_ordinary(_PROBE))
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of tiktoken's Rust, which is no Exception
                raise
            raise DataError(
                f"the split pattern {pattern!r} can match nothing at all, which ends tiktoken in a panic; let each "
                "alternative match at least one character: + instead of *."
            ) from None
        if kept != _PROBE.encode():
            raise DataError(
                f"the split pattern {pattern!r} does not match every character, and what it does not match would be "
                r"lost; end it with an alternative that matches anything, such as |\s|\S."
            )

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special tokens included."""
        return len(self._ranks) + len(self._special_tokens)

    @property
    def bos_token_id(self) -> int:
        """Id of `<|bos|>`."""
        return self._special_tokens[BOS_TOKEN]

    @property
    def ranks(self) -> dict[bytes, int]:
        """Id of each byte sequence, in merge order."""
        return dict(self._ranks)

    @property
    def pattern(self) -> str:
        """Regular expression that cuts text before merging."""
        return self._pattern

    @property
    def special_tokens(self) -> dict[str, int]:
        """Id of each special token by its text."""
        return dict(self._special_tokens)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text; special tokens spelled out in it stay plain characters.

        Raises:
            DataError: If the text holds a surrogate, which has no UTF-8 form.
        """
        utf8(text)  # tiktoken would put U+FFFD in its place
        return self._encoding.encode_ordinary(text)

    def encode_array(self, text: str) -> npt.NDArray[np.uint32]:
        """Return `encode` as an array, `(tokens,)` uint32, in half the time and without holding Python's lock.

        Raises:
            DataError: If the text holds a surrogate, which has no UTF-8 form.
        """
        utf8(text)
        return self._encoding.encode_to_numpy(text, disallowed_special=())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return `encode` of every text, on as many threads as there are cores, at most 8."""
        check_texts(texts)
        for text in texts:
            utf8(text)
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=min(8, os.cpu_count() or 1))

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
        try:
            return self._encoding.decode_bytes(token_ids)
        except (KeyError, OverflowError):
            raise refuse_ids(token_ids, self.vocab_size) from None

    def token_bytes(self) -> list[int]:
        """Return how many bytes each token id stands for, 0 for special tokens."""
        by_rank = sorted(self._ranks.items(), key=lambda item: item[1])
        return [len(token) for token, _ in by_rank] + [0] * len(self._special_tokens)

    def fingerprint(self) -> str:
        """Return a SHA-256 hex digest of ranks, pattern and special tokens."""
        digest = hashlib.sha256(format_ranks(self._ranks))
        digest.update(repr(("bpe", 1, self._pattern, sorted(self._special_tokens.items()))).encode())
        return digest.hexdigest()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `tokenizer.tiktoken` and `tokenizer_config.json` into a folder."""
        write_tokenizer(
            folder,
            kind="bpe",
            special_tokens=self._special_tokens,
            pattern=self._pattern,
            ranks=format_ranks(self._ranks),
        )
