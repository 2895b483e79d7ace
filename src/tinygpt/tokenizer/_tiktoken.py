"""Reading tiktoken's own vocabulary files."""

import os
from pathlib import Path
from types import MappingProxyType

from tinygpt.errors import DataError
from tinygpt.tokenizer._bpe import BPETokenizer
from tinygpt.tokenizer._files import MAX_RANKS_BYTES, parse_ranks, read_limited

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

TIKTOKEN_PATTERNS = MappingProxyType(
    {
        "r50k_base": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
        "cl100k_base": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
        "o200k_base": rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    }
)
"""How tiktoken's vocabularies cut text before merging, by name. `r50k_base` is GPT-2's and GPT-3's."""


def load_tiktoken(path: str | os.PathLike[str], *, pattern: str | None = None) -> BPETokenizer:
    """Read a vocabulary file of tiktoken: `r50k_base.tiktoken`, `cl100k_base.tiktoken`, `o200k_base.tiktoken`.

    Text gets the ids that `tiktoken.encode_ordinary` gives. Special tokens are ours, `<|bos|>` and those for chat, and
    take the ids after the ranks; `<|endoftext|>` is not among them, as text never holds special tokens here.

    Args:
        path: The file: `base64(token) rank`, one a line.
        pattern: A name in `TIKTOKEN_PATTERNS`, or a regular expression; the file does not hold it. None takes the
            name from the file's.

    Raises:
        DataError: If the file cannot be read or is no such file, its ranks have gaps (those of `p50k_base` do), or
            no pattern is known for its name.

    References:
        [tiktoken](https://github.com/openai/tiktoken), whose patterns these are.

    Example:
        ```python no-run: needs the file
        from tinygpt.tokenizer import load_tiktoken

        tokenizer = load_tiktoken("cl100k_base.tiktoken")
        tokenizer.save("tokenizer")
        ```
    """
    path = Path(path)
    known = ", ".join(TIKTOKEN_PATTERNS)
    if pattern is None and path.stem not in TIKTOKEN_PATTERNS:
        raise DataError(f"no pattern is known for a file named {path.name}; give pattern, one of {known} or your own.")
    name = path.stem if pattern is None else pattern
    content = read_limited(path, MAX_RANKS_BYTES, "give the file itself")
    return BPETokenizer(parse_ranks(content, path), pattern=TIKTOKEN_PATTERNS.get(name, name))
