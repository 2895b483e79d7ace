"""Numbers as a reader likes them."""

import math
from typing import Any

_MOST_CHARACTERS = 160
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def number_text(value: Any) -> str:
    """Return a number with as many digits as matter, and anything else as short text."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and abs(value) < 1 << 63:
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return "n/a"
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return short(str(value))


def value_text(value: Any) -> str:
    """Return a value of a record: a number, a list of the first of them, or short text."""
    if isinstance(value, list):
        return short(", ".join(number_text(item) for item in value[:20]))
    return number_text(value)


def finite_text(value: float, form: str, absent: str = "n/a") -> str:
    """Return a number in this form, and `absent` for one that is not known."""
    return form.format(value) if math.isfinite(value) else absent


def short(text: str, most: int = _MOST_CHARACTERS) -> str:
    """Return text in one line and not longer than `most`."""
    line = " ".join(text[: 4 * most].encode("utf-8", "replace").decode("utf-8").split())
    return line if len(line) <= most else line[: most - 1] + "…"


def factor_text(name: str, was: Any, now: Any) -> str:
    """Return by what factor a number changed; for a momentum, how many times as many steps it averages over."""
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in (was, now)):
        return ""
    try:
        if name.startswith(("momentum", "beta")) and 0 <= was < 1 and 0 <= now < 1:
            return f"averages over {(1 - was) / (1 - now):.3g} times as many steps" if was != now else ""
        return f"× {now / was:.3g}" if was else ""
    except OverflowError:
        return ""


def bytes_text(value: float) -> str:
    """Return a size in the unit that leaves at least one digit before the point."""
    if not math.isfinite(value):
        return "n/a"
    unit = 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value /= 1024
        unit += 1
    return f"{value:,.0f} {_UNITS[unit]}" if unit == 0 or value >= 100 else f"{value:.1f} {_UNITS[unit]}"


def seconds_text(value: float) -> str:
    """Return a duration: milliseconds, seconds, minutes or hours."""
    if not math.isfinite(value):
        return "n/a"
    if value < 1:
        return f"{1000 * value:.0f} ms"
    if value < 10:
        return f"{value:.2f} s"
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


def count_text(value: float) -> str:
    """Return a large number in thousands, millions or billions."""
    if not math.isfinite(value):
        return "n/a"
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= limit:
            return f"{value / limit:.2f} {unit}"
    return f"{value:,.0f}"
