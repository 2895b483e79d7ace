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
        # What is left is Python's own end, where Ctrl-C would print the traceback of whatever is torn down. Where it is
        # ignored, as by a command in the background, it stays so.
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    run()
