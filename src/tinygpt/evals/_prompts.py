"""From the items of a task to rows of tokens, each with the place where scoring starts."""

import random
from collections.abc import Sequence
from typing import Any

from tinygpt.evals._bundle import EvalItem, EvalTask
from tinygpt.evals._scoring import Row, common_prefix

# What nanochat seeds with, so that the same bundle gives the same prompts.
_FEWSHOT_SEED = 1234


def render(task: EvalTask, items: Sequence[EvalItem], index: int) -> list[str]:
    """Return the texts of an item after its few-shot examples.

    One text a choice or a context option; for language modelling the text without and with the continuation.
    The examples are drawn from all other items by a generator seeded with the index of the item.
    """
    shots = random.Random(_FEWSHOT_SEED + index).sample(
        [other for other in range(len(items)) if other != index], task.num_fewshot
    )
    item = items[index].fields
    before = "".join(f"{_answered(task, items[shot].fields)}\n\n" for shot in shots)
    if task.kind == "multiple_choice":
        return [f"{before}{item['query']}{task.delimiter}{choice}" for choice in item["choices"]]
    if task.kind == "schema":
        return [f"{before}{context}{task.delimiter}{item['continuation']}" for context in item["context_options"]]
    prompt = f"{before}{item['context'].strip()}{task.delimiter}"
    # Tokenizers join a space with the word after it, so the text without the answer must not end in one.
    return [prompt.strip(), f"{prompt}{item['continuation']}"]


def _answered(task: EvalTask, item: dict[str, Any]) -> str:
    if task.kind == "multiple_choice":
        return f"{item['query']}{task.delimiter}{item['choices'][item['gold']]}"
    context = item["context_options"][item["gold"]] if task.kind == "schema" else item["context"].strip()
    return f"{context}{task.delimiter}{item['continuation']}"


def to_rows(task: EvalTask, encoded: list[list[int]]) -> list[Row]:
    """Return the rows to score for the texts of one item, given as tokens that begin with `<|bos|>`.

    Choices are scored from where their tokens part, a schema over the tokens its options end in alike, and language
    modelling from where the text with the continuation goes beyond the one without.
    """
    if task.kind == "language_modeling":
        return [Row(encoded[1], min(common_prefix(encoded), len(encoded[1]) - 1))]
    if task.kind == "schema":
        suffix = common_prefix([tokens[::-1] for tokens in encoded])
        return [Row(tokens, max(1, len(tokens) - suffix)) for tokens in encoded]
    # A choice that others begin with still has its last token scored.
    start = min(common_prefix(encoded), min(map(len, encoded)) - 1)
    return [Row(tokens, start) for tokens in encoded]


def crop(row: Row, max_tokens: int) -> Row | None:
    """Return the last tokens of a row, as many as fit, or None if what is scored, and one token before, do not."""
    excess = max(0, len(row.tokens) - max_tokens)
    return Row(row.tokens[excess:], row.start - excess) if row.start > excess else None
