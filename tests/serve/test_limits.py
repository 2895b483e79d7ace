"""What keeps one client from taking the server away from the others, and strangers out."""

import concurrent.futures
import http.client
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch

from chat_model import chat_model
from chat_server import ask, begin_stream, serving, slowed, wait_until
from tinygpt import GPT
from tinygpt.errors import ConfigError, MissingDependencyError
from tinygpt.serve import ServerConfig, create_app
from tinygpt.serve import serve as serve_forever
from tinygpt.tokenizer import ByteTokenizer

CHAT = {"messages": [{"role": "user", "content": "Count"}]}


def error_of(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text)
    assert set(found) == {"error"}
    assert set(found["error"]) == {"message", "type", "param", "code"}
    return dict(found["error"])


def num_texts(url: str) -> int:
    return int(json.loads(ask(url, path="/health")[2])["texts"])


@pytest.fixture(scope="module")
def narrow() -> Iterator[str]:
    """A slow server with one slot, one place in the queue, small requests and a key."""
    with serving(
        *slowed(0.05), num_slots=1, max_queue=1, max_body_bytes=400, max_request_tokens=110, api_key="sesame"
    ) as url:
        yield url


KEY = {"authorization": "Bearer sesame"}


def test_health_says_how_many_texts_there_are(url: str) -> None:
    status, _, text = ask(url, path="/health")
    assert status == 200
    assert json.loads(text) == {"status": "ok", "model": "tiny", "texts": 0}


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nowhere", 404), ("GET", "/v1/completions", 405), ("POST", "/", 405)]
)
def test_what_is_not_there_is_an_error_in_json(url: str, method: str, path: str, status: int) -> None:
    found, _, text = ask(url, method, path)
    assert found == status
    assert error_of(text)["message"].startswith("there is no ")


@pytest.mark.parametrize("body", [b"{", b"\xff", b"", b"[" * 5000, b"[1]", b"7"])
def test_a_body_that_is_no_json_object_is_refused(url: str, body: bytes) -> None:
    status, _, text = ask(url, "POST", "/v1/completions", body)
    assert status == 400
    assert "JSON" in error_of(text)["message"]


def test_a_request_of_another_type_is_refused_as_pages_of_other_sites_can_send_it(url: str) -> None:
    status, _, text = ask(url, "POST", "/v1/completions", b'{"prompt": "x"}', content_type="text/plain")
    assert status == 415
    assert "application/json" in error_of(text)["message"]


@pytest.mark.parametrize("body", [rb'{"prompt": "\ud800"}', rb'{"prompt": "x", "\ud800": 1}'])
def test_text_without_utf8_form_is_refused(url: str, body: bytes) -> None:
    status, _, text = ask(url, "POST", "/v1/completions", body)
    assert status == 400
    assert "surrogate" in error_of(text)["message"] or "unicode string" in error_of(text)["message"]


@pytest.mark.parametrize("size", [401, 6_000, 5_000_000])
def test_a_body_that_is_too_long_is_refused(narrow: str, size: int) -> None:
    try:
        status, _, text = ask(narrow, "POST", "/v1/completions", b"x" * size, **KEY)
    except (ConnectionError, BrokenPipeError):
        assert size > 16 * 400  # far too long: the server need not read it to its end
        return
    assert status == 413
    assert error_of(text)["message"] == "the body of a request may have 400 bytes."


def test_a_body_in_chunks_is_counted_as_well(narrow: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(narrow).netloc, timeout=30)
    chunks = iter([b"x" * 300] * 3)
    connection.request("POST", "/v1/completions", chunks, {**KEY, "content-type": "application/json"})
    assert connection.getresponse().status == 413
    connection.close()


def test_a_text_may_have_fewer_tokens_than_the_context(narrow: str) -> None:
    status, _, text = ask(narrow, "POST", "/v1/completions", {"prompt": "x", "max_tokens": 120}, **KEY)
    assert status == 400
    assert "exceed the 110 tokens" in error_of(text)["message"]
    assert error_of(text)["code"] == "context_length_exceeded"


def test_without_the_key_only_page_and_health_answer(narrow: str) -> None:
    assert ask(narrow, path="/")[0] == 200
    assert ask(narrow, path="/health")[0] == 200
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "sesame"}, {"authorization": "Bearer é"}):
        status, answered, text = ask(narrow, path="/v1/models", **headers)
        assert status == 401
        assert answered["www-authenticate"] == "Bearer"
        assert error_of(text)["code"] == "invalid_api_key"
        assert ask(narrow, "POST", "/v1/completions", {"prompt": "x"}, **headers)[0] == 401
    assert ask(narrow, path="/v1/models", **KEY)[0] == 200


