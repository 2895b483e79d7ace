"""Reading and writing in a terminal, or a pipe."""

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

_PROMPT = "> "


class Terminal:
    """Reads what is typed, with editing and history where the system offers it, and shows what is answered.

    With prompt_toolkit (`tinygpt[chat]`) pasted lines stay together and Esc Enter begins a new line. Without it
    Python's readline edits a line. Whether or not, lines between two lines of three quotation marks are one message.
    From a pipe each line is read as it is.

    Args:
        history: File that keeps what is typed; `None` keeps it only while the program runs.
    """

    def __init__(self, *, history: str | None = None) -> None:
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._colour = self.interactive and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        self._read = _reader(history) if self.interactive else _read_pipe

    def read(self) -> str:
        """Return what the user enters, of one line or several.

        Raises:
            EOFError: If there is nothing more.
            KeyboardInterrupt: If the user drops the line.
        """
        text = self._read(_PROMPT)
        if text.strip() != '"""':
            return text
        lines: list[str] = []
        while (line := self._read("")).strip() != '"""':
            lines.append(line)
        return "\n".join(lines)

    def show(self, piece: str) -> None:
        """Write a piece of an answer at once."""
        sys.stdout.write(piece)
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """Say something that is no answer."""
        sys.stderr.write(f"\x1b[2m{text}\x1b[0m\n" if self._colour else f"{text}\n")
        sys.stderr.flush()


def _read_pipe(prompt: str) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


def _reader(history: str | None) -> Callable[[str], str]:
    path = None if history is None else Path(history).expanduser()
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory, InMemoryHistory
        from prompt_toolkit.key_binding import KeyBindings
    except ImportError:
        return _readline_reader(path)
    if path is not None:
        _private(path)
    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    session: PromptSession[str] = PromptSession(
        history=InMemoryHistory() if path is None else FileHistory(str(path)),
        key_bindings=keys,
        prompt_continuation=" " * len(_PROMPT),
    )
    return session.prompt


def _readline_reader(path: Path | None) -> Callable[[str], str]:
    if path is None:
        return input
    try:
        import readline
    except ImportError:  # Windows has none; the terminal itself edits lines there
        return input
    _private(path)
    with contextlib.suppress(OSError):
        readline.read_history_file(path)

    def read(prompt: str) -> str:
        line = input(prompt)
        readline.write_history_file(path)
        return line

    return read


def _private(path: Path) -> None:
    """Make the file if it is not there, readable for its owner alone."""
    path.touch(mode=0o600)
