"""Reading a Hugging Face `tokenizer.json` where it means exactly what our byte-pair encoding does."""

import json
import os
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from tinygpt.errors import DataError
from tinygpt.tokenizer._base import BOS_TOKEN, CHAT_TOKENS
from tinygpt.tokenizer._bpe import BPETokenizer
from tinygpt.tokenizer._files import read_limited
from tinygpt.tokenizer._tiktoken import TIKTOKEN_PATTERNS

# Vocabularies of 260 k entries with their merges take 35 MB.
_MAX_BYTES = 128 << 20

# What means the same to Oniguruma, which tokenizers uses, and to tiktoken's engine. Left out on purpose: `$`, which
# is the end of a line to one and of the text to the other; `{1,3}+`, repeated to one and possessive to the other; and
# ignoring case in general, where one also knows foldings of two letters into one.
_IN_CLASS = r"\\[sSrnt]|\\[pP]\{\w+\}|[^\\\[\]&^-]"
_SUFFIX = r"'?(?:\[sdmt\]|s|t|re|ve|m|ll|d)"
_PATTERN = re.compile(
    rf"""(?: \(\?i:{_SUFFIX}(?:\|{_SUFFIX})*\)
           | \(\?:|\(\?!|\)|\|
           | \[\^?(?:{_IN_CLASS})+\]
           | \\[sSrnt]|\\[pP]\{{\w+\}}|[\w'/_,;:<>=!@\#%"~`-]|\x20
         )(?:[?*+]\+?|\{{\d+(?:,\d*)?\}})?""",
    re.VERBOSE,
)

