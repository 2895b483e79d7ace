"""`python -m tinygpt`: the command line."""

import signal
import sys
from typing import NoReturn

from tinygpt.cli import main


def run() -> NoReturn:
    """Run one command as a program of its own."""
    try:
        sys.exit(main())
    finally:
        # What is left is Python's own end, where Ctrl-C would print the traceback of whatever is torn down.
        signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    run()