def test_what_exceeds_slots_and_queue_is_refused_and_a_client_that_leaves_makes_room() -> None:
    with serving(*slowed(0.05), num_slots=1, max_queue=1) as url:
        first = begin_stream(url)
        second = begin_stream(url)  # waits for the slot, and has its status already
        wait_until(lambda: num_texts(url) == 2)
        status, headers, text = ask(url, "POST", "/v1/completions", {"prompt": "x"})
        assert status == 429
        assert headers["retry-after"] == "1"
        assert error_of(text)["code"] == "server_busy"
        assert "2 texts are being written or wait, and 2 is the most" in error_of(text)["message"]
        first.close()
        wait_until(lambda: num_texts(url) == 1)
        second.close()
        wait_until(lambda: num_texts(url) == 0)
        assert ask(url, "POST", "/v1/completions", {"prompt": "x", "max_tokens": 1})[0] == 200


def test_a_client_that_leaves_before_its_whole_answer_frees_the_slot() -> None:
    with serving(*slowed(0.05), num_slots=1, max_queue=0) as url:
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
        body = json.dumps({"prompt": "x", "max_tokens": 120, "temperature": 3}).encode()
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        wait_until(lambda: num_texts(url) == 1)
        connection.close()
        wait_until(lambda: num_texts(url) == 0, seconds=3)


def test_a_request_that_takes_too_long_is_ended() -> None:
    with serving(*slowed(0.1), num_slots=1, timeout_seconds=0.4) as url:
        options = {"prompt": "x", "max_tokens": 100, "temperature": 3, "seed": 1}
        status, _, text = ask(url, "POST", "/v1/completions", options)
        assert status == 504
        assert error_of(text)["message"] == "the request took longer than 0.4 s; ask for fewer tokens."
        status, _, text = ask(url, "POST", "/v1/completions", {**options, "stream": True})
        assert status == 200
        *pieces, last = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        assert pieces
        assert error_of(last)["code"] == "timeout"
        wait_until(lambda: num_texts(url) == 0)


def test_a_client_that_does_not_read_holds_up_nobody() -> None:
    with serving(*chat_model(), num_slots=2) as url:
        deaf = begin_stream(url, logprobs=20, n=2)
        started = time.monotonic()
        assert ask(url, "POST", "/v1/chat/completions", CHAT)[0] == 200
        assert time.monotonic() - started < 10
        deaf.close()


