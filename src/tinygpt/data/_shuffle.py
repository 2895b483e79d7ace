"""The order of documents in an epoch: as the source has them, or shuffled by seed in windows.

Text can only be read forward, so a shuffle of the whole corpus would need the corpus in memory or a second copy of it.
A window needs neither: consecutive documents are collected, permuted by (seed, epoch, window) and handed out. A place
in it is the cursor before the window and how many of its documents were taken, so a restart reads one window again and
no more. Nothing but the documents decides where a window ends, so text and token shards of it give the same order.
What a window does not do is mix the beginning of a corpus with its end; write sorted corpora in another order.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from tinygpt.data._documents import Cursor
from tinygpt.data._packing import TokenArray
from tinygpt.errors import DataError

# Long documents close a window early: two windows are in memory at a time, 4 bytes a token.
WINDOW_TOKENS = 1 << 23


class Place(NamedTuple):
    """A place between two documents of an epoch.

    Attributes:
        cursor: The source's cursor, before the window if documents are shuffled; None at the beginning.
        window: Number of the window in this epoch.
        taken: How many documents of the window come before this place.
        window_end: The source's cursor behind the window, if some of it was taken.
    """

    cursor: Cursor | None = None
    window: int = 0
    taken: int = 0
    window_end: Cursor | None = None


class Window(NamedTuple):
    """Consecutive documents, with the cursors before and behind them."""

    start: Cursor | None
    end: Cursor
    documents: list[TokenArray]


def in_order(documents: Iterator[tuple[TokenArray, Cursor]]) -> Iterator[tuple[TokenArray, Place]]:
    """Yield the documents as they come, each with the place behind it."""
    for tokens, cursor in documents:
        yield tokens, Place(cursor)


def shuffled(windows: Iterable[Window], place: Place, *, seed: int, epoch: int) -> Iterator[tuple[TokenArray, Place]]:
    """Yield the documents of each window in the order of its permutation, each with the place behind it.

    Args:
        windows: What `collect_windows` yields from `place.cursor` on.
        place: Where to start.
        seed: Decides, with `epoch` and the window's number, the permutation.
        epoch: Number of the epoch.

    Raises:
        DataError: If the first window has fewer documents than `place.taken`.
    """
    for window in windows:
        order = permutation(len(window.documents), seed=seed, epoch=epoch, window=place.window)
        if order and place.taken > len(order):
            raise DataError(
                f"the loader state is damaged: {place.taken} documents were taken of window {place.window}, "
                f"which has {len(order)}."
            )
        following = Place(window.end, place.window + 1)
        for taken in range(place.taken, len(order)):
            last = taken + 1 == len(order)
            behind = following if last else Place(window.start, place.window, taken + 1, window.end)
            yield window.documents[order[taken]], behind
        place = following


def permutation(size: int, *, seed: int, epoch: int, window: int) -> list[int]:
    """Return the numbers below `size` in an order that the three other numbers decide.

    The raw Philox stream is sorted, since numpy keeps that stream the same for ever and its `permutation` not.
    """
    generator = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64), counter=[0, 0, 0, window])
    order: list[int] = np.argsort(generator.random_raw(size), kind="stable").tolist()
    return order


def collect_windows(
    read: Callable[[Cursor | None], Iterable[tuple[TokenArray, Cursor]]], place: Place, window_documents: int
) -> Iterator[Window]:
    """Yield the documents from the window of `place` on, in windows of `window_documents`, or of many tokens.

    Where the source no longer gives the window that documents were taken of, as a mixture with other weights, it
    cannot be known which are left. They are passed over with a warning: the first window is then an empty one.
    """
    windows = _windows(read(place.cursor), place.cursor, window_documents)
    if place.taken and place.window_end is not None:
        first = next(windows, None)
        if first is not None and first.end == place.window_end:
            yield first
        else:
            warnings.warn(
                "from the saved place on, the source gives other documents than when the loader's state was saved; "
                f"what was left of {window_documents:,} shuffled together is passed over.",
                stacklevel=2,
            )
            yield Window(place.cursor, place.window_end, [])
            windows = _windows(read(place.window_end), place.window_end, window_documents)
    yield from windows


def _windows(
    documents: Iterable[tuple[TokenArray, Cursor]], start: Cursor | None, window_documents: int
) -> Iterator[Window]:
    collected: list[TokenArray] = []
    tokens_in_window = 0
    end: Cursor | None = None
    for tokens, end in documents:
        collected.append(tokens)
        tokens_in_window += len(tokens)
        if len(collected) == window_documents or tokens_in_window >= WINDOW_TOKENS:
            yield Window(start, end, collected)
            start, collected, tokens_in_window = end, [], 0
    if collected and end is not None:
        yield Window(start, end, collected)
