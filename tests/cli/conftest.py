"""One run that the commands are tried on."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tinygpt.cli import main

TINY = """
num_steps = 6
batch_tokens = 128
report = false
data = { rows = 2, validation_tokens = 500 }
model = { depth = 1, head_dim = 16, width_per_layer = 16, max_seq_len = 32 }
"""


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the recipe of a run of a second."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, recipe_file: Path) -> Path:
    """Return the folder of a run that the command line trained; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", str(recipe_file), "--out", str(folder), "--quiet"]) == 0
    return folder


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Path]:
    """Run in an empty folder."""
    before = Path.cwd()
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)
