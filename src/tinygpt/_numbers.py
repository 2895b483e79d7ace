"""Checks that what should be a number is one, before it is compared with its bounds.

Numbers from a command line, a JSON file or a forgotten setting are strings and `None` as often as not; without a check
the error is one of Python, from inside, and names no argument.
"""

import numbers

from tinygpt.errors import ConfigError


def check_whole(**values: object) -> None:
    """Refuse what is no whole number.

    Args:
        **values: The values by the name of the argument.

    Raises:
        ConfigError: If one is not an int; a bool is none, and a NumPy integer is one.
    """
    for name, value in values.items():
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            raise ConfigError(f"{name}={value!r} is {_article(value)}, not a whole number; give an int.")


def check_real(**values: object) -> None:
    """Refuse what is no number.

    Args:
        **values: The values by the name of the argument.

    Raises:
        ConfigError: If one is neither a float nor an int; a bool is none, and a NumPy number is one.
    """
    for name, value in values.items():
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            raise ConfigError(f"{name}={value!r} is {_article(value)}, not a number; give a float or an int.")


def given(**values: object) -> dict[str, object]:
    """Return the values that are not `None`, for arguments that may be left out."""
    return {name: value for name, value in values.items() if value is not None}


def _article(value: object) -> str:
    kind = type(value).__name__
    return f"{'an' if kind[0].lower() in 'aeiou' else 'a'} {kind}"
