"""Serving a model until told to stop."""

import asyncio
import contextlib
import math
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from tinygpt.errors import ConfigError, MissingDependencyError
from tinygpt.generate import Engine, is_chat_tuned
from tinygpt.model import GPT
from tinygpt.serve._calls import Served
from tinygpt.serve._config import ServerConfig
from tinygpt.serve._worker import Worker
from tinygpt.tokenizer import ChatTemplate, Tokenizer

if TYPE_CHECKING:
    from starlette.applications import Starlette

_SPARE_CONNECTIONS = 64  # beyond one a text, for pages, models and health


def create_app(
    model: GPT,
    tokenizer: Tokenizer,
    *,
    name: str = "tinygpt",
    config: ServerConfig | None = None,
    chat: bool | None = None,
    **engine_options: Any,
) -> "Starlette":
    """Return the server as an ASGI application, to run with an ASGI server of your own.

    Its lifespan starts and ends the thread of the engine, once.

    Args:
        model: The model.
        tokenizer: The one it was trained with.
        name: What clients call the model.
        config: The limits; `host` decides whether other names than this machine's are refused, and `port` nothing.
        chat: Whether to answer in conversations; `None` asks `is_chat_tuned`.
        **engine_options: `weights` and `compile` of `tinygpt.generate.Engine`.

    Raises:
        ConfigError: If an option is out of range, or `chat=True` and the tokenizer has no marks of a conversation.
        MissingDependencyError: If `tinygpt[serve]` is not installed.

    Example:
        ```python
        from tinygpt import GPT, GPTConfig
        from tinygpt.serve import create_app
        from tinygpt.tokenizer import ByteTokenizer

        model = GPT.from_config(GPTConfig.from_depth(2, vocab_size=257, max_seq_len=128))
        app = create_app(model, ByteTokenizer(), name="small")  # uvicorn.run(app) serves it
        ```
    """
    app, _ = _app_and_worker(model, tokenizer, name, config or ServerConfig(), chat, engine_options)
    return app


def serve(
    model: GPT,
    tokenizer: Tokenizer,
    *,
    name: str = "tinygpt",
    config: ServerConfig | None = None,
    chat: bool | None = None,
    started: Callable[[str], None] | None = None,
    **engine_options: Any,
) -> None:
    """Serve a model with OpenAI's API and a page to chat, until SIGINT or SIGTERM.

    Then no connection is taken any more, running texts have `grace_seconds` to end, and the function returns. A second
    SIGINT ends them at once.

    Args:
        model: The model.
        tokenizer: The one it was trained with.
        name: What clients call the model.
        config: Where to listen, and the limits.
        chat: Whether to answer in conversations; `None` asks `is_chat_tuned`.
        started: Called with the server's address once it answers.
        **engine_options: `weights` and `compile` of `tinygpt.generate.Engine`.

    Raises:
        ConfigError: As in `create_app`, or if the address cannot be listened on.
        MissingDependencyError: If `tinygpt[serve]` is not installed.

    Example:
        ```python no-run: it serves until it is stopped
        serve(model, tokenizer, name="small", started=print)
        ```
    """
    config = config or ServerConfig()
    app, worker = _app_and_worker(model, tokenizer, name, config, chat, engine_options)
    import uvicorn

    with _listening(config) as listener:
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                loop="asyncio",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                limit_concurrency=config.num_slots + config.max_queue + _SPARE_CONNECTIONS,
                timeout_graceful_shutdown=math.ceil(config.grace_seconds) + 2,
            )
        )

        async def run() -> None:
            running = asyncio.create_task(server.serve(sockets=[listener]))
            told = started is None
            while not (server.should_exit or running.done()):
                if server.started and not told:
                    assert started is not None
                    started(_address(config.host, listener))
                    told = True
                await asyncio.sleep(0.05)
            worker.refuse()
            await asyncio.wait({running}, timeout=config.grace_seconds)
            await asyncio.to_thread(worker.stop)  # ends what still runs, so that each client is told
            await running
            if server.force_exit:  # by a second signal, at which uvicorn leaves the application as if it still ran
                await server.lifespan.shutdown()

        with _stopped_by_signals(server):
            asyncio.run(run())


def _app_and_worker(
    model: GPT,
    tokenizer: Tokenizer,
    name: str,
    config: ServerConfig,
    chat: bool | None,
    engine_options: dict[str, Any],
) -> "tuple[Starlette, Worker]":
    try:
        import uvicorn  # noqa: F401, here so that a model is not loaded into an engine for nothing

        from tinygpt.serve._app import build_app
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn"):
            raise
        raise MissingDependencyError('serving needs starlette and uvicorn: pip install "tinygpt[serve]".') from None
    if chat and not ChatTemplate.fits(tokenizer):
        raise ConfigError("chat=True needs a tokenizer with the marks of a conversation, such as one of train_bpe.")
    if chat is None:
        chat = is_chat_tuned(model, tokenizer)
    length = config.max_request_tokens
    if length is not None and model.max_seq_len is not None and length > model.max_seq_len:
        raise ConfigError(f"max_request_tokens={length} is more than the model's context of {model.max_seq_len}.")
    engine = Engine(model, tokenizer=tokenizer, num_slots=config.num_slots, max_seq_len=length, **engine_options)
    template = ChatTemplate(tokenizer) if chat else None
    served = Served(name, tokenizer, template, engine.max_seq_len, config.num_slots)
    worker = Worker(engine, max_queue=config.max_queue)
    return build_app(served, worker, config), worker


@contextlib.contextmanager
def _listening(config: ServerConfig) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        listener = socket.create_server((config.host, config.port), family=family, backlog=256)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {config.host} port {config.port}: {error.strerror}; choose another host or port."
        ) from None
    with listener:
        yield listener


def _address(host: str, listener: socket.socket) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


@contextlib.contextmanager
def _stopped_by_signals(server: Any) -> Iterator[None]:
    """Stop the server by a signal that comes before it listens to signals itself, or that it raises again at its end.

    Without this the second kind would end the process as if it had been killed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
