"""The guide runs as it stands, the blocks that need the Hub included: here is one."""

import re
import shlex
from pathlib import Path

from hub_client import HubClient
from hub_server import HubServer, yaml_errors

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "publish.md"


def test_the_guide_runs_against_a_hub(hub: HubServer, client: HubClient, tmp_path: Path) -> None:
    blocks = re.findall(r"^```(python|bash)[^\n]*\n(.*?)^```", GUIDE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    client.run("import os\nos.chdir(folder)", folder=str(tmp_path))
    ran = 0
    for language, code in blocks:
        if language == "python":
            client.run(code)
            continue
        for line in code.splitlines():
            command = shlex.split(line)[1:]
            assert client.run("from tinygpt.cli import main\nresult = main(command)", command=command) == 0, line
            ran += 1
    assert ran == 3
    assert hub.repos["user/my-model"].private
    assert hub.repos["user/other-model"].tags.keys() == {"first"}
    assert hub.repos["user/my-run"].tags.keys() == {"step-4", "step-8"}
    assert yaml_errors(hub.repos["user/my-run"].files()["README.md"].decode()) == []
