"""What can be typed in a chat beside messages."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

from tinygpt.cli._chat_session import Session
from tinygpt.cli._chat_terminal import Terminal
from tinygpt.cli._parser import suggestion
from tinygpt.errors import ConfigError, TinyGPTError

_HELP = '''\
/reset                forget what was said
/retry                another answer to the last message
/system [TEXT]        what the model is told before all else; - for nothing
/temperature [X]      0 takes the most likely token, 1 draws as the model would
/top-k [N], /top-p [X], /max-new-tokens [N], /seed [N]
                      without a value each shows its own, off leaves it out
/save FILE            write the conversation as JSON
/load FILE            go on with one
/quit                 leave, as Ctrl-D does
Ctrl-C stops an answer. Lines between two lines of """ are one message; with
"tinygpt[chat]" Esc Enter begins a new line as well.
// sends a text that begins with /.'''

_OPTIONS: dict[str, Callable[[str], float]] = {
    "temperature": float,
    "top-k": int,
    "top-p": float,
    "max-new-tokens": int,
    "seed": int,
}
_COMMANDS = ("help", "reset", "retry", "system", *_OPTIONS, "save", "load", "quit", "exit")


def converse(session: Session, terminal: Terminal) -> None:
    """Read, answer, and do what commands say, until the user leaves."""
    while True:
        try:
            text = terminal.read()
        except EOFError:
            if terminal.interactive:
                terminal.show("\n")
            return
        except KeyboardInterrupt:
            terminal.note("(Ctrl-D leaves)")
            continue
        if text.strip() in ("/quit", "/exit"):
            return
        try:
            if text.startswith("/") and not text.startswith("//") and "\n" not in text:
                _obey(text, session, terminal)
            elif text or not session.chat:
                said = text[1:] if text.startswith("//") else text
                _show(session, terminal, functools.partial(session.answer, said))
        except (TinyGPTError, OSError) as error:
            terminal.note(f"error: {error}")
        except KeyboardInterrupt:
            terminal.show("\n")
            terminal.note("(stopped)")


def _show(session: Session, terminal: Terminal, answer: Callable[[], Iterator[str]]) -> None:
    forgot = session.num_forgotten > 0
    pieces = answer()
    if session.num_forgotten and not forgot:
        terminal.note("(the oldest messages no longer fit the model's context; from now on it is not told of them)")
    try:
        for piece in pieces:
            terminal.show(piece)
    finally:
        pieces.close()  # type: ignore[attr-defined]
    terminal.show("\n")


def _obey(line: str, session: Session, terminal: Terminal) -> None:
    name, _, rest = line[1:].partition(" ")
    rest = rest.strip()
    if name in _OPTIONS:
        terminal.note(_option(name, rest, session))
        return
    match name:
        case "help":
            terminal.note(_HELP)
        case "reset":
            session.reset()
            terminal.note("(forgotten)")
        case "retry":
            _show(session, terminal, session.retry)
        case "system":
            if rest:
                session.system = None if rest == "-" else rest
            terminal.note(f"system: {session.system or 'nothing'}")
        case "save" | "load":
            if not rest:
                raise ConfigError(f"/{name} needs a file, for example /{name} talk.json.")
            getattr(session, name)(Path(rest).expanduser())
            terminal.note(
                f"({len(session.messages)} messages {'saved to' if name == 'save' else 'loaded from'} {rest})"
            )
        case _:
            raise ConfigError(
                f"there is no /{name}{suggestion(name, _COMMANDS)} (/help shows all; // sends a text that begins "
                "with /)"
            )


def _option(name: str, value: str, session: Session) -> str:
    field = name.replace("-", "_")
    if value:
        try:
            given = None if value == "off" else _OPTIONS[name](value)
        except ValueError:
            raise ConfigError(f"/{name} takes a number or off, not {value!r:.40}.") from None
        session.config = session.config.replace(**{field: given})
    now = getattr(session.config, field)
    return f"{name}: {'off' if now is None else now}"
