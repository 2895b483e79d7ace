"""The command line: `tinygpt COMMAND`. Each command is a thin layer over a function of the library.

Nothing heavy is imported before a command runs, so `tinygpt --help` answers at once.
"""

from tinygpt.cli._main import main as main

__all__ = ["main"]
