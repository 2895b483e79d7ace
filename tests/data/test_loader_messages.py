"""What a newcomer does first with a loader."""

import logging
from typing import Any

import pytest

from tinygpt.data import BatchLoader, TextDocuments
from tinygpt.errors import ConfigError
from tinygpt.tokenizer import ByteTokenizer


@pytest.mark.parametrize(
    ("source", "tokenizer", "message"),
    [
        ("my.txt", ByteTokenizer(), r"source is a str; open a file or folder with open_source\(path\)"),
        (["a", "b"], ByteTokenizer(), r"source is a list; .*wrap a list of texts in TextDocuments\(texts\)"),
        (TextDocuments(["a"]), "gpt2", r"tokenizer is str; give a tokenizer such as ByteTokenizer\(\)"),
        (
            TextDocuments(["a"]),
            ByteTokenizer,
            r"tokenizer is ByteTokenizer; give a tokenizer such as ByteTokenizer\(\)",
        ),
    ],
)
def test_what_is_no_source_or_tokenizer_is_named(source: Any, tokenizer: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BatchLoader(source, tokenizer, rows=1, seq_len=4)


@pytest.mark.parametrize(("overflow", "told"), [("crop", True), ("carry", False)])
def test_text_of_which_nearly_all_is_cropped_is_said_once(
    caplog: pytest.LogCaptureFixture, overflow: Any, told: bool
) -> None:
    loader = BatchLoader(TextDocuments(["a long book " * 50]), ByteTokenizer(), rows=1, seq_len=16, overflow=overflow)
    with caplog.at_level(logging.WARNING, logger="tinygpt"):
        for _ in range(200):
            next(loader)
    assert ("of the tokens read were cropped" in caplog.text) is told
    assert caplog.text.count("cropped") <= 1