# The model's settings that would change ids, and the values that do not.
_HARMLESS = {
    "dropout": (None, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (False, None),
}


def load_tokenizer_json(path: str | os.PathLike[str]) -> BPETokenizer:
    """Read a Hugging Face `tokenizer.json` that holds a byte-level byte-pair encoding.

    Only what maps exactly is accepted: every text gets the ids that `tokenizers` gives it without special tokens. Two
    differences are meant: special tokens spelled out in text stay plain characters here, and what a post-processor
    adds around a text is not added. Special tokens keep their ids, and ours (`<|bos|>`, chat) follow if they are not
    among them.

    Args:
        path: The file, or a folder with a `tokenizer.json` in it.

    Raises:
        DataError: If the file cannot be read or is no `tokenizer.json`, or for the reason why it cannot be mapped:
            another model than BPE, a normalizer, a pre-tokenizer without counterpart, merges out of order, ids that
            would change, or added tokens that are cut out of plain text.

    References:
        [tokenizers](https://github.com/huggingface/tokenizers). There a pair is joined if it is in the list of merges,
        here if the joined bytes have a rank. Both are the same if each merge is the last step of merging its own
        result by the ranks below it, which is checked for every one.

    Example:
        ```python no-run: needs the file
        from tinygpt.tokenizer import load_tokenizer_json

        tokenizer = load_tokenizer_json("gpt2/tokenizer.json")
        ```
    """
    path = Path(path)
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        fields = json.loads(read_limited(path, _MAX_BYTES, "give a tokenizer.json or its folder"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not valid JSON: {error}.") from None
    try:
        pattern = _pattern(fields.get("normalizer"), fields.get("pre_tokenizer"))
        special = _special_tokens(fields.get("added_tokens") or [])
        ranks = _ranks(fields["model"], special)
    except _NoMatchError as reason:
        raise DataError(f"{path} cannot be mapped exactly: {reason}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a tokenizer.json as tokenizers writes it: {error!r}.") from None
    texts = sorted(special, key=special.__getitem__)
    ours = [token for token in (BOS_TOKEN, *CHAT_TOKENS) if token not in special]
    return BPETokenizer(ranks, pattern=pattern, special_tokens=[*texts, *ours])


class _NoMatchError(Exception):
    """Why a file cannot be mapped."""


def _pattern(normalizer: Any, pre_tokenizer: Any) -> str:
    """Return the split pattern."""
    if normalizer is not None and normalizer != {"type": "Sequence", "normalizers": []}:
        raise _NoMatchError(f"its normalizer {normalizer.get('type')} changes text before it is encoded.")
    if pre_tokenizer is None:
        raise _NoMatchError("it has no pre-tokenizer, so merges cross words.")
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    kinds = [step["type"] for step in steps]
    if kinds[-1:] != ["ByteLevel"] or kinds[:-1] not in ([], ["Split"]):
        raise _NoMatchError(f"its pre-tokenizer is {' then '.join(kinds)}; ByteLevel, or Split then ByteLevel, map.")
    if steps[-1].get("add_prefix_space", True):
        raise _NoMatchError("its ByteLevel pre-tokenizer adds a space before a text (add_prefix_space).")
    own_regex = steps[-1].get("use_regex", True)
    if len(steps) == 1:
        if not own_regex:
            raise _NoMatchError("its ByteLevel pre-tokenizer does not cut text, so merges cross words.")
        return TIKTOKEN_PATTERNS["r50k_base"]
    split = steps[0]
    if own_regex:
        raise _NoMatchError("it cuts text twice, by Split and by ByteLevel with use_regex.")
    if split.get("behavior") != "Isolated" or split.get("invert"):
        raise _NoMatchError(f"its Split keeps pieces as {split.get('behavior')!r}, invert={split.get('invert')}.")
    pattern = split["pattern"].get("Regex")
    if pattern is None:
        raise _NoMatchError("its Split is by a fixed text, not a regular expression.")
    if unknown := exact_pattern(pattern):
        raise _NoMatchError(f"its pattern has {unknown!r}, which engines read differently.")
    return pattern


def exact_pattern(pattern: str) -> str:
    """Return the beginning of what tiktoken's engine and Oniguruma may read differently, empty if there is nothing."""
    place = 0
    while match := _PATTERN.match(pattern, place):
        place = match.end()
    return pattern[place : place + 20]


def _special_tokens(added: list[dict[str, Any]]) -> dict[str, int]:
    """Return the special tokens by text; others would be cut out of plain text."""
    plain = [token["content"] for token in added if not token["special"]]
    if plain:
        raise _NoMatchError(f"its added tokens {plain[:5]} are not special, so they are cut out of any text.")
    return {token["content"]: token["id"] for token in added}


def _ranks(model: Mapping[str, Any], special: Mapping[str, int]) -> dict[bytes, int]:
    """Return bytes to id, after checking that merging by ranks is what the model does."""
    if model["type"] != "BPE":
        raise _NoMatchError(f"its model is {model['type']}; only BPE maps.")
    for name, values in _HARMLESS.items():
        if model.get(name) not in values:
            raise _NoMatchError(f"its model has {name}={model[name]!r}.")
    alphabet = byte_alphabet()
    ranks = {_bytes(token, alphabet): rank for token, rank in model["vocab"].items() if token not in special}
    if sorted([*ranks.values(), *special.values()]) != list(range(len(ranks) + len(special))) or (
        special and min(special.values()) < len(ranks)
    ):
        raise _NoMatchError(
            "its ids must be 0 without gaps, first those of text and then those of special tokens; others would change."
        )
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    pairs = [(_bytes(first, alphabet), _bytes(second, alphabet)) for first, second in merges]
    absent = next((first + second for first, second in pairs if first + second not in ranks), None)
    if absent is not None:
        raise _NoMatchError(f"the result {absent!r} of a merge is not in its vocabulary.")
    order = [ranks[first + second] for first, second in pairs]
    if any(rank >= following for rank, following in pairwise(order)):
        raise _NoMatchError("the ids of its merges are not in the order of the merges.")
    made = {first + second for first, second in pairs}
    unmerged = [token for token in ranks if len(token) > 1 and token not in made]
    if unmerged:
        raise _NoMatchError(f"its vocabulary holds {unmerged[0]!r}, which no merge makes.")
    for first, second in pairs:
        if last_step(first + second, ranks) != [first, second]:
            raise _NoMatchError(f"merging {first + second!r} by ranks does not end with {first!r} and {second!r}.")
    return ranks


def last_step(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """Return the parts a token is in when only ranks below its own were merged."""
    parts = [bytes([byte]) for byte in token]
    rank = ranks[token]
    while True:
        found = [(ranks.get(a + b, rank), place) for place, (a, b) in enumerate(pairwise(parts))]
        lowest, place = min(found, default=(rank, 0))
        if lowest >= rank:
            return parts
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for.

    Printable characters of Latin-1 stand for themselves, the other bytes for characters from U+0100 on, in order.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


def _bytes(token: str, alphabet: Mapping[str, int]) -> bytes:
    try:
        return bytes(alphabet[character] for character in token)
    except KeyError as error:
        raise _NoMatchError(f"its token {token!r} holds {error}, which stands for no byte.") from None
