"""What a source does about a document or file it cannot use: refuse it, or pass it over, count it and say so."""

import warnings
from dataclasses import dataclass
from typing import Literal, TypeAlias

from tinygpt.errors import ConfigError, DataError

OnError: TypeAlias = Literal["raise", "skip"]
"""What to do about a document or file that cannot be used: raise `DataError`, or pass it over and count it."""

WHOLE_FILE = 1 << 62
"""The position of a fault that is a file's and not that of a document in it; behind every document."""


@dataclass(frozen=True)
class Skipped:
    """Documents of one file that were passed over for one reason, because `on_error="skip"` was chosen.

    Attributes:
        file: Name of the file, or number of the document where there are no files.
        reason: The kind of fault.
        count: How many documents; 1 where the file itself, or the rest of it, was passed over.
        first: The first of them: the message that `on_error="raise"` would have raised.
    """

    file: str
    reason: str
    count: int
    first: str


class Faults:
    """Raises, or keeps count of what was passed over.

    A document is counted once however often its file is read: files are read in order, so what lies before the
    furthest fault of its file was counted before. Memory grows with files and kinds of fault, not with documents.
    """

    def __init__(self, on_error: OnError) -> None:
        if on_error not in ("raise", "skip"):
            raise ConfigError(f"on_error={on_error!r} is not known; choose 'raise' or 'skip'.")
        self.on_error = on_error
        self._furthest: dict[str, int] = {}
        self._counts: dict[tuple[str, str], tuple[int, str]] = {}
        self._warned: set[str] = set()

    def note(self, file: str, position: int, reason: str, message: str) -> None:
        """Deal with one fault; returns only where the document is to be passed over.

        Args:
            file: Name of the file.
            position: A number that grows along the file, or `WHOLE_FILE`.
            reason: The kind of fault, in words that do not depend on the document.
            message: What happened where, and what to do.

        Raises:
            DataError: With `message`, where faults are not to be skipped.
        """
        if self.on_error == "raise":
            raise DataError(message) from None
        if position <= self._furthest.get(file, -1):
            return
        self._furthest[file] = position
        count, first = self._counts.get((file, reason), (0, message))
        self._counts[file, reason] = (count + 1, first)
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(
                f"skipped: {message} Others that are also {reason!r} will be counted in `skipped` without a warning.",
                stacklevel=2,
            )

    def skipped(self) -> tuple[Skipped, ...]:
        """Return what was passed over so far, by file and reason."""
        return tuple(Skipped(*key, count, first) for key, (count, first) in sorted(self._counts.items()))


def skipped_of(source: object) -> tuple[Skipped, ...]:
    """Return what any source passed over; a source without a `skipped` of its own skips nothing."""
    return tuple(getattr(source, "skipped", ()))
