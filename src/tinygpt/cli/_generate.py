"""`tinygpt generate`: text from a model."""

import argparse
import json
import sys
from collections.abc import Iterator

from tinygpt.cli._source import add_source_options, load_source

# Options of tinygpt.generate.GenerationConfig that are passed on as they are.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop_strings", "overflow")


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `tinygpt`."""
    parser = commands.add_parser(
        "generate",
        help="continue prompts",
        description="Continue prompts, as the tokens come. Without -p each line of standard input is a prompt.",
        epilog="example: tinygpt generate runs/first -p 'Call me' --max-new-tokens 80 --temperature 0.8 --seed 1",
    )
    add_source_options(parser)
    add = parser.add_argument
    add("-p", "--prompt", action="append", metavar="TEXT", help="what to continue; may be repeated")
    add("-n", "--max-new-tokens", type=int, default=128, metavar="N", help="most tokens to write (default: 128)")
    add("--temperature", type=float, metavar="X", help="0 takes the most likely token (default: 1)")
    add("--top-k", type=int, metavar="N", help="draw from the N most likely tokens")
    add("--top-p", type=float, metavar="X", help="draw from the fewest tokens that have this probability together")
    add("--min-p", type=float, metavar="X", help="draw from tokens at least this share as likely as the likeliest")
    add("--repetition-penalty", type=float, metavar="X", help="above 1 makes tokens less likely that were there")
    add("--seed", type=int, metavar="N", help="makes the text repeat")
    add("--stop", action="append", dest="stop_strings", metavar="TEXT", help="end the text here; may be repeated")
    add(
        "--overflow",
        choices=["error", "slide"],
        help="prompt and text longer than the context: refuse (default) or slide",
    )
    add("--weights", choices=["float32", "bfloat16", "int8"], help="store matrices for faster reading on a CPU")
    add("--json", action="store_true", help="print one JSON object a prompt, with prompt and text, when it is complete")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from tinygpt.errors import ConfigError
    from tinygpt.generate import stream_text

    if options.prompt is None and sys.stdin.isatty():
        raise ConfigError("there is no prompt; give -p TEXT, or prompts as lines of standard input.")
    model, tokenizer, _ = load_source(options)
    if options.weights is not None:
        from tinygpt.generate import reading_copy

        model = reading_copy(model, options.weights)
    given = {name: getattr(options, name) for name in _SAMPLING if getattr(options, name) is not None}
    for number, prompt in enumerate(_prompts(options)):
        pieces = stream_text(model, tokenizer, prompt, max_new_tokens=options.max_new_tokens, **given)
        if options.json:
            print(json.dumps({"prompt": prompt, "text": "".join(pieces)}), flush=True)
            continue
        if number:
            print("-" * 8)
        print(prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print(flush=True)


def _prompts(options: argparse.Namespace) -> Iterator[str]:
    """Yield the prompts; those of standard input as they come."""
    if options.prompt is not None:
        yield from options.prompt
    else:
        yield from (text for line in sys.stdin if (text := line.rstrip("\n")))
