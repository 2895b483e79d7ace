"""Documents as long as those of the web: lognormal lengths, cut from the embedded book."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tinygpt.data import JsonLines, embedded_corpus

_BLOCK_BYTES = 64_000_000


def lengths(count: int, median: float, seed: int = 0) -> list[int]:
    """Return lognormal lengths with sigma 1.1: the mean is 1.8 times the median, one in a hundred 13 times."""
    draws = np.random.default_rng(seed).lognormal(np.log(median), 1.1, count)
    return [max(1, int(draw)) for draw in draws]


def web_like_texts(num_bytes: int, seed: int = 0) -> Iterator[str]:
    """Yield documents of a median of 2,000 characters until they have so many."""
    book = "\n".join(text for text, _ in embedded_corpus().read())
    starts = np.random.default_rng(seed + 1)
    while num_bytes > 0:
        for length in lengths(4096, 2000, seed):
            start = int(starts.integers(len(book) - min(length, len(book) // 2)))
            text = book[start : start + min(length, len(book) // 2)]
            yield text
            num_bytes -= len(text)
            if num_bytes <= 0:
                return
        seed += 2


def write_jsonl(path: Path, num_bytes: int) -> JsonLines:
    """Write such documents as JSON lines; a large corpus repeats 64 MB of them."""
    texts = web_like_texts(min(num_bytes, _BLOCK_BYTES))
    block = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(max(1, round(num_bytes / _BLOCK_BYTES))):
            file.write(block)
    return JsonLines(path)
