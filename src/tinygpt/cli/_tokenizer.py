"""`tinygpt tokenizer train`: a byte-pair encoding from text."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tinygpt.cli._parser import typed_path
from tinygpt.cli._source import open_text

if TYPE_CHECKING:
    from tinygpt.data import DocumentSource


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `tinygpt`."""
    parser = commands.add_parser(
        "tokenizer",
        help="train a tokenizer",
        description="Make a tokenizer.",
        epilog="example: tinygpt tokenizer train books/ --vocab-size 4096 --out my-tokenizer",
    )
    actions: argparse._SubParsersAction[argparse.ArgumentParser] = parser.add_subparsers(
        title="actions", metavar="ACTION", required=True
    )
    train = actions.add_parser(
        "train",
        help="learn a byte-pair encoding from text",
        description='Learn a byte-pair encoding from text; needs "tinygpt[tokenizer]". With --validation it is '
        "measured on text that it was not trained on, and shown at work.",
        epilog="example: tinygpt tokenizer train books/ notes.jsonl --vocab-size 4096 --out my-tokenizer",
    )
    train.add_argument(
        "texts",
        metavar="TEXT",
        nargs="+",
        type=typed_path,
        help="what tinygpt.data.open_source opens, or embedded for the book",
    )
    train.add_argument("--vocab-size", type=int, required=True, metavar="N", help="token ids, special ones included")
    train.add_argument(
        "--out",
        required=True,
        metavar="FOLDER",
        type=typed_path,
        help="where to save it; a tokenizer there is replaced",
    )
    train.add_argument("--validation", metavar="TEXT", type=typed_path, help="text to measure on")
    train.add_argument("--text-key", default="text", metavar="KEY", help="key or column of the text (default: text)")
    train.add_argument("--separator", metavar="TEXT", help=r"what separates documents in .txt files, such as '\n\n'")
    train.add_argument("--max-characters", type=int, metavar="N", help="read no more than this")
    train.add_argument("--quiet", action="store_true", help="show no progress")
    train.add_argument("--json", action="store_true", help="print the figures as JSON")
    train.set_defaults(run=_train)


# Of training text and of validation text, each.
_MEASURED_CHARACTERS = 10_000_000


def _train(options: argparse.Namespace) -> None:
    from tinygpt.errors import ConfigError
    from tinygpt.tokenizer import tokenizer_report, train_bpe

    if any(path.exists() and not path.is_dir() for path in (Path(options.out), *Path(options.out).parents)):
        raise ConfigError(
            f"--out {options.out} is or lies in a file, and a tokenizer is a folder; choose another name."
        )

    sources = [open_text(path, options) for path in options.texts]
    held_out = open_text(options.validation, options, embedded="validation") if options.validation else None

    if held_out is not None:
        _read_through(options.validation, held_out)

    def texts() -> Iterator[str]:
        return (text for source in sources for text, _ in source.read())

    out = Path(options.out)
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)  # before the training, as it may not be possible
    try:
        tokenizer = train_bpe(
            texts(), vocab_size=options.vocab_size, max_characters=options.max_characters, progress=not options.quiet
        )
    except BaseException:
        if is_new:
            out.rmdir()
        raise
    tokenizer.save(out)
    report = tokenizer_report(
        tokenizer, texts(), texts() if held_out is None else held_out, max_characters=_MEASURED_CHARACTERS
    )
    measured = {"train": report.train} if held_out is None else {"train": report.train, "validation": report.validation}
    if options.json:
        figures = {name: {**vars(m), "bytes_per_token": m.bytes_per_token} for name, m in measured.items()}
        facts = {"folder": options.out, "vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint()}
        print(json.dumps({**facts, **figures}))
    elif held_out is not None:
        print(f"{options.out}: {report}")
    else:
        print(
            f"{options.out}: {tokenizer.vocab_size:,} token ids, {report.train.bytes_per_token:.3f} bytes a token on "
            "its training text"
        )


def _read_through(path: str, held_out: "DocumentSource") -> None:
    """Read what is going to be measured, so that an error in it comes before the training and not after it."""
    from tinygpt.errors import DataError

    characters = 0
    for text, _ in held_out.read():
        characters += len(text)
        if characters >= _MEASURED_CHARACTERS:
            break
    if not characters:
        raise DataError(f"--validation {path} has documents and no text in them; give documents with text.")
