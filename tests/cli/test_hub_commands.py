"""Commands that read and write a repository, against a hub on this machine."""

import json
from pathlib import Path

from hub_client import start_client
from hub_server import serve_hub

COMMAND = "from tinygpt.cli import main\nresult = main(arguments)"


def test_a_run_is_pushed_as_it_trains_and_read_back_by_its_name(tmp_path: Path, recipe_file: Path) -> None:
    with serve_hub() as hub, start_client(hub, tmp_path / "home") as client:

        def tinygpt(*arguments: str) -> str:
            assert client.run(COMMAND, arguments=[*arguments]) == 0, client.printed
            return client.printed[0]

        out = str(tmp_path / "run")
        tinygpt("train", str(recipe_file), "--out", out, "--quiet", "--push.repo", "user/tiny", "--push.license", "mit")
        repo = hub.repos["user/tiny"]
        assert repo.private
        assert list(repo.tags) == ["step-6"]
        options = ["-p", "Call", "-n", "5", "--seed", "2"]
        assert tinygpt("generate", "user/tiny", *options) == tinygpt("generate", out, *options)
        own = f"{out}/validation.safetensors"
        figures = [json.loads(tinygpt("eval", source, "--validation", own, "--json")) for source in ("user/tiny", out)]
        assert figures[0]["bpb"] == figures[1]["bpb"]
        found = json.loads(tinygpt("info", "user/tiny", "--json"))
        assert (found["kind"], found["model"]["num_layers"]) == ("repository", 1)
        assert client.run(COMMAND, arguments=["generate", "user/absent", "-p", "x"]) == 2
        assert client.printed[1].startswith("error: No folder 'user/absent' exists, and downloading")
        assert "if it is private run `hf auth login` or set HF_TOKEN.\n" in client.printed[1]


def test_a_name_that_cannot_be_reached_is_tried_once(tmp_path: Path) -> None:
    with serve_hub() as hub, start_client(hub, tmp_path / "home") as client:
        hub.fail("GET", "user/typo", status=503, times=99)
        for command in (["info"], ["generate", "-p", "x"], ["import", "out"]):
            name, *rest = command
            assert client.run(f"{COMMAND}, len(waits)", arguments=[name, "user/typo", *rest]) == [2, 0]
            (line,) = client.printed[1].splitlines()
            assert line.startswith(
                "error: No folder 'user/typo' exists, and downloading user/typo from the Hub failed: "
            )
