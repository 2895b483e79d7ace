"""`python -m tinygpt`: the command line."""

import io
import os
import signal
import sys
from typing import NoReturn

from tinygpt.cli import main


def run() -> NoReturn:
    """Run one command as a program of its own."""
    _open_streams()
    try:
        sys.exit(main())
    finally:
        # What is left is Python's own end, where Ctrl-C would print the traceback of whatever is torn down. Where it is
        # ignored, as by a command in the background, it stays so.
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def _open_streams() -> None:
    """Let a program that was started without standard streams, or with those of a small alphabet, run like any other.

    What a model writes may hold any character; one that the output cannot show becomes a question mark there.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (open as long as the program runs)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")


if __name__ == "__main__":
    run()
