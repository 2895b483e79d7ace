"""The parser that all commands hang on."""

import argparse
import sys
from collections.abc import Sequence

import tinygpt
from tinygpt.cli import _chat, _compare, _push, _report, _serve, _tokenize
from tinygpt.errors import TinyGPTError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: What stands behind `tinygpt`; None takes it from the command line.

    Returns:
        The exit status: 0, or 2 after an error, which is printed in one line, or 130 if the user stopped it.
    """
    about = "Prepare data for training, report on runs, publish them. Everything else is used from Python."
    parser = argparse.ArgumentParser(prog="tinygpt", description=about)
    parser.add_argument("--version", action="version", version=f"tinygpt {tinygpt.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (_tokenize, _report, _compare, _push, _chat, _serve):
        command.add_command(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except TinyGPTError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130
    return 0
