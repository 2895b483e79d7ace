"""`tinygpt serve` as a process: it starts, says where, is stopped by signals, and names a user's mistakes."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from chat_model import save_chat_model
from chat_server import ask, begin_stream, wait_until
from tinygpt.cli import main

pytest.importorskip("uvicorn")
pytestmark = pytest.mark.skipif(os.name == "nt", reason="sends signals")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("served") / "small-chat")


@contextlib.contextmanager
def process(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    started = subprocess.Popen(
        [sys.executable, "-m", "tinygpt", "serve", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        yield started
    finally:
        started.kill()
        started.wait()
        assert started.stderr is not None
        started.stderr.close()


def lines_until_address(started: "subprocess.Popen[str]") -> tuple[list[str], str]:
    assert started.stderr is not None
    lines = []
    for line in started.stderr:
        lines.append(line.rstrip())
        if found := re.search(r"http://\S+", line):
            return lines, found[0]
    raise AssertionError(f"it ended: {lines}")


def test_sigterm_lets_texts_end_within_the_grace_and_exits_with_0(folder: Path) -> None:
    options = ["--port", "0", "--grace", "10", "--chat", "--weights", "float32", "--api-key-env", "MY_KEY"]
    with process(str(folder), *options, MY_KEY="sesame") as started:
        lines, url = lines_until_address(started)
        assert lines == [f"serving small-chat on {url} (Ctrl-C stops)"]
        assert ask(url, path="/v1/models")[0] == 401
        status, _, text = ask(url, path="/v1/models", authorization="Bearer sesame")
        assert (status, json.loads(text)["data"][0]["id"]) == (200, "small-chat")
        running = begin_stream(url, key="sesame", max_tokens=110, seed=0, temperature=2)
        started.send_signal(signal.SIGTERM)
        sent = rest_of(running)
        assert b"data: [DONE]" in sent
        assert started.wait(20) == 0
        assert started.stderr is not None
        assert started.stderr.read().strip() == "stopped"


def test_ctrl_c_ends_texts_that_would_take_longer_and_tells_their_readers(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals go to the main thread")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    sent: list[bytes] = []

    def interrupt() -> None:
        def answers() -> bool:
            with contextlib.suppress(OSError):
                return ask(f"http://127.0.0.1:{port}", path="/health", host="any.example")[0] == 200
            return False

        wait_until(answers)
        running = begin_stream(f"http://127.0.0.1:{port}", max_tokens=120, temperature=3, seed=0, n=8)
        os.kill(os.getpid(), signal.SIGINT)
        sent.append(rest_of(running))

    reader = threading.Thread(target=interrupt)
    reader.start()
    before = signal.getsignal(signal.SIGINT)
    assert main(["serve", str(folder), "--port", str(port), "--grace", "0", "--completion", "--host", "0.0.0.0"]) == 0
    reader.join()
    assert b"the server is stopping" in sent[0]
    assert b"[DONE]" not in sent[0]
    assert signal.getsignal(signal.SIGINT) is before
    warning, *_, last = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: everyone who reaches 0.0.0.0 can use this server")
    assert last == "stopped"


@pytest.mark.parametrize("pause", [0.0, 0.2])
def test_a_second_ctrl_c_stops_at_once_with_one_line(pause: float, folder: Path) -> None:
    with process(str(folder), "--port", "0", "--grace", "60", "--completion") as started:
        _, url = lines_until_address(started)
        running = begin_stream(url, max_tokens=120, temperature=3, seed=0, n=8)
        started.send_signal(signal.SIGINT)
        time.sleep(pause)
        started.send_signal(signal.SIGINT)
        rest_of(running)
        assert started.wait(20) in (0, -signal.SIGINT)  # the second may come when all is done
        assert started.stderr is not None
        assert started.stderr.read().strip() == "stopped"


def rest_of(connection: socket.socket) -> bytes:
    with connection:
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


MISTAKES = {
    "port": (["--port", "99999"], "port"),
    "slots": (["--slots", "0"], "num_slots"),
    "key": (["--api-key-env", "NOT_SET"], "the environment variable NOT_SET is not set or empty"),
}


@pytest.mark.parametrize(("options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line(
    options: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(folder), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
