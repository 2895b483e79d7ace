"""The progress bar of training a tokenizer."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def training_bar(*, total: int | None, enabled: bool) -> Iterator[Callable[[int | str], None]]:
    """Yield a function that takes the characters just read, or what is being done now.

    A moving bar on a terminal, a line now and then elsewhere.
    """
    if not enabled:
        yield lambda news: None
        return
    # A declared dependency with a tqdm of its own; imported here because it is slow.
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    terminal = sys.stderr.isatty()
    with tqdm(  # type: ignore[no-untyped-call]
        total=total,
        desc="reading text",
        unit=" characters",
        unit_scale=True,
        dynamic_ncols=terminal,
        ncols=None if terminal else 120,
        mininterval=0.2 if terminal else 20.0,
    ) as bar:

        def show(news: int | str) -> None:
            if isinstance(news, str):
                bar.set_description(news, refresh=True)
            else:
                bar.update(news)

        yield show
