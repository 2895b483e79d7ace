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
