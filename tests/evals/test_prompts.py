"""Prompts written out by hand, and where scoring starts in them."""

import pytest

from tinygpt.evals import EvalItem, EvalTask
from tinygpt.evals._prompts import crop, render, to_rows
from tinygpt.evals._scoring import Row


def task(kind: str, shots: int = 0, delimiter: str = " ") -> EvalTask:
    return EvalTask("t", kind, "t.jsonl", shots, delimiter, 0.0, False)  # type: ignore[arg-type]


def items(*fields: dict[str, object]) -> list[EvalItem]:
    return [EvalItem(item, f"line {number}") for number, item in enumerate(fields)]


def test_prompts_of_each_kind() -> None:
    questions = items(
        {"query": "Q1", "choices": ["yes", "no"], "gold": 1}, {"query": "Q2", "choices": ["up", "down"], "gold": 0}
    )
    assert render(task("multiple_choice", 1, ": "), questions, 0) == ["Q2: up\n\nQ1: yes", "Q2: up\n\nQ1: no"]
    schemas = items(
        {"context_options": ["a ", "b"], "continuation": "x", "gold": 0},
        {"context_options": ["c", "d"], "continuation": "y", "gold": 1},
    )
    assert render(task("schema", 1), schemas, 1) == ["a  x\n\nc y", "a  x\n\nd y"]
    texts = items({"context": " one ", "continuation": "two"}, {"context": "three\n", "continuation": "four"})
    assert render(task("language_modeling", 1), texts, 0) == ["three four\n\none", "three four\n\none two"]


def test_examples_are_other_items_and_the_same_every_time() -> None:
    texts = items(*({"context": f"c{number}", "continuation": "x"} for number in range(20)))
    prompts = [render(task("language_modeling", 5), texts, index)[1] for index in range(20)]
    assert prompts == [render(task("language_modeling", 5), texts, index)[1] for index in range(20)]
    for index, prompt in enumerate(prompts):
        shown = [part.split()[0] for part in prompt.split("\n\n")]
        assert shown[-1] == f"c{index}"
        assert len(set(shown)) == 6
    assert len({prompt.split("\n\n")[0] for prompt in prompts}) > 5


@pytest.mark.parametrize(
    ("kind", "encoded", "starts"),
    [
        ("multiple_choice", [[9, 1, 2, 3], [9, 1, 4]], [2, 2]),
        ("multiple_choice", [[9, 1], [9, 1, 4]], [1, 1]),  # one choice begins another: its last token is scored
        ("multiple_choice", [[9, 1, 2], [9, 1, 2]], [2, 2]),
        ("schema", [[9, 1, 5, 6], [9, 2, 3, 5, 6]], [2, 3]),
        ("schema", [[9, 5, 6], [9, 5, 6]], [1, 1]),  # <|bos|> is never scored
        ("language_modeling", [[9, 1, 2], [9, 1, 2, 3, 4]], [3]),
        ("language_modeling", [[9, 1, 2], [9, 1, 7, 4]], [2]),  # the answer joins the prompt's last token
    ],
)
def test_scoring_starts_where_the_texts_part(kind: str, encoded: list[list[int]], starts: list[int]) -> None:
    rows = to_rows(task(kind), encoded)
    assert [row.start for row in rows] == starts
    assert [row.tokens for row in rows] == (encoded[1:] if kind == "language_modeling" else encoded)


def test_cropping_keeps_the_end() -> None:
    assert crop(Row([9, 1, 2, 3, 4], 3), 10) == Row([9, 1, 2, 3, 4], 3)
    assert crop(Row([9, 1, 2, 3, 4], 3), 3) == Row([2, 3, 4], 1)
    assert crop(Row([9, 1, 2, 3, 4], 3), 2) is None
