"""The pictures of the Explanation pages are drawn by one command, and each is shown on a page."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "docs" / "explanation" / "figures.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::UserWarning", str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_one_command_draws_every_picture_that_the_pages_show(tmp_path: Path) -> None:
    finished = run("--out", str(tmp_path))
    assert finished.returncode == 0, finished.stderr
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in (ROOT / "docs" / "assets" / "blocks").iterdir()}
    assert all((tmp_path / name).read_text("utf-8").rstrip().endswith("</svg>") for name in drawn)
    pages = "".join(path.read_text("utf-8") for path in (ROOT / "docs").rglob("*.md"))
    assert [name for name in drawn if f"assets/blocks/{name}" not in pages] == []


def test_an_unknown_picture_is_refused(tmp_path: Path) -> None:
    finished = run("no_such", "--out", str(tmp_path / "unused"))
    assert finished.returncode == 2
    assert "there is no picture no_such; choose of rms_norm," in finished.stderr
    assert not (tmp_path / "unused").exists()
