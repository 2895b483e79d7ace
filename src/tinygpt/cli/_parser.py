"""The parser of a command: errors in one line, the nearest name for a misspelt one, fields of a recipe as options."""

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line with status 2.

    Args:
        *args: As for `ArgumentParser`.
        overrides: Whether options that the command does not know are fields of a recipe, such as
            `--model.num-layers 6`; they are collected in `overrides`.
        **kwargs: As for `ArgumentParser`.
    """

    def __init__(self, *args: Any, overrides: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self._takes_overrides = overrides

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse, with fields of a recipe taken out first."""
        if self._takes_overrides and args is not None:
            args, overrides = self._split(args)
            found, unknown = super().parse_known_args(args, namespace)
            found.overrides = overrides
        else:
            found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            first = unknown[0]
            if not first.startswith("-"):
                self.error(f"{first!r} is more than this command takes")
            hint = suggestion(first.partition("=")[0], self._option_string_actions)
            self.error(f"{first} is not an option of this command{hint}")
        return found, unknown

    def _split(self, args: Sequence[str]) -> tuple[list[str], dict[str, str]]:
        """Return the arguments that the command knows, and the rest as values by name."""
        known: list[str] = []
        overrides: dict[str, str] = {}
        waiting = list(args)
        while waiting:
            argument = waiting.pop(0)
            name, equals, value = argument.partition("=")
            if argument == "--":
                known += [argument, *waiting]
                break
            if not name.startswith("--"):
                known.append(argument)
                continue
            action = self._option_string_actions.get(name)
            if action is not None:
                known.append(argument)
                if action.nargs != 0 and not equals and waiting:
                    known.append(waiting.pop(0))
                continue
            if not equals:
                if not waiting or waiting[0].startswith("--"):
                    hint = suggestion(name, self._option_string_actions)
                    self.error(
                        f"{name} is no option of this command, and as a field of a recipe it needs a value{hint}"
                    )
                value = waiting.pop(0)
            overrides[name.removeprefix("--")] = value
        return known, overrides

    def error(self, message: str) -> NoReturn:
        """End the program with one line on standard error."""
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def typed_path(text: str) -> str:
    """Return the path that was typed; an empty one, such as of a variable that is not set, would mean this folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty; is a variable of the shell not set?")
    return text


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return a hint at the known name that begins so, or else the nearest one, or nothing."""
    known = list(known)
    longer = [each for each in known if len(name.strip("-")) > 2 and each.startswith(name)]
    near = longer[:1] or difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def unescaped(text: str) -> str:
    r"""Return text with `\n`, `\r` and `\t` as what they stand for in a program."""
    for escape, character in ((r"\n", "\n"), (r"\r", "\r"), (r"\t", "\t")):
        text = text.replace(escape, character)
    return text
