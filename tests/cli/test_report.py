import json
import webbrowser
from pathlib import Path

import pytest

from made_run import documented_run
from tinygpt.cli import main


def test_report_writes_the_page_and_prints_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = documented_run(tmp_path / "run")
    assert main(["report", str(run), "--no-pictures"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("! After step 300 the training loss jumped by")
    assert str(run / "report" / "report.html") in printed
    assert (run / "report" / "report.md").exists()


def test_report_prints_json_for_scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = documented_run(tmp_path / "run")
    assert main(["report", str(run), "--out", str(tmp_path / "out"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["steps"] == 900
    assert Path(printed["html"]) == tmp_path / "out" / "report.html"
    assert len(printed["pictures"]) == 8
    assert "jump" in {observation["topic"] for observation in printed["observations"]}


def test_the_page_is_opened_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    run = documented_run(tmp_path / "run")
    assert main(["report", str(run), "--no-pictures"]) == 0
    assert opened == []
    assert main(["report", str(run), "--no-pictures", "--open", "yes"]) == 0
    assert opened == [(run / "report" / "report.html").as_uri()]


def test_compare_sets_runs_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(documented_run(tmp_path / name)) for name in ("a", "b")]
    assert main(["compare", *runs, "--out", str(tmp_path / "out"), "--no-pictures", "--json"]) == 0
    assert [run["run"] for run in json.loads(capsys.readouterr().out)["runs"]] == ["a", "b"]
    assert (tmp_path / "out" / "comparison.html").exists()


@pytest.mark.parametrize("arguments", [["report", "absent"], ["compare", "absent", "other"], ["compare", "one"]])
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
