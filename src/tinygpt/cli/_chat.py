"""`tinygpt chat`: a conversation with a model in the terminal."""

import argparse
import sys

from tinygpt.cli._source import add_source_options, load_source


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `tinygpt`."""
    parser = commands.add_parser(
        "chat",
        help="talk with a model",
        description="Talk with a model that was trained on conversations. Any other model continues what you type. "
        "/help shows what can be typed; Ctrl-C stops an answer, Ctrl-D leaves.",
        epilog="example: tinygpt chat runs/first --temperature 0.8",
    )
    add_source_options(parser)
    add = parser.add_argument
    add("-p", "--prompt", metavar="TEXT", help="answer this once and leave; - reads it from standard input")
    add("--system", metavar="TEXT", help="what the model is told before the conversation")
    add("-n", "--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default: 256)")
    add("--temperature", type=float, default=0.8, metavar="X", help="0 takes the most likely token (default: 0.8)")
    add(
        "--top-k",
        type=int,
        default=50,
        metavar="N",
        help="draw from the N likeliest tokens, 0 from all (default: 50)",
    )
    add("--top-p", type=float, metavar="X", help="draw from the fewest tokens that have this probability together")
    add("--seed", type=int, metavar="N", help="makes the conversation repeat")
    add("--weights", choices=["float32", "bfloat16", "int8"], help="store matrices for faster reading on a CPU")
    add("--history", metavar="FILE", help="keep what is typed in this file, for the next time (default: nowhere)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--chat", action="store_true", help="converse, whatever the model seems to know")
    mode.add_argument("--completion", action="store_true", help="continue what is typed")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from tinygpt.cli._chat_commands import converse
    from tinygpt.cli._chat_session import Session
    from tinygpt.cli._chat_terminal import Terminal
    from tinygpt.errors import ConfigError
    from tinygpt.generate import GenerationConfig, is_chat_tuned

    config = GenerationConfig(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k or None,
        top_p=options.top_p,
        seed=options.seed,
    )
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    if prompt is not None and not prompt.strip():
        raise ConfigError("the prompt is empty; give -p TEXT, or text on standard input with -p -.")
    model, tokenizer, _ = load_source(options)
    chat = options.chat or (not options.completion and is_chat_tuned(model, tokenizer))
    session = Session(model, tokenizer, config, chat=chat, system=options.system, weights=options.weights)
    if prompt is not None:
        for piece in session.answer(prompt.rstrip("\n") if options.prompt == "-" else prompt):
            print(piece, end="", flush=True)
        print(flush=True)
        return
    terminal = Terminal(history=options.history)
    mode = (
        "The model was trained on conversations."
        if chat
        else "This model continues text: type a beginning. An empty line lets it go on."
    )
    terminal.note(f"{options.source}: {mode} /help shows what can be typed, Ctrl-D leaves.")
    converse(session, terminal)
