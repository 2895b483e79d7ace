"""The example that trains on the reader's text: from files to text again, stopped, killed, and gone on with."""

import subprocess
import sys
from pathlib import Path

import pytest

from tinygpt.checkpoint import latest_checkpoint
from tinygpt.data import TokenShards, ValidationSet
from tinygpt.metrics import read_metrics

EXAMPLE = Path(__file__).parent.parent / "examples" / "train_on_your_text.py"
TINY = ["--vocab-size", "300", "--depth", "1", "--seq-len", "32", "--rows", "2"]
PARAGRAPHS = [f"Whale number {n} swam past the ship, and nobody on board said a word about it." for n in range(60)]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLE), *TINY, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def losses(out: Path) -> dict[int, float]:
    steps = [record for record in read_metrics(out / "metrics.jsonl") if record["event"] == "step"]
    return {record["step"]: record["loss"] for record in steps}


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "books").mkdir()
    for number in range(3):
        part = PARAGRAPHS[20 * number : 20 * number + 20]
        (tmp_path / "books" / f"{number}.txt").write_text("\n\n".join(part), "utf-8", newline="\n")
    return "books"


def test_text_becomes_a_model_and_the_same_command_goes_on(tmp_path: Path, text: str) -> None:
    arguments = (text, "--separator", r"\n\n", "--held-out", "0.2", "--out", "run", "--pictures")
    first = run(tmp_path, *arguments, "--steps", "4")
    assert first.returncode == 0, first.stderr
    out = tmp_path / "run"
    validation, shards = ValidationSet.load(out / "validation.safetensors"), TokenShards(out / "tokens")
    assert shards.num_bytes + validation.num_bytes == sum(len(paragraph) for paragraph in PARAGRAPHS)
    for picture in ("documents", "tokenizer", "packing"):
        assert (out / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    assert "bits per byte" in first.stdout
    assert "tokenizing:" in first.stdout
    assert "100%" in first.stderr
    written = losses(out)

    again = run(tmp_path, *arguments, "--steps", "4")
    assert again.returncode == 0, again.stderr
    assert losses(out) == written  # nothing was left to do
    assert again.stdout.split("\n\n")[-1] == first.stdout.split("\n\n")[-1]  # the model writes the same
    assert latest_checkpoint(out / "checkpoints") == out / "checkpoints" / "step-000004"


def test_another_run_in_the_same_folder_and_a_missing_file_are_errors_in_one_line(tmp_path: Path, text: str) -> None:
    missing = run(tmp_path, "absent.txt")
    assert missing.returncode == 1
    assert missing.stderr.startswith("error: ")
    assert "absent.txt" in missing.stderr
    assert "Traceback" not in missing.stderr
    arguments = (text, "--separator", r"\n\n", "--held-out", "0.2", "--out", "run", "--steps", "1")
    assert run(tmp_path, *arguments).returncode == 0
    other = run(tmp_path, *arguments, "--seed", "1")
    assert other.returncode == 1
    assert other.stderr.startswith("error: ")


def test_help_says_how_to_begin() -> None:
    finished = subprocess.run([sys.executable, str(EXAMPLE), "--help"], capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0
    assert all(word in finished.stdout for word in ("--separator", "--pictures", "Ctrl-C", "books/"))
