import re
import shlex
from pathlib import Path

import pytest

from tinygpt.cli import main
from tinygpt.data import TokenShards, embedded_corpus
from tinygpt.tokenizer import train_bpe

GUIDE = Path(__file__).parent.parent.parent / "docs" / "guides" / "data.md"


def test_the_commands_of_the_guide_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("books").mkdir()
    Path("books/first.txt").write_text("A whale is a mammal.\n\nA ship is not.\n\n" * 50)
    train_bpe(embedded_corpus("validation"), vocab_size=300).save("tokenizer")
    commands = re.findall(r"^tinygpt (.*)$", GUIDE.read_text("utf-8"), re.MULTILINE)
    assert commands
    for command in commands:
        assert main(shlex.split(command)) == 0
    assert len(TokenShards("book-tokens")) == 1
