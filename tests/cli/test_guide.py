import re
import shlex
import subprocess
import sys
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


def test_the_examples_the_guide_starts_run_at_a_small_scale(tmp_path: Path) -> None:
    commands = re.findall(r"^python examples/(.*)$", GUIDE.read_text("utf-8"), re.MULTILINE)
    assert commands
    for command in commands:
        script, *arguments = shlex.split(command)
        small = ["--steps", "2", "--depth", "1", "--seq-len", "64", "--rows", "2", "--vocab-size", "300"]
        finished = subprocess.run(
            [sys.executable, str(GUIDE.parents[2] / "examples" / script), *arguments, *small],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert finished.returncode == 0, finished.stderr
        pictures = set(re.findall(r"\.\./assets/(.*\.png)", GUIDE.read_text("utf-8")))
        assert pictures
        assert pictures <= {path.name for path in (tmp_path / "runs" / "text").iterdir()}
