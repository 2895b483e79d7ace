"""The ablation repeats no finished run."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "ablation.py"


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = ["--work", str(folder / "work"), "--results", str(folder / "results")]
    command = [sys.executable, str(SCRIPT), "--quick", *paths, "--variants", "no smear", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_a_study_that_was_cut_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    first = run(tmp_path)
    assert first.returncode == 0, first.stderr
    finished = tmp_path / "work" / "finished"
    kept, lost = finished / "standard-seed0.json", finished / "no-smear-seed0.json"
    before = json.loads(lost.read_text("utf-8"))
    lost.unlink()
    marked = json.loads(kept.read_text("utf-8")) | {"bpb": 1.5}  # a value that no training gives
    kept.write_text(json.dumps(marked), "utf-8")

    second = run(tmp_path)
    assert second.returncode == 0, second.stderr
    assert "2 runs of 2 steps, 1 of them finished before" in second.stdout
    assert json.loads(lost.read_text("utf-8")) == before  # the seed repeats a run exactly
    rows = json.loads((tmp_path / "results" / "ablation-quick.json").read_text("utf-8"))["rows"]
    assert rows[0]["bpb"] == [1.5]
    assert rows[1]["change_bpb"] == before["bpb"] - 1.5
