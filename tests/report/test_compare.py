import json
from pathlib import Path

import pytest

from made_run import documented_run, evaluation, step_line, write_lines
from tinygpt.errors import ConfigError, DataError, MissingDependencyError
from tinygpt.report import compare_runs


def run_with(folder: Path, *, dim: int, lr: float, loss: float, data_hash: str = "a1b2") -> Path:
    record = {
        "event": "run",
        "step": -1,
        "model": {"num_parameters": 1000 * dim, "config": {"dim": dim, "num_layers": 2, "hidden_dim": None}},
        "optimizer": {"name": "MuonAdamW", "groups": [{"name": "a", "settings": {"lr": lr, "betas": [0.8, 0.9]}}]},
        "settings": {"num_steps": 60},
    }
    lines = [record, *(step_line(step, loss) for step in range(60))]
    lines += [evaluation(step, loss / 3) | {"data_hash": data_hash} for step in (29, 59)]
    write_lines(folder, lines)
    (folder / "run.json").write_text(json.dumps({"seed": dim}))
    return folder


def test_only_what_differs_is_listed(tmp_path: Path) -> None:
    runs = [run_with(tmp_path / "a", dim=64, lr=0.02, loss=3.0), run_with(tmp_path / "b", dim=128, lr=0.02, loss=2.4)]
    files = compare_runs(runs, tmp_path / "out", pictures=False)
    assert {row["name"]: row["values"] for row in files.summary["differences"]} == {
        "run.json.seed": {"a": 64, "b": 128},
        "model.num_parameters": {"a": 64_000, "b": 128_000},
        "model.config.dim": {"a": 64, "b": 128},
    }
    markdown = files.markdown.read_text("utf-8")
    assert "| model.config.dim | 64 | 128 |" in markdown
    assert "| validation bpb | 1.0000 | 0.8000 |" in markdown
    assert "hidden_dim" not in markdown
    assert "cannot be compared" not in markdown


def test_curves_are_drawn_against_steps_tokens_and_time(tmp_path: Path) -> None:
    runs = [documented_run(tmp_path / "a"), documented_run(tmp_path / "b", rise=0.1)]
    files = compare_runs(runs, tmp_path / "out")
    names = {path.name for path in files.pictures}
    assert names == {f"{what}_{by}.png" for what in ("loss", "validation") for by in ("steps", "tokens", "time")}
    html = files.html.read_text("utf-8")
    assert html.count("<svg") == 6
    assert "Nothing that is recorded differs." in html
    assert "No record of settings was written by a, b" in html


def test_a_run_without_a_record_differs_only_in_what_is_known(tmp_path: Path) -> None:
    recorded = run_with(tmp_path / "a", dim=64, lr=0.02, loss=3.0)
    silent = write_lines(tmp_path / "b", [step_line(step, 3.0) for step in range(60)])
    assert compare_runs([recorded, silent], tmp_path / "out", pictures=False).summary["differences"] == []
    checkpoint = silent / "checkpoints" / "step-000060"
    checkpoint.mkdir(parents=True)
    state = {"state": {"model_config": {"dim": 32, "num_layers": 2}, "settings": {"num_steps": 60}}}
    (checkpoint / "state.json").write_text(json.dumps(state))
    differences = compare_runs([recorded, silent], tmp_path / "out", pictures=False).summary["differences"]
    assert differences == [{"name": "model.config.dim", "values": {"a": 64, "b": 32}}]


def test_settings_that_a_run_began_with_are_compared_too(tmp_path: Path) -> None:
    one, two = (
        [{"event": "run", "step": step, "schedules": {"lr": f"made for {horizon}"}} for step, horizon in phases]
        for phases in (((-1, 30), (29, 60)), ((-1, 60), (29, 60)))
    )
    runs = [write_lines(tmp_path / name, records) for name, records in (("one", one), ("two", two))]
    differences = compare_runs(runs, tmp_path / "out", pictures=False).summary["differences"]
    assert differences == [
        {"name": "schedules from step 1.lr", "values": {"one": "made for 30", "two": "—"}},
    ]


def test_runs_of_one_name_are_told_apart_and_different_validation_sets_are_told(tmp_path: Path) -> None:
    runs = [
        run_with(tmp_path / "x" / "demo", dim=64, lr=0.02, loss=3.0),
        run_with(tmp_path / "y" / "demo", dim=64, lr=0.03, loss=3.0, data_hash="ffff"),
    ]
    files = compare_runs(runs, tmp_path / "out", pictures=False)
    assert [run["run"] for run in files.summary["runs"]] == ["x/demo", "y/demo"]
    assert "2 different validation sets were used" in files.markdown.read_text("utf-8")


def test_names_of_runs_stay_text(tmp_path: Path) -> None:
    runs = [documented_run(tmp_path / name) for name in ("_a$x$", "<i>b")]
    html = compare_runs(runs, tmp_path / "out").html.read_text("utf-8")
    assert "<i>" not in html
    assert "&lt;i&gt;b" in html
    assert "_a$x$" in html


def test_what_cannot_be_compared_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = documented_run(tmp_path / "a")
    for runs in ([run], [run] * 25):
        with pytest.raises(ConfigError, match=r"runs? cannot be compared; give 2 to 24\."):
            compare_runs(runs, tmp_path / "out")
    with pytest.raises(ConfigError, match="runs='a' is one run; give a list of two or more"):
        compare_runs("a", tmp_path / "out")
    with pytest.raises(DataError, match="absent does not exist"):
        compare_runs([run, tmp_path / "absent"], tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="the report cannot be written to"):
        compare_runs([run, run], tmp_path / "file" / "out", pictures=False)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "tinygpt\[plot\]"'):
        compare_runs([run, run], tmp_path / "out")
