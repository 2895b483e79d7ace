"""Writing a Hugging Face `tokenizer.json` that gives the same ids."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinygpt.errors import DataError
from tinygpt.tokenizer._base import Tokenizer
from tinygpt.tokenizer._bpe import BPETokenizer
from tinygpt.tokenizer._bytes import ByteTokenizer
from tinygpt.tokenizer._files import replace_file
from tinygpt.tokenizer._huggingface import byte_alphabet, exact_pattern, last_step

# Two things that tiktoken's engine and Oniguruma read differently, in words that both read alike. A possessive `{m,n}+`
# is the greedy one where nothing follows in an alternative outside all groups, and `$` ends the text, not a line.
_POSSESSIVE_LAST = re.compile(r"(\{\d+(?:,\d*)?\})\+(?=\||$)")
_LITERALS = re.compile(r"\\.|\[[^\]]*\]")
_END = re.compile(r"(?<!\\)\$(?=\||$)")
_END_FOR_BOTH = r"(?![\s\S])"


def save_tokenizer_json(tokenizer: Tokenizer, path: str | os.PathLike[str]) -> None:
    """Write a `tokenizer.json` for Hugging Face's `tokenizers` and `transformers`, with the same ids for every text.

    Special tokens keep their ids. As usual there, a special token spelled out in text becomes its id, where
    `encode` leaves it plain characters; nothing is added around a text.

    Args:
        tokenizer: A `BPETokenizer` or a `ByteTokenizer`.
        path: The file to write, or a folder to write `tokenizer.json` into.

    Raises:
        DataError: If the tokenizer is of another class, or its split pattern or ranks have no exact counterpart.

    References:
        [tokenizers](https://github.com/huggingface/tokenizers): the merges are derived from the ranks, each being the
        last step of merging a token by the ranks below its own.

    Example:
        ```python
        from tinygpt.tokenizer import ByteTokenizer, save_tokenizer_json

        save_tokenizer_json(ByteTokenizer(), "tokenizer.json")
        ```
    """
    path = Path(path)
    path = path / "tokenizer.json" if path.is_dir() else path
    content = json.dumps(_document(tokenizer), ensure_ascii=False, indent=1) + "\n"
    replace_file(path, content.encode("utf-8"))


def _document(tokenizer: Tokenizer) -> dict[str, Any]:
    by_byte = {byte: character for character, byte in byte_alphabet().items()}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    # Not isinstance: a subclass may encode otherwise.
    if type(tokenizer) is ByteTokenizer:
        ranks = {bytes([byte]): byte for byte in range(256)}
        pre_tokenizer = {**byte_level, "use_regex": True}  # where text is cut makes no difference without merges
    elif type(tokenizer) is BPETokenizer:
        ranks = tokenizer.ranks
        split = {"pattern": {"Regex": _pattern_for_both(tokenizer.pattern)}, "behavior": "Isolated", "invert": False}
        steps = [{"type": "Split", **split}, {**byte_level, "use_regex": False}]
        pre_tokenizer = {"type": "Sequence", "pretokenizers": steps}
    else:
        raise DataError(
            f"a {type(tokenizer).__name__} has no exact tokenizer.json; only BPETokenizer and ByteTokenizer do. "
            "Write the file with the tokenizers library, from what you know of yours."
        )
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token_id, "content": text, "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for text, token_id in tokenizer.special_tokens.items()
        ],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {_spell(token, by_byte): rank for token, rank in ranks.items()},
            "merges": _merges(ranks, by_byte),
        },
    }


def _pattern_for_both(pattern: str) -> str:
    """Return the pattern in words that both engines read alike.

    Raises:
        DataError: If it holds something else that they do not.
    """

    def greedy(match: re.Match[str]) -> str:
        before = _LITERALS.sub("", pattern[: match.start()])
        return match[0] if before.count("(") > before.count(")") else match[1]

    translated = _END.sub(lambda _: _END_FOR_BOTH, _POSSESSIVE_LAST.sub(greedy, pattern))
    if unknown := exact_pattern(translated):
        raise DataError(
            f"the split pattern has {unknown!r}, which Oniguruma, the engine of tokenizers, may read differently; "
            "train with the default pattern to export."
        )
    return translated


def _merges(ranks: Mapping[bytes, int], by_byte: Mapping[int, str]) -> list[list[str]]:
    """Return the merges in order: each token is made of the two parts that the ranks below its own leave."""
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) > 1:
            parts = last_step(token, ranks)
            if len(parts) != 2:
                raise DataError(
                    f"the token {token!r} is not made of two others, so no list of merges gives the same ids; "
                    "vocabularies of train_bpe always are."
                )
            merges.append([_spell(part, by_byte) for part in parts])
    return merges


def _spell(token: bytes, by_byte: Mapping[int, str]) -> str:
    return "".join(by_byte[byte] for byte in token)
