"""One process with the real client of the Hub, for many tests: its settings are read once, when it is imported."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hub_server import HubServer

# Reads a line of JSON with code, runs it, answers with a line: what the code left in `result`, or its traceback.
# The waits between tries are cut short, those of the client as well; `time.sleep` is what both call.
LOOP = """
import contextlib, io, json, os, sys, time, traceback, warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
warnings.filterwarnings("ignore", message="Use 'content=")  # the client's own, when it sends large files
out = sys.stdout
sleep = time.sleep
waits = []
time.sleep = lambda seconds: (waits.append(seconds), sleep(min(seconds, 0.01)))
space = {"waits": waits, "sleep": sleep}
print(json.dumps({"ready": True}), file=out, flush=True)
for line in sys.stdin:
    request = json.loads(line)
    space.update(request["values"], result=None)
    waits.clear()
    printed, errors = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            exec(compile(request["code"], "code", "exec"), space)
        answer = {"result": space["result"], "printed": [printed.getvalue(), errors.getvalue()]}
    except BaseException as error:
        answer = {"error": traceback.format_exc(), "kind": type(error).__name__, "message": str(error)}
    print(json.dumps(answer), file=out, flush=True)
"""


class ClientError(Exception):
    """What went wrong in the other process."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(answer["error"])
        self.kind: str = answer["kind"]
        self.message: str = answer["message"]


class HubClient:
    """The other process; `run` executes code there, in one namespace."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.printed = ["", ""]  # by the last code, on standard output and standard error

    def run(self, code: str, **values: Any) -> Any:
        """Return what the code assigned to `result`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"code": code, "values": values}) + "\n")
        self._process.stdin.flush()
        answer = self.answer()
        if "error" in answer:
            raise ClientError(answer)
        self.printed = answer["printed"]
        return answer["result"]

    def refusal(self, code: str, **values: Any) -> str:
        """Return the message of the `HubError` that the code must raise."""
        try:
            self.run(code, **values)
        except ClientError as error:
            if error.kind in ("HubError", "PassingHubError"):
                return error.message
            raise
        raise AssertionError("no error")

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the client process died"
        return json.loads(line)


def client_environment(hub: HubServer, home: Path, token: str | None = "hf_secret123") -> dict[str, str]:
    """Return the environment of a user of this hub."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    # Large files go by LFS here: the other protocol talks to servers that cannot be played in a test.
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1"}
    return environment | ({"HF_TOKEN": token} if token else {})


@contextmanager
def start_client(hub: HubServer, home: Path, token: str | None = "hf_secret123") -> Iterator[HubClient]:
    """Run the client's process for the length of a `with` block."""
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP],
        env=client_environment(hub, home, token),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        try:
            client = HubClient(process)
            assert client.answer() == {"ready": True}
            yield client
        finally:
            process.kill()
