"""The parser that all commands hang on, and what happens around every command."""

import argparse
import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence

import tinygpt
from tinygpt.cli import (
    _chat,
    _compare,
    _completion,
    _eval,
    _export,
    _generate,
    _import,
    _info,
    _plan,
    _push,
    _report,
    _resume,
    _serve,
    _tokenize,
    _tokenizer,
    _train,
)
from tinygpt.cli._parser import Parser, suggestion
from tinygpt.cli._words import as_sentence, as_typed, is_out_of_memory, no_memory
from tinygpt.errors import TinyGPTError

# In the order of --help. Each module imports argparse at most; a command imports what it needs when it runs.
_COMMANDS = (
    _train,
    _resume,
    _plan,
    _tokenizer,
    _tokenize,
    _eval,
    _generate,
    _chat,
    _serve,
    _report,
    _compare,
    _export,
    _import,
    _push,
    _info,
    _completion,
)

_INTERRUPTED = 130
_BROKEN_PIPE = 141  # as shells report SIGPIPE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: What stands behind `tinygpt`; None takes it from the command line.

    Returns:
        The exit status: 0; 2 after an error, which is printed; 130 if the user stopped it; 141 if nobody reads what it
        prints.

    Raises:
        SystemExit: From the parser, and from training that was interrupted, with such a status as well.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = None
    try:
        parser, commands = build_parser()
        command = next((argument for argument in arguments if not argument.startswith("-")), None)
        if command is not None and command not in commands:
            parser.error(f"there is no command {command!r}{suggestion(command, commands)}")
        options = parser.parse_args(arguments)
        with _messages(options):
            options.run(options)
            sys.stdout.flush()
    except (TinyGPTError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            return _leave_pipe()
        print(f"error: {_one_line(as_typed(as_sentence(error), options))}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"error: {no_memory(error, options)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = "; run the same command again to go on" if hasattr(options, "goes_on") else ""
        print(f"stopped{again}", file=sys.stderr)
        return _INTERRUPTED
    return 0


def build_parser() -> tuple[Parser, list[str]]:
    """Return the parser and the names of its commands."""
    about = "Train small GPTs, look at what they learn, write text with them, and hand them on."
    parser = Parser(
        prog="tinygpt",
        description=about,
        epilog="First steps: tinygpt train --depth 4 --out runs/first; then tinygpt generate runs/first -p 'The '",
    )
    parser.add_argument("--version", action="version", version=f"tinygpt {tinygpt.__version__}")
    commands: argparse._SubParsersAction[argparse.ArgumentParser] = parser.add_subparsers(  # type: ignore[assignment]
        title="commands", metavar="COMMAND", required=True
    )
    for command in _COMMANDS:
        command.add_command(commands)
    return parser, list(commands.choices)


def _one_line(message: str) -> str:
    """Return the sentences of a message, such as those on several fields, in one line; a table keeps its own."""
    lines = message.splitlines()
    return message if any(line[:1].isspace() for line in lines) else " ".join(lines)


@contextlib.contextmanager
def _messages(options: argparse.Namespace) -> Iterator[None]:
    """Show what the library logs and warns of as plain lines on standard error."""
    logger, handler = logging.getLogger("tinygpt"), _MessageHandler(options)
    before, plain = logger.level, warnings.formatwarning
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {as_typed(str(message), options)}\n"
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        warnings.formatwarning = plain


class _MessageHandler(logging.Handler):
    """Writes to the standard error of the moment, over a progress bar that stands there."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self._options = options

    def emit(self, record: logging.LogRecord) -> None:
        over = "\r\x1b[K" if sys.stderr.isatty() else ""
        sys.stderr.write(f"{over}{as_typed(record.getMessage(), self._options)}\n")
        sys.stderr.flush()


def _leave_pipe() -> int:
    """Keep Python from complaining at its end that standard output is gone."""
    with contextlib.suppress(OSError, ValueError):  # standard output may be no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return _BROKEN_PIPE
