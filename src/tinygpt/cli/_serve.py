"""`tinygpt serve`: a model behind HTTP."""

import argparse
import os
import sys

from tinygpt.cli._source import add_source_options, load_source


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `tinygpt`."""
    parser = commands.add_parser(
        "serve",
        help="serve a model with OpenAI's API and a chat page",
        description="Serve a model to programs, with OpenAI's API under /v1, and to people, with a page to chat. "
        "Ctrl-C stops it. Only this machine reaches it unless --host says otherwise.",
        epilog="example: tinygpt serve runs/first --port 8000",
    )
    add_source_options(parser)
    add = parser.add_argument
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (default: 127.0.0.1)")
    add("--port", type=int, default=8000, metavar="N", help="port; 0 takes a free one (default: 8000)")
    add("--name", metavar="NAME", help="what clients call the model (default: the last part of RUN_OR_REPO)")
    add("--api-key-env", metavar="NAME", help="environment variable that holds the key clients must send")
    add("--allow-origin", action="append", default=[], metavar="URL", help="web site whose pages may use the server")
    add("--slots", type=int, default=8, metavar="N", help="texts written at a time (default: 8)")
    add("--max-queue", type=int, default=64, metavar="N", help="texts that may wait, more get status 429 (default: 64)")
    add("--max-request-tokens", type=int, metavar="N", help="longest text, prompt included (default: the context)")
    add("--max-body-bytes", type=int, default=1 << 20, metavar="N", help="longest request (default: 1048576)")
    add("--timeout", type=float, default=300.0, metavar="S", help="seconds a request may take (default: 300)")
    add("--grace", type=float, default=10.0, metavar="S", help="seconds texts may go on when stopped (default: 10)")
    add("--weights", choices=["float32", "bfloat16", "int8"], help="store matrices for faster reading on a CPU")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--chat", action="store_true", help="answer in conversations, whatever the model seems to know")
    mode.add_argument("--completion", action="store_true", help="only continue text")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from tinygpt.serve import ServerConfig, serve

    config = ServerConfig(
        host=options.host,
        port=options.port,
        api_key=_key(options.api_key_env),
        allow_origins=options.allow_origin,
        num_slots=options.slots,
        max_queue=options.max_queue,
        max_request_tokens=options.max_request_tokens,
        max_body_bytes=options.max_body_bytes,
        timeout_seconds=options.timeout,
        grace_seconds=options.grace,
    )
    model, tokenizer, _ = load_source(options)
    name = options.name or options.source.rstrip("/\\").replace("\\", "/").rpartition("/")[2] or "tinygpt"
    if not config.is_local and config.api_key is None:
        _say(f"warning: everyone who reaches {config.host} can use this server; --api-key-env asks them for a key")

    def started(address: str) -> None:
        _say(f"serving {name} on {address} (Ctrl-C stops)")

    serve(
        model,
        tokenizer,
        name=name,
        config=config,
        chat=True if options.chat else False if options.completion else None,
        started=started,
        weights=options.weights,
    )
    _say("stopped")


def _key(variable: str | None) -> str | None:
    from tinygpt.errors import ConfigError

    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise ConfigError(f"--api-key-env: the environment variable {variable} is not set or empty.")
    return key


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
