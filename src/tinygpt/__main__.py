"""`python -m tinygpt`: the command line."""

import sys

from tinygpt.cli import main

if __name__ == "__main__":
    sys.exit(main())
