"""The words of the terminal follow the library's: a message that is reworded there must be so in the list as well."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tinygpt.cli import _words

SOURCE = Path(_words.__file__).parents[1]


def texts() -> Iterator[str]:
    """Return every string of the library outside the command line, with a number or a quoted one for each value."""
    for path in SOURCE.rglob("*.py"):
        if path.parent.name == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                for value in ("0.1", "'0.1'"):
                    parts = (part.value if isinstance(part, ast.Constant) else value for part in node.values)
                    yield "".join(str(part) for part in parts)


@pytest.fixture(scope="module")
def library() -> str:
    return "\n".join(texts())


@pytest.mark.parametrize("said", [said for said, _ in _words._TYPED])
def test_every_phrase_that_is_replaced_is_one_the_library_says(said: str, library: str) -> None:
    assert re.search(said, library)


def test_a_plan_is_broken_between_words_at_a_terminal_and_left_alone_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "memory    about 348 MiB: weights 13, gradients 1, optimizer 15\n    lr     0.001    0.01"
    assert _words.fitted(text) == text
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    first, second, rates = _words.fitted(text).splitlines()
    assert (first, second) == ("memory    about 348 MiB: weights 13,", "          gradients 1, optimizer 15")
    assert rates == text.splitlines()[1]
