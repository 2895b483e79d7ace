"""`tinygpt tokenize`: text files to token shards."""

import argparse
import sys
from typing import TYPE_CHECKING, TextIO

from tinygpt.cli._parser import typed_path
from tinygpt.cli._source import open_text

if TYPE_CHECKING:
    from tinygpt.data import TokenizeProgress

_BAR_WIDTH = 24


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser of `tinygpt`."""
    parser = commands.add_parser(
        "tokenize",
        help="turn text into memory-mapped token shards",
        description="Turn text into token shards, which train without tokenizing again. Killed at any moment, the "
        "same command goes on where it was; finished shards are not made again.",
        epilog="example: tinygpt tokenize books/ shards/train --tokenizer my-tokenizer",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        type=typed_path,
        help="what tinygpt.data.open_source opens: a file, a folder, hf://datasets/..., or embedded for the book",
    )
    parser.add_argument("out", metavar="OUT", type=typed_path, help="folder for the shards, new or unfinished")
    parser.add_argument(
        "--tokenizer", required=True, metavar="FOLDER", type=typed_path, help="folder that a tokenizer was saved to"
    )
    parser.add_argument("--text-key", default="text", metavar="KEY", help="key or column of the text (default: text)")
    parser.add_argument("--separator", metavar="TEXT", help=r"what separates documents in .txt files, such as '\n\n'")
    parser.add_argument(
        "--on-error",
        default="raise",
        choices=["raise", "skip"],
        help="stop at a document that cannot be read, or skip and count it (default: raise)",
    )
    parser.add_argument("--processes", type=int, metavar="N", help="processes that tokenize (default: one a core)")
    parser.add_argument("--shard-tokens", type=int, metavar="N", help="tokens in a shard (default: 33,554,432)")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.set_defaults(run=_run, goes_on=True)


def _run(options: argparse.Namespace) -> None:
    from tinygpt.data import skipped_of, tokenize_documents
    from tinygpt.tokenizer import load_tokenizer

    source = open_text(options.source, options)
    bar = None if options.quiet else _ProgressBar(sys.stderr)
    sizes = {} if options.shard_tokens is None else {"shard_tokens": options.shard_tokens}
    try:
        shards = tokenize_documents(
            source,
            load_tokenizer(options.tokenizer),
            options.out,
            processes=options.processes,
            progress=bar,
            **sizes,
        )
    finally:
        if bar is not None:
            bar.end()
    for skipped in skipped_of(source):
        print(f"skipped {skipped.count:,} in {skipped.file}: {skipped.reason}, first {skipped.first}")
    print(
        f"{options.out}: {len(shards):,} documents, {shards.num_tokens:,} tokens in {shards.num_shards:,} shards, "
        f"{shards.num_bytes / max(1, shards.num_tokens):.2f} bytes a token"
    )


class _ProgressBar:
    """One line that is drawn over itself; in a log file, a line every half minute.

    How much text there is in all is not known before it was read, so the bar shows the shard being filled.
    """

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._drawn = -1e9
        self._live = out.isatty()

    def __call__(self, progress: "TokenizeProgress") -> None:
        if progress.seconds - self._drawn < (0.2 if self._live else 30):
            return
        self._drawn = progress.seconds
        filled = int(_BAR_WIDTH * progress.shard_fraction)
        bar = "#" * filled + "." * (_BAR_WIDTH - filled)
        speed = progress.new_bytes / 1e6 / max(progress.seconds, 1e-9)
        line = (
            f"shard {progress.shards + 1} [{bar}] {progress.documents:,} documents, "
            f"{progress.utf8_bytes / 1e6:,.1f} MB, {progress.tokens / 1e6:,.1f} M tokens, {speed:.1f} MB/s"
        )
        self._out.write(f"\r{line}\x1b[K" if self._live else f"{line}\n")
        self._out.flush()

    def end(self) -> None:
        """Leave the line as it is and go on below it."""
        if self._live and self._drawn >= 0:
            self._out.write("\n")
