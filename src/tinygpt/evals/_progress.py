"""The progress bar of an evaluation."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(
    description: str, *, total: int | None, done: int = 0, unit: str = "it", enabled: bool
) -> Iterator[Callable[[int], object]]:
    """Yield a function that adds to what is done: a moving bar on a terminal, a line now and then elsewhere."""
    if not enabled:
        yield lambda count: None
        return
    # A declared dependency with a tqdm of its own; imported here because it is slow.
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    terminal = sys.stderr.isatty()
    with tqdm(  # type: ignore[no-untyped-call]
        desc=description,
        total=total,
        initial=done,
        unit=unit,
        unit_scale=unit == "B",
        dynamic_ncols=terminal,
        ncols=None if terminal else 100,
        mininterval=0.2 if terminal else 20.0,
    ) as bar:
        yield bar.update
