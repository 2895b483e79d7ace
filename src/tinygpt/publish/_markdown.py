"""Values from files as Markdown that says what they are and does nothing else."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

_LONGEST = 200
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|!~&$@:])")
_HARMLESS = re.compile(r"[0-9a-f]{16,128}")


def plain(value: Any) -> str:
    """Return a value as text in one line, with every character escaped that could be markup, a link or a mention."""
    if isinstance(value, float):
        value = f"{value:.6g}"
    text = " ".join("".join(c if c.isprintable() or c.isspace() else " " for c in str(value)).split())
    if len(text) > _LONGEST:
        text = text[: _LONGEST - 1] + "…"
    if _HARMLESS.fullmatch(text):
        return f"`{text}`"
    return _SPECIAL.sub(r"\\\1", text)


def code(value: Any) -> str:
    """Return a value as code in one line."""
    return "`" + " ".join(str(value).replace("`", "'").split())[:_LONGEST] + "`"


def number(value: Any) -> str:
    """Return a value with its thousands apart if it is a whole number of more than four digits."""
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000
    return f"{value:,}" if whole else plain(value)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table; `None` is written as not recorded."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = ["not recorded" if cell is None else number(cell) for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
