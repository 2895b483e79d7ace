import json
from pathlib import Path

import pytest
import torch

from tinygpt import hardware
from tinygpt.errors import DataError
from tinygpt.metrics import MetricsFile, Stopwatch, gpu_name, peak_flops, peak_memory_bytes, read_metrics


def test_a_resumed_file_drops_what_the_run_will_write_again(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    file = MetricsFile(path)
    for step in range(5):
        file.write("step", step, loss=float(step))
    MetricsFile(path, next_step=3).write("step", 3, loss=30.0)
    assert [(r["step"], r["loss"]) for r in read_metrics(path)] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_line_cut_off_by_a_crash_is_left_out_and_other_damage_is_said(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "step", "step": 0}\n{"event": "st')
    assert read_metrics(path) == [{"event": "step", "step": 0}]
    path.write_text('{"event"\n{"event": "step", "step": 0}\n')
    with pytest.raises(DataError, match="line 1 is not JSON"):
        read_metrics(path)
    path.write_text("3\n")
    with pytest.raises(DataError, match="line 1 is not a JSON object"):
        read_metrics(path)
    assert read_metrics(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("step", [None, "7", 1.5, [0]])
def test_a_line_whose_step_is_no_whole_number_is_refused_by_number(tmp_path: Path, step: object) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "run"}\n' + json.dumps({"event": "step", "step": step}) + "\n")
    with pytest.raises(DataError, match=r"line 2 has step=.*steps are whole numbers"):
        MetricsFile(path, next_step=1)


def test_numbers_that_json_does_not_know_become_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path).write("step", 0, loss=float("nan"), norm=float("inf"))
    assert "NaN" not in path.read_text()
    assert read_metrics(path)[0]["loss"] is None


def test_memory_is_known_on_cpu_and_peak_flops_is_not() -> None:
    assert (peak_memory_bytes(torch.device("cpu")) or 0) > 50e6
    assert peak_flops(torch.device("cpu"), torch.float32) is None
    assert gpu_name(torch.device("cpu")) is None


def test_an_apple_gpu_has_the_peak_of_its_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    device, names = torch.device("mps"), ["Apple M1 8-core GPU", "Apple M1", None]
    monkeypatch.setattr(hardware, "apple_gpu_name", lambda: names[0])
    assert gpu_name(device) == "Apple M1 8-core GPU"
    assert peak_flops(device, torch.float32) == pytest.approx(2.6e12, rel=0.01)
    assert peak_flops(device, torch.bfloat16) is None
    for unknown in names[1:]:
        monkeypatch.setattr(hardware, "apple_gpu_name", lambda name=unknown: name)
        assert peak_flops(device, torch.float32) is None


def test_a_stopwatch_adds_laps_to_what_was_before() -> None:
    watch = Stopwatch(10.0).start()
    lap = watch.stop()
    assert lap >= 0
    assert watch.elapsed == 10.0 + lap
