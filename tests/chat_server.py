"""A server in a thread of this process, and plain requests to it."""

import asyncio
import contextlib
import copy
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import torch

from chat_model import chat_model
from tinygpt import GPT
from tinygpt.serve import ServerConfig, create_app
from tinygpt.tokenizer import Tokenizer


class Slow(torch.nn.Module):
    """Waits before a part of a model, so that a test has time to act while a text is written."""

    def __init__(self, part: torch.nn.Module, seconds: float) -> None:
        super().__init__()
        self.part = part
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return self.part(x)


def slowed(seconds: float) -> tuple[GPT, Tokenizer]:
    """Return the model, slower by so many seconds a token."""
    model, tokenizer = chat_model()
    slow = copy.deepcopy(model)
    slow.blocks[0].mlp = Slow(slow.blocks[0].mlp, seconds)
    return slow, tokenizer


@contextlib.contextmanager
def serving(model: GPT, tokenizer: Tokenizer, **options: Any) -> Iterator[str]:
    """Serve and give the address. Signals cannot reach a thread; `tests/serve/test_process.py` sends them."""
    chat = options.pop("chat", True)
    import uvicorn

    app = create_app(model, tokenizer, name="tiny", config=ServerConfig(**options), chat=chat)
    server = uvicorn.Server(
        uvicorn.Config(app, port=0, log_config=None, log_level="critical", timeout_graceful_shutdown=2, ws="none")
    )
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for something that another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def ask(
    url: str, method: str = "GET", path: str = "/", body: Any = None, **headers: str
) -> tuple[int, dict[str, str], str]:
    """Return status, headers and text of an answer; a body that is no bytes is sent as JSON."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    if body is not None:
        sent.setdefault("content-type", "application/json")
    connection.request(method, path, body, sent)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, text


def begin_stream(url: str, *, key: str = "", **fields: Any) -> socket.socket:
    """Ask for a stream and read its first bytes."""
    host, port = urlsplit(url).netloc.split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    body = json.dumps({"prompt": "x", "stream": True, "max_tokens": 100, "temperature": 3, **fields}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    assert connection.recv(12) == b"HTTP/1.1 200"
    return connection
