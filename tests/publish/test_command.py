"""`tinygpt push`: what it prints, what it sends, and what it refuses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hub_client import HubClient, client_environment
from hub_server import HubServer
from tinygpt.cli import main
from tinygpt.publish import PushQueue


@pytest.fixture
def queued(run: Path, tmp_path: Path) -> Path:
    """A run with two queued pushes."""
    copy = tmp_path / "tiny"
    shutil.copytree(run, copy)
    queue = PushQueue("user/tiny")
    for step in (2, 4):
        (copy / "checkpoints" / f"step-{step:06d}" / "README.md").write_text("---\nlibrary_name: tinygpt\n---\n")
        queue._add(copy / "checkpoints" / f"step-{step:06d}")
    return copy


def command(client: HubClient, *arguments: str) -> int:
    return client.run("from tinygpt.cli import main\nresult = main(arguments)", arguments=["push", *arguments])


def test_a_checkpoint_is_pushed_with_what_was_asked_for(hub: HubServer, client: HubClient, plain: Path) -> None:
    options = ["--private", "--branch", "dev", "--tag", "a", "--tag", "b", "--message", "Hello", "--json"]
    assert command(client, str(plain), "user/tiny", *options) == 0
    repo = hub.repos["user/tiny"]
    assert json.loads(client.printed[0])["commit"].endswith(repo.tags["a"])
    assert repo.private
    assert repo.tags["a"] == repo.tags["b"] == repo.branches["dev"]
    assert repo.titles[repo.tags["a"]] == "Hello"
    assert f"pushing {plain} to user/tiny: 4 files, 0.1 MB" in client.printed[1]


def test_queued_pushes_are_finished(hub: HubServer, client: HubClient, queued: Path) -> None:
    assert command(client, str(queued)) == 0
    assert client.printed[0] == "2 of 2 pushes made\n"
    assert list(hub.repos["user/tiny"].tags) == ["step-2", "step-4"]
    assert "pushing 000001-step-000002 to user/tiny" in client.printed[1]


def test_a_failure_is_one_line_that_says_what_to_do(hub: HubServer, queued: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-W", "error", "-m", "tinygpt", "push", str(queued), "--pending"]
    environment = client_environment(hub, tmp_path, token=None)
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "there is no access token" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_dry_run_lists_files_and_sizes_and_asks_nobody(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(run), "user/tiny", "--step", "4", "--dry-run"]) == 0
    text = capsys.readouterr().out
    weights = run / "checkpoints" / "step-000004" / "model.safetensors"
    assert f"{weights.stat().st_size:>15,}  model.safetensors" in text
    assert "optimizer" not in text
    assert "and a README.md with the record of the run" in text
    assert main(["push", str(run), "user/tiny", "--step", "best", "--dry-run", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["bytes"] == sum(result["files"].values())
    assert result["files"].keys() == {"config.json", "model.safetensors", "tokenizer_config.json"}


def test_what_is_queued_can_be_looked_at(queued: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(queued), "--dry-run"]) == 0
    assert capsys.readouterr().out == "000001-step-000002 to user/tiny\n000002-step-000004 to user/tiny\n"
    assert main(["push", str(queued), "--dry-run", "--json"]) == 0
    assert [push["step"] for push in json.loads(capsys.readouterr().out)["pending"]] == [2, 4]
    assert main(["push", str(run)]) == 0
    assert capsys.readouterr().out.startswith("no push is pending; to push a checkpoint give its repository")


def test_a_newer_push_does_not_overtake_queued_ones(queued: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(queued), "user/tiny"]) == 2
    assert f"run `tinygpt push {queued}` first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--tag", "x"], "these options describe a push to REPO"),
        (["--private"], "these options describe a push to REPO"),
        (["user/tiny", "--pending"], "leave REPO out"),
        (["user/tiny", "--step", "first"], "--step first is not known"),
    ],
)
def test_options_that_do_not_go_together_are_usage_errors(
    run: Path, arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["push", str(run), *arguments])
    assert stopped.value.code == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nowhere"], "error: there is no folder 'nowhere'"),
        (["nowhere", "user/tiny"], "error: there is no folder 'nowhere'"),
        (["RUN", "tiny"], "error: 'tiny' is not a Hub name"),
        (["RUN", "user/tiny", "--step", "3"], "error: there is no checkpoint"),
        (["RUN", "user/tiny", "--tag", "a b"], "error: 'a b' is no name for a tag or branch"),
        (["RUN", "user/tiny", "--license", "My License"], "error: license='My License' is not an identifier"),
    ],
)
def test_wrong_values_are_errors_in_one_line(
    run: Path, arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", *(str(run) if word == "RUN" else word for word in arguments)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(text)
