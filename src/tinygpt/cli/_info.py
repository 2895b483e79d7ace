"""`tinygpt info`: what something is, or what this machine has."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinygpt.cli._parser import typed_path


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `tinygpt`."""
    parser = commands.add_parser(
        "info",
        help="say what a file, folder or repository is, or what this machine has",
        description="Say what a run, checkpoint, model, tokenizer, recipe, validation set or folder of token shards "
        "holds, and whether it is whole. Without a path: versions, devices and extras of this installation.",
        epilog="example: tinygpt info runs/first --json",
    )
    parser.add_argument(
        "path", metavar="PATH_OR_REPO", nargs="?", type=typed_path, help="a file, a folder, or user/repo"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from tinygpt.cli._inspect import describe_machine, describe_path, describe_repository

    if options.path is None:
        facts = describe_machine()
    elif (path := Path(options.path).expanduser()).exists():
        facts = describe_path(path)
    else:
        facts = describe_repository(options.path)
    print(json.dumps(facts, indent=1) if options.json else "\n".join(_lines(facts)))


def _lines(facts: dict[str, Any], indent: str = "") -> Iterator[str]:
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{name}"
            yield from _lines(value, indent + "  ")
        else:
            yield f"{indent}{name:{width}}  {_shown(value)}"


def _shown(value: Any) -> str:
    match value:
        case None:
            return "none"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.6g}"
        case list():
            return ", ".join(map(_shown, value)) or "none"
    return str(value)
