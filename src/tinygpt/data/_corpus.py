"""The public-domain text that comes with the package."""

import re
from importlib.resources import files
from typing import Literal

from tinygpt.data._documents import TextDocuments
from tinygpt.errors import DataError

# Few enough to leave 92 % for training, spread over the book so that both parts have the same style and subjects.
_VALIDATION_EVERY = 12


def embedded_corpus(split: Literal["train", "validation"] = "train") -> TextDocuments:
    """Return one part of *Moby-Dick*, a document a chapter: enough real English to see a small model learn.

    The text is in the public domain; `corpus/SOURCE.md` in this package names its source and licence. Every 12th
    chapter is validation: 11 documents, 105 kB, against 124, 1.1 MB, for training. Chapters are far longer than
    a row, so pack them with `overflow="carry"`: cropping would keep only their first lines.

    Args:
        split: `"train"` or `"validation"`.

    Raises:
        DataError: If `split` is neither.

    Example:
        ```python
        from tinygpt.data import embedded_corpus

        source = embedded_corpus("train")
        text, _ = next(source.read())
        text[:20]  # 'CHAPTER 1. Loomings.'
        ```
    """
    if split not in ("train", "validation"):
        raise DataError(f"split={split!r} is not a part of the corpus; choose 'train' or 'validation'.")
    text = (files("tinygpt.data") / "corpus" / "moby_dick.txt").read_text(encoding="utf-8")
    chapters = re.split(r"^(?=CHAPTER \d+\. )", text, flags=re.MULTILINE)[1:]
    wanted = split == "validation"
    return TextDocuments(
        [
            chapter.strip()
            for number, chapter in enumerate(chapters, start=1)
            if (number % _VALIDATION_EVERY == 0) == wanted
        ]
    )