def test_a_client_that_sends_slowly_holds_up_nobody(url: str) -> None:
    host, port = urlsplit(url).netloc.split(":")
    with socket.create_connection((host, int(port))) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        slow.sendall(b"Content-Length: 15\r\n\r\n{")
        assert ask(url, "POST", "/v1/chat/completions", CHAT)[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[::2]:1"])
def test_another_name_in_the_host_header_is_refused(url: str, host: str) -> None:
    status, _, text = ask(url, path="/v1/models", host=host)
    assert status == 400
    assert "this server answers to" in error_of(text)["message"]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1234", "127.0.0.1:80", "[::1]:8000", "[::1]"])
def test_names_of_this_machine_are_answered(url: str, host: str) -> None:
    assert ask(url, path="/v1/models", host=host)[0] == 200


def test_pages_of_other_sites_may_not_read_unless_they_are_named(url: str) -> None:
    ask_first = {"origin": "https://site.example", "access_control_request_method": "POST"}
    assert "access-control-allow-origin" not in ask(url, path="/v1/models", origin="https://site.example")[1]
    assert "access-control-allow-origin" not in ask(url, "OPTIONS", "/v1/completions", **ask_first)[1]
    with serving(*chat_model(), allow_origins=["https://site.example"], api_key="k") as open_url:
        status, headers, _ = ask(open_url, "OPTIONS", "/v1/completions", **ask_first)
        assert status == 200
        assert headers["access-control-allow-origin"] == "https://site.example"
        assert ask(open_url, path="/v1/models", origin="https://site.example")[0] == 401
        other = ask(open_url, path="/v1/models", origin="https://other.example", authorization="Bearer k")
        assert "access-control-allow-origin" not in other[1]


def test_a_model_that_fails_says_nothing_of_its_inside_and_the_server_goes_on() -> None:
    model, tokenizer = slowed(0)
    broken = [True]

    class Breaking(torch.nn.Module):
        def __init__(self, part: torch.nn.Module) -> None:
            super().__init__()
            self.part = part

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if broken[0]:
                raise RuntimeError("secret of /home/somebody")
            return self.part(x)

    model.blocks[0].mlp = Breaking(model.blocks[0].mlp)
    with serving(model, tokenizer) as url:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            answers = list(pool.map(lambda _: ask(url, "POST", "/v1/chat/completions", CHAT), range(3)))
        for status, _, text in answers:
            assert status == 500
            assert error_of(text)["message"] == "the model failed on this request."
        status, _, text = ask(url, "POST", "/v1/chat/completions", {**CHAT, "stream": True})
        assert "the model failed" in text
        assert "secret" not in text
        broken[0] = False
        assert ask(url, "POST", "/v1/chat/completions", CHAT)[0] == 200
        assert num_texts(url) == 0


def test_a_fault_of_the_server_says_nothing_of_its_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = slowed(0)
    with serving(model, tokenizer) as url:
        monkeypatch.setattr(type(tokenizer), "encode", lambda self, text: Path("/home/somebody/secret").read_text())
        status, _, text = ask(url, "POST", "/v1/completions", {"prompt": "x"})
        assert status == 500
        assert error_of(text)["message"] == "the server failed."
        monkeypatch.undo()
        assert ask(url, "POST", "/v1/completions", {"prompt": "x"})[0] == 200


def test_texts_are_begun_in_the_order_in_which_they_were_asked_for() -> None:
    ended: list[int] = []
    with serving(*slowed(0.05), num_slots=1) as url, concurrent.futures.ThreadPoolExecutor() as pool:
        for number, length in enumerate((6, 5, 4)):
            options = {"prompt": "x", "max_tokens": length, "temperature": 3, "seed": 1}
            future = pool.submit(ask, url, "POST", "/v1/completions", options)
            future.add_done_callback(lambda _, number=number: ended.append(number))
            wait_until(lambda number=number: num_texts(url) + len(ended) == number + 1)
    assert ended == [0, 1, 2]


@pytest.mark.parametrize("name", ["max-tokens", "ä", "", "x" * 1000])
def test_a_field_of_any_name_is_refused_by_name(url: str, name: str) -> None:
    status, _, text = ask(url, "POST", "/v1/completions", {"prompt": "x", name: 1})
    assert status == 400
    assert error_of(text)["message"] == f"there is no field {name[:100]}."


def test_a_model_of_plain_text_refuses_chats_and_says_where_to_go() -> None:
    model, tokenizer = chat_model()
    untrained = GPT.from_config(model.config)  # type: ignore[arg-type]
    with serving(untrained, tokenizer, chat=None) as url:
        status, _, text = ask(url, "POST", "/v1/chat/completions", CHAT)
        assert status == 400
        assert error_of(text)["code"] == "not_a_chat_model"
        assert "use /v1/completions" in error_of(text)["message"]
        assert json.loads(ask(url, path="/v1/models")[2])["data"][0]["chat"] is False
        assert ask(url, "POST", "/v1/completions", {"prompt": "x", "max_tokens": 2})[0] == 200


def test_the_page_may_run_its_own_script_and_nothing_else(url: str) -> None:
    status, headers, text = ask(url)
    assert status == 200
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy
    assert "connect-src 'self'" in policy
    assert "unsafe" not in policy
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text


@pytest.mark.parametrize(
    "fields",
    [{"port": -1}, {"num_slots": 0}, {"max_queue": -1}, {"timeout_seconds": 0.0}, {"host": ""}, {"api_key": "ä"}],
)
def test_options_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        ServerConfig(**fields)


def test_the_key_is_not_shown() -> None:
    assert "sesame" not in repr(ServerConfig(api_key="sesame"))


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("box", False)],
)
def test_what_only_this_machine_reaches(host: str, local: bool) -> None:
    assert ServerConfig(host=host).is_local is local


def test_what_cannot_be_served_is_refused() -> None:
    model, tokenizer = chat_model()
    with pytest.raises(ConfigError, match="max_request_tokens=999 is more than the model's context of 128"):
        create_app(model, tokenizer, config=ServerConfig(max_request_tokens=999))
    with pytest.raises(ConfigError, match="needs a tokenizer with the marks of a conversation"):
        create_app(model, ByteTokenizer(), chat=True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1 port {port}: .*choose another"):
            serve_forever(model, tokenizer, config=ServerConfig(port=port), chat=True)


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "uvicorn", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "tinygpt\[serve\]"'):
        create_app(*chat_model())
